"""Training that broke the weights stops, says so, and leaves a good checkpoint to go on from."""

import json
import re

import pytest
import torch

from switchlm.errors import DivergedError
from switchlm.model.router import Router
from switchlm.training.config import TrainingConfig
from switchlm.training.divergence import AT_THE_END, IN_A_ROW, FailedSteps
from switchlm.training.evaluation import EvaluationResult
from switchlm.training.loop import train
from switchlm.training.run_folder import RunFolder

PLAIN = {"warmup_steps": 0, "schedule": "constant", "evaluate_every": None, "log_every": 1}


def steps(run: RunFolder) -> list[int]:
    return sorted(int(path.name[5:]) for path in run.checkpoints.glob("step-*"))


def lines(run: RunFolder) -> list[dict]:
    """Return metrics.jsonl, which must be JSON: Python reads NaN, others do not."""
    text = run.metrics.read_text()
    assert not re.search("NaN|Infinity", text)
    return [json.loads(line) for line in text.splitlines()]


class Scripted:
    """An evaluator with other results at some steps."""

    when_stopped = True

    def __init__(self, results):
        self.results = results

    def evaluate(self, model, step):
        return EvaluationResult(metrics=self.results.get(step, dict)())

    def state(self):
        return {}

    def restore(self, state):
        pass


@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("rate", [1e30, 1e9, 1e3])
def test_a_run_ends_after_many_failed_steps(build, loader, tmp_path, rate, clip):
    run, model = RunFolder(tmp_path), build()
    gentle = TrainingConfig(steps=4, checkpoint_every=1, **PLAIN)
    list(train(model, loader, gentle, run=run))
    wild = TrainingConfig(
        steps=400, checkpoint_every=1, learning_rate=rate, gradient_clip=clip, **PLAIN
    )
    with pytest.raises(DivergedError, match=r"kept in .* go on from it with --resume") as error:
        list(train(model, loader, wild, run=run, resume=True))
    assert f"(it is {rate:g})" in str(error.value)
    assert lines(run)[-1]["step"] < 4 + 2 * IN_A_ROW
    kept = steps(run)
    assert kept
    again = build()
    found = list(train(again, loader, TrainingConfig(steps=12, **PLAIN), run=run, resume=True))
    assert found[0]["step"] == kept[-1] + 1
    assert all(line["loss"] < 10 and not line["skipped"] for line in found)


@pytest.mark.parametrize("number", [2, AT_THE_END + 1])
def test_a_short_run_that_ends_broken_fails_too(build, loader, tmp_path, number):
    run = RunFolder(tmp_path)
    config = TrainingConfig(steps=number, learning_rate=1e30, **PLAIN)
    with pytest.raises(
        DivergedError, match=r"another --out, and with a lower training\.learning_rate"
    ):
        list(train(build(), loader, config, run=run))
    assert lines(run)[-1]["skipped"] == 1


def test_a_held_out_loss_that_is_not_finite_ends_the_run(build, loader, tmp_path):
    run, evaluator = RunFolder(tmp_path), Scripted({4: lambda: {"evaluation_loss": torch.nan}})
    config = TrainingConfig(steps=4, **{**PLAIN, "evaluate_every": 2})
    with pytest.raises(DivergedError, match="the held-out loss is not finite"):
        list(train(build(), loader, config, run=run, evaluator=evaluator))
    assert lines(run)[-1]["evaluation_loss"] is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", ["embedding", "router"])
def test_a_bad_number_at_a_logged_step_is_null(build, loader, tmp_path, place, value):
    run, model = RunFolder(tmp_path), build()
    calls = []

    def spoil(module, inputs, output):
        calls.append(module)
        return output * value if len(calls) == 3 else output

    def spoil_scores(x_ND, weight):
        calls.append(weight)
        return x_ND * value if len(calls) == 3 else x_ND

    if place == "embedding":
        model.embedding.register_forward_hook(spoil)
    else:
        router = next(module for module in model.modules() if isinstance(module, Router))
        router.register_forward_pre_hook(
            lambda _, inputs: (spoil_scores(inputs[0], None), *inputs[1:])
        )
    list(train(model, loader, TrainingConfig(steps=6, **PLAIN), run=run))
    found = lines(run)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    [skipped] = [line for line in found if line["skipped"]]
    assert skipped["loss"] is None
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_weights_are_saved_before_the_last_evaluation(build, loader, tmp_path):
    run = RunFolder(tmp_path)
    config = TrainingConfig(steps=4, **{**PLAIN, "evaluate_every": 2, "checkpoint_every": None})

    def fail():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        list(train(build(), loader, config, run=run, evaluator=Scripted({4: fail})))
    assert steps(run) == [4]
    [line] = train(build(), loader, config, run=run, resume=True)
    assert line["evaluation_loss"] > 0
    assert steps(run) == [4]


def test_what_counts_as_a_failed_step():
    failed = FailedSteps(vocabulary_size=100)
    for loss, skipped, in_a_row in [
        (30.0, False, 0),  # guessing is 4.6, but it is the first
        (149.0, False, 0),
        (float("nan"), True, 1),
        (151.0, False, 2),
        (4.0, False, 0),
    ]:
        failed.add(loss, skipped)
        assert failed.in_a_row == in_a_row, loss
    again = FailedSteps(vocabulary_size=100)
    again.restore(failed.state())
    assert vars(again) == vars(failed)
    again.restore({})  # of an older checkpoint
    assert again.in_a_row == 0
