"""Do all runs that are not finished, so many at once, and say how far that is."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess

from benchmarks.paper.plans import DENSE_STEP
from benchmarks.paper.runs import Run, work

Say = Callable[[str], None]
BESIDE = 10.0  # seconds of a run beside its steps: it starts, evaluates, saves


def run_all(runs: Sequence[Run], names: Mapping[str, str], workers: int, say: Say) -> None:
    """Do the runs in their order, each in a process of its own, whose end is not ours.

    runs: each after those it starts from. names: of their keys. A run whose process was killed has
    no result and is left for the next time, as are those that start from it.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    guesses = {run.key: run.plan.seconds(run.place) + BESIDE for run in runs}
    finished = {run.key for run in runs if run.finished}
    waiting = [run for run in runs if run.key not in finished]
    total, measured = len(waiting), Measured()
    say(f"{total} of {len(runs)} runs to do. {plan(waiting, guesses, workers)}")
    spawn = multiprocessing.get_context("spawn")
    running: dict[str, tuple[Run, BaseProcess, float]] = {}
    lost: set[str] = set()
    while waiting or running:
        lost |= {run.key for run in waiting if any(need.key in lost for need in run.needs)}
        waiting = [run for run in waiting if run.key not in lost]
        ready = [run for run in waiting if all(need.key in finished for need in run.needs)]
        for run in ready[: workers - len(running)]:
            waiting.remove(run)
            process: BaseProcess = spawn.Process(target=work, args=(run, os.getpid()), daemon=True)
            process.start()
            running[run.key] = (run, process, time.monotonic())
        time.sleep(0.2)
        for key, (run, process, started) in list(running.items()):
            if process.is_alive():
                continue
            del running[key]
            seconds = time.monotonic() - started
            measured.add(seconds, guesses[key])
            (finished if run.finished else lost).add(key)
            left = sum(guesses[one.key] for one in waiting)
            left += sum(guesses[key] for key in running) / 2
            done = total - len(waiting) - len(running)
            say(
                f"[{done} of {total}] {names[key]}: {outcome(run, process.exitcode)}, "
                f"{seconds:.0f} s; about {clock(measured.factor * left / workers)} left"
            )
    if lost:
        say(f"{len(lost)} runs have no result; the next start tries them again.")


class Measured:
    """How much longer runs take than was guessed."""

    def __init__(self) -> None:
        self.seconds, self.guessed = 0.0, 0.0

    def add(self, seconds: float, guessed: float) -> None:
        """Take note of a run."""
        self.seconds += seconds
        self.guessed += guessed

    @property
    def factor(self) -> float:
        return self.seconds / self.guessed if self.guessed else 1.0


def plan(runs: Sequence[Run], guesses: Mapping[str, float], workers: int) -> str:
    """Return what is to be done, in words."""
    seconds = sum(guesses[run.key] for run in runs)
    return (
        f"At {1000 * DENSE_STEP:.0f} ms for a step of the demo's dense model that is "
        f"{seconds:,.0f} seconds of one core, "
        f"{clock(seconds / workers)} with {workers} runs at a time."
    )


def outcome(run: Run, exitcode: int | None) -> str:
    """Return what came of a run, in a few words."""
    record = run.record()
    if record is None:
        return f"its process ended with status {exitcode}"
    if "figures" not in record:
        return next(f"{kind}: {record[kind]}" for kind in ("diverged", "failed") if kind in record)
    figures = record["figures"]
    if "scores" in figures:
        return f"{figures['metric']} {figures['scores'][figures['metric']]['value']:.1f}"
    return f"held-out loss {figures['evaluations'][-1]['evaluation_loss']:.3f}"


def clock(seconds: float) -> str:
    """Return hours and minutes."""
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d} h"
