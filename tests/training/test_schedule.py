import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchlm.training.config import TrainingConfig
from switchlm.training.optimizer import learning_rate


def rates(steps: int, **options: object) -> list[float]:
    config = TrainingConfig(steps=steps, learning_rate=2.0, **options)  # type: ignore[arg-type]
    return [learning_rate(step, config) for step in range(steps)]


def test_warmup_rises_linearly_from_the_first_step_on():
    found = rates(20, schedule="constant", warmup_steps=4)
    assert found == [0.5, 1.0, 1.5, 2.0] + [2.0] * 16


def test_inverse_sqrt_falls_from_the_end_of_the_warmup():
    found = rates(500, schedule="inverse_sqrt", warmup_steps=100)
    assert found[99] == 2.0
    assert found[399] == pytest.approx(2.0 * math.sqrt(100 / 400))


def test_inverse_sqrt_stays_until_decay_steps():
    found = rates(1300, schedule="inverse_sqrt", warmup_steps=100, decay_steps=300)
    assert found[99:300] == [2.0] * 201
    assert found[1199] == pytest.approx(2.0 * math.sqrt(300 / 1200))


def test_the_relative_step_of_t5_is_an_inverse_sqrt():
    config = TrainingConfig(
        steps=10**6, learning_rate=0.01, warmup_steps=0, decay_steps=10_000, schedule="inverse_sqrt"
    )
    for step in (0, 9_998, 9_999, 10_000, 65_535, 500_000):
        expected = min(1e-2, 1 / math.sqrt(step + 1))
        assert learning_rate(step, config) == pytest.approx(expected, rel=1e-12)


def test_linear_reaches_zero_at_the_end():
    found = rates(110, schedule="linear", warmup_steps=10)
    assert found[10] == pytest.approx(2.0)
    assert found[60] == pytest.approx(1.0)
    assert found[109] == pytest.approx(2.0 / 100)
    config = TrainingConfig(steps=110, schedule="linear", warmup_steps=10)
    assert learning_rate(110, config) == 0.0


@pytest.mark.parametrize("decay_steps", [None, 20])
def test_wsd_is_stable_until_the_last_part(decay_steps):
    found = rates(100, schedule="wsd", warmup_steps=10, decay_steps=decay_steps)
    assert found[9:81] == [2.0] * 72
    assert found[90] == pytest.approx(1.0)
    assert found[99] == pytest.approx(0.1)


@given(
    schedule=st.sampled_from(["inverse_sqrt", "linear", "constant", "wsd"]),
    warmup=st.integers(0, 50),
    decay=st.none() | st.integers(1, 50),
    step=st.integers(0, 99),
)
def test_every_rate_is_positive_and_at_most_the_peak(schedule, warmup, decay, step):
    config = TrainingConfig(
        steps=100, learning_rate=2.0, schedule=schedule, warmup_steps=warmup, decay_steps=decay
    )
    assert 0 < learning_rate(step, config) <= 2.0
