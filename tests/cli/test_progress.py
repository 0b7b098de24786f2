"""The time left: estimated from the steps that this process took, and never negative."""

import pytest
from rich.console import Console

from switchlm.cli import progress
from switchlm.cli.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until the test moves it."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def follow(clock):
    """Show lines, given as seconds after the start and keys; return the last status."""

    def follow(lines, after=0.0, stopping=False, **limits):
        shown = Progress(
            Console(quiet=True),
            **{"steps": None, "seconds": None, **limits},
            should_stop=lambda: stopping,
        )
        start = clock.now
        for at, event in lines:
            clock.now = start + at
            list(shown.show([event]))
        clock.now += after
        return shown._status()

    return follow


def test_a_resumed_run_counts_its_own_steps(follow):
    lines = [(10, {"step": 5000}), (20, {"step": 5010}), (30, {"step": 5020})]
    assert follow(lines, steps=5120) == "starting: 0:30 elapsed, about 1:40 left"


def test_the_rate_is_that_of_the_last_lines(follow):
    slow = [(60 * i, {"step": i}) for i in range(1, 10)]
    fast = [(540 + i, {"step": 10 + 10 * i}) for i in range(1, 30)]
    assert follow([*slow, *fast], steps=400).endswith("about 0:10 left")


def test_a_single_line_estimates_nothing(follow):
    assert follow([(5, {"step": 5000})], steps=6000) == "starting: 0:05 elapsed"


def test_fewer_steps_than_done_leave_no_time(follow):
    lines = [(1, {"step": 100}), (2, {"step": 200})]
    assert follow(lines, steps=50).endswith("about 0:00 left")


def test_the_time_left_falls_while_a_line_is_awaited(follow):
    lines = [(10, {"step": 10}), (20, {"step": 20})]
    assert follow(lines, after=7, steps=40).endswith("about 0:13 left")


def test_seconds_of_training_count_those_of_the_run_before(follow):
    lines = [(5, {"step": 100, "seconds": 90.0})]
    assert follow(lines, after=4, seconds=100.0).endswith("about 0:06 left")
    assert follow(lines, seconds=100.0, of_training=False).endswith("about 1:35 left")


def test_a_run_that_was_asked_to_stop_says_so(follow):
    lines = [(10, {"step": 10}), (20, {"step": 20})]
    assert follow(lines, steps=10**6, stopping=True).endswith("stopping after this step")


def test_two_runs_are_as_far_as_the_slower_one(follow):
    lines = [
        (at, {"run": name, "step": step})
        for at, step in ((1, 10), (11, 20))
        for name in ("dense", "sparse")
    ]
    assert follow([*lines, (12, {"run": "dense", "step": 30})], steps=40).endswith("0:19 left")
