"""Where one run's held-out loss reaches the last loss of another."""

import pytest

from switchlm.recipes.compare import crossing, speed_by_source


def line(step, seconds, loss):
    return {"step": step, "seconds": seconds, "evaluation_loss": loss}


def test_the_loss_is_interpolated_between_evaluations():
    found = crossing([line(100, 10.0, 3.0), line(200, 30.0, 2.0)], target=2.25)
    assert found is not None
    assert found.step == pytest.approx(175)
    assert found.seconds == pytest.approx(25)


def test_the_first_crossing_counts_even_if_the_loss_rises_again():
    lines = [line(100, 1.0, 3.0), line(200, 2.0, 2.0), line(300, 3.0, 2.6), line(400, 4.0, 1.9)]
    found = crossing(lines, target=2.5)
    assert found is not None
    assert found.step == pytest.approx(150)


def test_a_run_that_never_reaches_the_target_has_no_crossing():
    assert crossing([line(100, 1.0, 3.0), line(200, 2.0, 2.51)], target=2.5) is None
    assert crossing([], target=2.5) is None
    assert crossing([line(100, 1.0, None), line(200, 2.0, 3.0)], target=2.5) is None
    assert crossing([line(100, 1.0, 2.0)], target=None) is None


def test_a_run_that_starts_below_the_target_crossed_at_its_first_evaluation():
    found = crossing([line(100, 1.0, 2.0)], target=2.5)
    assert found is not None
    assert (found.step, found.seconds) == (100, 1.0)


def test_every_source_has_a_crossing_of_its_own():
    def by_source(step, **losses):
        return line(step, step / 10, 0.0) | {"evaluation_loss_by_source": losses}

    dense = [by_source(100, en=3.0, de=3.0, fr=1.0), by_source(200, en=2.0, de=2.5, fr=0.5)]
    sparse = [by_source(100, en=2.0, de=3.0, fr=1.0), by_source(200, en=1.0, de=2.0, fr=0.9)]
    found = speed_by_source(dense, sparse)
    assert found["en"] == {
        "dense_loss": 2.0, "sparse_loss": 1.0, "step_ratio": 0.5, "time_ratio": 0.5,
    }  # fmt: skip
    assert found["de"]["step_ratio"] == pytest.approx(0.75)
    assert found["fr"]["step_ratio"] is None
