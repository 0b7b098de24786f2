"""The crossing of one run's held-out loss with another's last."""

import pytest

from switchlm.recipes.speedup import crossing


def line(step, seconds, loss):
    return {"step": step, "seconds": seconds, "evaluation_loss": loss}


def test_between_two_evaluations_the_loss_is_a_straight_line():
    found = crossing([line(100, 10.0, 3.0), line(200, 30.0, 2.0)], target=2.25)
    assert found is not None
    assert found.step == pytest.approx(175)
    assert found.seconds == pytest.approx(25)


def test_the_first_crossing_counts_even_if_the_loss_rises_again():
    lines = [line(100, 1.0, 3.0), line(200, 2.0, 2.0), line(300, 3.0, 2.6), line(400, 4.0, 1.9)]
    found = crossing(lines, target=2.5)
    assert found is not None
    assert found.step == pytest.approx(150)


def test_a_run_that_never_arrives_has_no_crossing():
    assert crossing([line(100, 1.0, 3.0), line(200, 2.0, 2.51)], target=2.5) is None
    assert crossing([], target=2.5) is None


def test_a_run_that_starts_below_the_target_crossed_at_its_first_evaluation():
    found = crossing([line(100, 1.0, 2.0)], target=2.5)
    assert found is not None
    assert (found.step, found.seconds) == (100, 1.0)
