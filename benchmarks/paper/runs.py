"""The runs that the tables share: how each is configured, done, and recorded.

A plan is a run but for its seed. A run's key is a digest of its full configuration, and that of the
runs it starts from is part of it, so that tables which ask for the same run get the same file:
OUT/KEY.json, beside the run folder OUT/KEY.
"""

import hashlib
import json
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks import harness
from switchlm.files import replace_file

Figures = dict[str, Any]
Stop = Callable[[], bool]
COMMAND = "python -m benchmarks.paper"  # wherever the results were kept


class DivergedError(Exception):
    """A run whose numbers were not finite at its end: that is its result."""


@dataclass(frozen=True)
class Place:
    """Where text is read, where runs are kept, and how many steps a draft is cut to."""

    data: Path
    out: Path
    most_steps: int | None = None

    def steps(self, planned: int) -> int:
        """Return the steps of a run that is planned to have so many."""
        return planned if self.most_steps is None else min(planned, self.most_steps)

    def fill(self, text: str) -> str:
        """Put the folders into a source of text."""
        return text.replace("{data}", str(self.data)).replace("{out}", str(self.out))


class Plan(Protocol):
    """A run but for its seed."""

    @property
    def needs(self) -> tuple["Plan", ...]:
        """What it starts from."""
        ...

    def configuration(self, seed: int, place: Place) -> Figures:
        """Return all that decides the run, but for what it starts from."""
        ...

    def seconds(self, place: Place) -> float:
        """Guess how long it takes on a core."""
        ...

    def perform(self, run: "Run", out: Path, stop: Stop) -> Figures:
        """Do it, from where it was stopped if it was, and return its figures."""
        ...


@dataclass(frozen=True)
class Run:
    """A plan with its seed."""

    plan: Plan
    seed: int
    place: Place

    @cached_property
    def configuration(self) -> Figures:
        """All that decides the run."""
        return {
            "kind": type(self.plan).__name__.lower(),
            "starts_from": [need.key for need in self.needs],
            **self.plan.configuration(self.seed, self.place),
        }

    @cached_property
    def needs(self) -> tuple["Run", ...]:
        """The runs it starts from."""
        return tuple(Run(plan, self.seed, self.place) for plan in self.plan.needs)

    @cached_property
    def key(self) -> str:
        """What the run is known by."""
        text = json.dumps(self.configuration, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.place.out / self.key

    @property
    def file(self) -> Path:
        """Where its figures are."""
        return self.place.out / f"{self.key}.json"

    def record(self) -> Figures | None:
        """Return what is recorded, if it was run."""
        return json.loads(self.file.read_text()) if self.file.exists() else None

    @property
    def finished(self) -> bool:
        """Whether it has a result, which may be that it diverged. What failed is tried again."""
        return "failed" not in (self.record() or {"failed": ""})


def with_needs(runs: Sequence[Run]) -> Iterator[Run]:
    """Yield every run once, by its key, each after what it starts from."""
    seen: set[str] = set()
    for run in runs:
        for one in (*with_needs(run.needs), run):
            if one.key not in seen:
                seen.add(one.key)
                yield one


def work(run: Run, parent: int) -> None:
    """Do a run in a process of its own, with one thread, and record what came of it.

    parent: the process that started it; without that one it ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # such as that transformers has no top-2
    started = time.monotonic()
    record: Figures = {"seed": run.seed, "configuration": run.configuration}

    def orphaned() -> bool:
        return os.getppid() != parent

    try:
        if any("diverged" in (need.record() or {}) for need in run.needs):
            raise DivergedError("what it starts from diverged")
        record["figures"] = run.plan.perform(run, run.folder, orphaned)
    except DivergedError as error:
        record["diverged"] = str(error)
    except Exception as error:  # of one run: the others go on
        # What a metrics line raises whose losses are not numbers.
        kind = "diverged" if "Out of range float values" in str(error) else "failed"
        record[kind] = f"{type(error).__name__}: {error}"
    if orphaned():
        return
    record["wall_seconds"] = time.monotonic() - started
    record["environment"] = {**harness.environment(run.seed), "command": COMMAND}
    replace_file(run.file, (json.dumps(record) + "\n").encode())
