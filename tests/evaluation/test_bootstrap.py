import numpy as np
import pytest

from switchlm.evaluation.metrics import bootstrap


def mean(sums):
    return sums[..., 0] / sums[..., 1]


def with_ones(values):
    return np.stack([values, np.ones(len(values))], axis=1)


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    found = bootstrap(with_ones(values), mean)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(found.value - half, abs=0.03)
    assert found.high == pytest.approx(found.value + half, abs=0.03)


def test_the_interval_has_its_nominal_coverage():
    """Of 300 samples of 100 coin flips, 95% of the intervals should contain one half."""
    chance = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        found = bootstrap(with_ones(chance.integers(0, 2, 100).astype(float)), mean, resamples=300)
        held += found.low <= 0.5 <= found.high
    assert 0.91 <= held / 300 <= 0.98


def test_examples_of_a_group_count_as_one():
    """Forty copies of ten values have the interval of the ten."""
    values = np.arange(10.0)
    alone = bootstrap(with_ones(values), mean)
    copies = with_ones(np.repeat(values, 40))
    together = bootstrap(copies, mean, np.repeat(values, 40).tolist())
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high))
    assert bootstrap(copies, mean).low > together.low + 0.5


def test_resamples_depend_on_the_seed_only():
    values = with_ones(np.arange(30.0))
    assert bootstrap(values, mean, seed=1) == bootstrap(values, mean, seed=1)
    assert bootstrap(values, mean, seed=1) != bootstrap(values, mean, seed=2)
