import json

import pytest
import torch
from torch import Tensor

from switchlm.training.divergence import FailedSteps
from switchlm.training.monitor import Averages


def step(loss: float, skipped: float = 0.0, tokens: int = 100) -> tuple[Tensor, Tensor]:
    metrics = torch.tensor([loss, 0.01, 0.001, 2 * loss, skipped], dtype=torch.float64)
    return metrics, torch.tensor(tokens)


def test_line_has_means_since_the_last_line():
    averages = Averages(FailedSteps(24))
    for loss in (1.0, 2.0, 6.0):
        averages.add(*step(loss))
    line = averages.line()
    assert line["loss"] == 3.0
    assert line["gradient_norm"] == 6.0
    assert line["balance_loss"] == pytest.approx(0.01)
    averages.add(*step(5.0))
    assert averages.line()["loss"] == 5.0


def test_skipped_steps_are_counted_and_left_out():
    averages = Averages(FailedSteps(24))
    averages.add(*step(1.0))
    averages.add(*step(float("nan"), skipped=1.0))
    averages.add(*step(3.0))
    line = averages.line()
    assert (line["loss"], line["skipped"], line["spikes"]) == (2.0, 1, 0)


def test_tokens_are_counted_to_the_last_one():
    averages = Averages(FailedSteps(24))
    for tokens in (2**24 + 1, 2**33 + 3):
        averages.add(*step(1.0, tokens=tokens))
    assert averages.take_tokens() == 2**24 + 2**33 + 4
    assert averages.take_tokens() == 0


def test_a_line_of_skipped_steps_alone_is_still_json():
    averages = Averages(FailedSteps(24))
    averages.add(*step(float("inf"), skipped=1.0))
    line = averages.line()
    assert line["loss"] is None
    assert json.loads(json.dumps(line, allow_nan=False)) == line


def test_spikes_are_counted():
    averages = Averages(FailedSteps(24))
    for loss in [2.0] * 20 + [9.0] + [2.0] * 5:
        averages.add(*step(loss))
    assert averages.line()["spikes"] == 1


def test_state_in_mid_interval_gives_the_same_line():
    whole, first, second = (
        Averages(FailedSteps(24)),
        Averages(FailedSteps(24)),
        Averages(FailedSteps(24)),
    )
    losses = torch.rand(30).tolist()
    for loss in losses:
        whole.add(*step(loss))
    for loss in losses[:13]:
        first.add(*step(loss))
    second.restore(json.loads(json.dumps(first.state())))
    for loss in losses[13:]:
        second.add(*step(loss))
    assert second.line() == whole.line()
    assert second.state() == whole.state()
