"""What a table of the paper is: rows that are runs, columns that are figures, and claims.

A word is earned: `reproduced` if the 95% interval of the mean over at least three seeds (Student's
t) lies wholly on the paper's side; `not reproduced` if it lies wholly on the other side; `too small
to tell` otherwise. For tasks the error of the examples is joined to that of the seeds.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.paper.runs import Place, Plan, Run

from switchlm.recipes.compare import crossing

REPRODUCED, NOT_REPRODUCED, TOO_SMALL = "reproduced", "not reproduced", "too small to tell"
LEAST_SEEDS = 3
# Student's t: of 95% two-sided intervals, for 1, 2, ... degrees of freedom; then the last.
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Result:
    """The figures of a finished run. One that diverged has a quality of minus infinity."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record
        self.diverged = "diverged" in record
        self.figures: Mapping[str, Any] = record.get("figures", {})
        self.evaluations: Sequence[Mapping[str, Any]] = self.figures.get("evaluations", ())

    @property
    def quality(self) -> float:
        """Negative log perplexity on held-out text, nats per target, at the end."""
        return -math.inf if self.diverged else -self.evaluations[-1]["evaluation_loss"]

    @property
    def quality_halfway(self) -> float:
        """The quality after half of the steps."""
        return -math.inf if self.diverged else self.quality_after(self.figures["step"] // 2)

    def quality_after(self, step: int) -> float:
        """The quality at the last evaluation up to a step, or at the first after it."""
        if self.diverged:
            return -math.inf
        before = [line for line in self.evaluations if line["step"] <= step]
        return -float((before[-1] if before else self.evaluations[0])["evaluation_loss"])

    @property
    def seconds(self) -> float:
        """Training time, evaluations left out."""
        return float(self.figures.get("seconds", math.nan))

    @property
    def examples_per_second(self) -> float:
        """Rows that training reads in a second."""
        if self.diverged:
            return math.nan
        return float(self.figures["rows"] * self.figures["step"] / self.figures["seconds"])

    def seconds_to(self, quality: float) -> float | None:
        """Seconds of training until that quality; None if it is never reached."""
        reached = crossing(self.evaluations, -quality)
        return None if reached is None else reached.seconds

    def speed_up(self, other: "Result", unit: str) -> float:
        """How many times as early as `other` its last quality is reached; 0 if never.

        unit: `step` or `seconds`.
        """
        reached = crossing(self.evaluations, -other.quality)
        return 0.0 if reached is None else other.figures[unit] / getattr(reached, unit)

    @property
    def score(self) -> float:
        """The metric of the task, in per cent."""
        return -math.inf if self.diverged else self._score["value"]

    @property
    def half_width(self) -> float:
        """Half of the 95% interval of the score, by the examples."""
        return (self._score["high"] - self._score["low"]) / 2

    @property
    def _score(self) -> Mapping[str, float]:
        score: Mapping[str, float] = self.figures["scores"][self.figures["metric"]]
        return score


Runs = Mapping[str, Result]  # of one seed, by the name of the row


@dataclass(frozen=True)
class Row:
    """A row. paper: its figures there, in the order of the columns; "" where it has none."""

    name: str
    plan: Plan
    paper: tuple[str, ...] = ()


@dataclass(frozen=True)
class Column:
    """A figure of a row: of its run, and of the others of the seed; None is `otherwise`."""

    name: str
    measure: Callable[[Result, Runs], float | None]
    form: str = ".3f"
    otherwise: str = "not reached"


QUALITY = Column("quality", lambda result, runs: result.quality)


@dataclass(frozen=True)
class Claim:
    """What the paper says: that `measure` of a seed's runs is above `least`.

    paper: the figure there. error: the standard error of `measure` by the examples of a task.
    across: gives what is to be above `least` from all seeds at once, instead of `measure`.
    void: says why the claim has no meaning here, if it has none.
    """

    name: str
    paper: str
    measure: Callable[[Runs], float] | None = None
    least: float = 0.0
    form: str = "+.3f"
    error: Callable[[Runs], float] | None = None
    across: Callable[[Sequence[Runs]], Sequence[float]] | None = None
    void: Callable[[Sequence[Runs]], str] = lambda seeds: ""

    def values(self, seeds: Sequence[Runs]) -> list[float]:
        """Return the value of every seed that has all runs which it takes."""
        if self.across is not None:
            return list(self.across(seeds)) if len(seeds) >= LEAST_SEEDS else []
        assert self.measure is not None, self.name
        return [self.measure(runs) for runs in self.able(seeds)]

    def able(self, seeds: Sequence[Runs]) -> list[Runs]:
        """Return the seeds that have all runs which it takes."""
        assert self.measure is not None, self.name
        found = []
        for runs in seeds:
            try:
                self.measure(runs)
            except KeyError:
                continue
            found.append(runs)
        return found

    def verdict(self, seeds: Sequence[Runs]) -> str:
        """Return the word it has earned."""
        values = self.values(seeds)
        if len(values) < LEAST_SEEDS:
            return f"not measured: {len(values)} of {LEAST_SEEDS} seeds"
        error = 0.0
        if self.error is not None:
            error = statistics.mean(self.error(runs) for runs in self.able(seeds))
        found = word([value - self.least for value in values], error)
        reason = self.void(seeds)
        return f"{TOO_SMALL}: {reason}" if reason else found


def better(first: str, second: str, paper: str, name: str = "") -> Claim:
    """The first row has the higher quality."""
    return Claim(
        name or f"{first} is better than {second}",
        paper,
        lambda runs: runs[first].quality - runs[second].quality,
    )


def scores_better(
    first: str,
    second: str,
    paper: str,
    name: str = "",
    void: Callable[[Sequence[Runs]], str] = lambda seeds: "",
) -> Claim:
    """The first row scores higher on a task.

    Both answer the same examples; taking their errors as independent is on the safe side.
    """
    return Claim(
        name or f"{first} is better than {second}",
        paper,
        lambda runs: runs[first].score - runs[second].score,
        form="+.1f",
        error=lambda runs: math.hypot(runs[first].half_width, runs[second].half_width) / 1.96,
        void=void,
    )


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table or figure of the paper. text: what a reader must know.

    seeds: more than three where the differences are small beside their spread.
    data: the folders below shared data that it needs. prepare: what is done once before its runs.
    picture: draws NAME.png from the runs of each seed.
    """

    name: str
    title: str
    text: str
    rows: Sequence[Row]
    claims: Sequence[Claim]
    columns: Sequence[Column] = (QUALITY,)
    seeds: tuple[int, ...] = (0, 1, 2)
    data: tuple[str, ...] = ()
    prepare: Callable[[Place], None] = lambda place: None
    picture: Callable[[Sequence[Runs], Path], None] | None = None

    def missing_data(self, place: Place) -> str:
        """Return why it cannot be run here, if it cannot."""
        absent = [one for one in self.data if not (place.data / one).is_dir()]
        return f"no {' and no '.join(absent)} in {place.data}" if absent else ""

    def runs(self, place: Place) -> list[tuple[str, Run]]:
        """Return the name and the run of every row and seed, all seeds of a row together."""
        return [(row.name, Run(row.plan, seed, place)) for row in self.rows for seed in self.seeds]

    def results(self, place: Place) -> list[Runs]:
        """Return what is finished, by seed and row."""
        found: dict[int, dict[str, Result]] = {seed: {} for seed in self.seeds}
        for name, run in self.runs(place):
            if run.finished:
                found[run.seed][name] = Result(run.record() or {})
        return list(found.values())


def word(differences: Sequence[float], error_of_examples: float = 0.0) -> str:
    """Return what to call a claim that says that the differences, one per seed, are above zero.

    Where runs diverged a difference is infinite; then all must be, on the same side.
    """
    if len(differences) < LEAST_SEEDS or any(math.isnan(one) for one in differences):
        return TOO_SMALL
    if any(math.isinf(one) for one in differences):
        if len(set(differences)) > 1:
            return TOO_SMALL
        return REPRODUCED if differences[0] > 0 else NOT_REPRODUCED
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    quantile = QUANTILES[min(len(differences) - 2, len(QUANTILES) - 1)]
    half = math.hypot(quantile * error, 1.96 * error_of_examples)
    if abs(mean) <= half:
        return TOO_SMALL
    return REPRODUCED if mean > 0 else NOT_REPRODUCED
