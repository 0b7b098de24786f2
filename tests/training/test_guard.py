import random

import pytest
import torch

from switchlm.training import monitor
from switchlm.training.adafactor import keep_where
from switchlm.training.monitor import SpikeDetector, global_norm


def test_global_norm_is_that_of_all_gradients_as_one_vector():
    gradients = [torch.randn(3, 4), torch.randn(5), torch.randn(2, 2, 2)]
    whole = torch.cat([gradient.flatten() for gradient in gradients])
    torch.testing.assert_close(global_norm(gradients)[0], whole.norm())


def test_counts_are_summed_beside_the_norm():
    norm, sums = global_norm([torch.tensor([3.0, 4.0])], counts=[2**24 + 1, 5, 2**35 + 3])
    assert norm == 5
    assert sums.tolist() == [2**24 + 1, 5, 2**35 + 3]


def test_global_norm_of_large_gradients_is_the_same(monkeypatch):
    monkeypatch.setattr(monitor, "LARGE", 10)
    gradients = [torch.randn(4, 5, 6), torch.randn(3), torch.randn(7, 8).t()]
    whole = torch.cat([gradient.reshape(-1) for gradient in gradients])
    torch.testing.assert_close(global_norm(gradients)[0], whole.norm())
    gradients[0][1, 2, 3] = torch.inf
    assert not torch.isfinite(global_norm(gradients)[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_global_norm_shows_one_bad_number_among_many(bad):
    gradients = [torch.randn(30), torch.randn(40)]
    gradients[1][17] = bad
    assert not torch.isfinite(global_norm(gradients)[0])


def test_keep_where_lets_no_bad_number_through():
    old = torch.tensor([1.0, 2.0])
    keep_where(torch.tensor(True), old, torch.tensor([float("nan"), float("inf")]))
    assert old.tolist() == [1.0, 2.0]
    keep_where(torch.tensor(False), old, torch.tensor([3.0, 4.0]))
    assert old.tolist() == [3.0, 4.0]


def falling_losses(steps: int, seed: int) -> list[float]:
    """A loss that falls as a power law, with the noise of small batches."""
    noise = random.Random(seed)
    return [(1.5 + 4.0 / (1 + step / 50) ** 0.5) * noise.gauss(1.0, 0.05) for step in range(steps)]


@pytest.mark.parametrize("height", [2.0, 5.0, 100.0])
def test_spikes_are_found_and_nothing_else(height):
    """T13: of 200 spikes of 2 to 100 times the loss all are found; 0 false alarms in 19,800."""
    found = missed = false_alarms = 0
    for seed in range(20):
        detector = SpikeDetector()
        for step, loss in enumerate(falling_losses(1000, seed)):
            spiked = step % 100 == 60
            noticed = detector.is_spike(loss * height if spiked else loss)
            found += spiked and noticed
            missed += spiked and not noticed
            false_alarms += noticed and not spiked
    assert (found, missed, false_alarms) == (200, 0, 0)


def test_a_lasting_rise_becomes_the_new_normal():
    detector = SpikeDetector(window=20)
    alarms = [detector.is_spike(loss) for loss in [1.0] * 30 + [4.0] * 60]
    assert not any(alarms[:30])
    assert all(alarms[30:49])
    assert not any(alarms[50:])


def test_bad_numbers_stay_out_of_the_median():
    detector = SpikeDetector()
    assert not any(detector.is_spike(loss) for loss in [1.0] * 20 + [float("nan")] * 50)
    assert detector.is_spike(3.0)


def test_state_restores_every_later_decision():
    losses = falling_losses(150, seed=3)
    one, other = SpikeDetector(), SpikeDetector()
    for loss in losses[:70]:
        one.is_spike(loss)
    other.restore(one.state())
    rest = [loss * (3 if step % 17 == 0 else 1) for step, loss in enumerate(losses[70:])]
    assert [one.is_spike(loss) for loss in rest] == [other.is_spike(loss) for loss in rest]
    assert one.state() == other.state()
