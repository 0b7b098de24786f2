"""docs/results.md: what the paper says, what was found here, and a word for each claim."""

import math
import statistics
from collections.abc import Iterator, Sequence

from benchmarks.paper import table as words
from benchmarks.paper.runs import Place
from benchmarks.paper.table import Claim, Column, Result, Row, Runs, Table

from benchmarks import harness

MISSING = "not measured"
HEAD = (
    "# Results",
    "What the paper says beside what this code does, small: the demo's models, on text that comes "
    "with Python where nothing else is said. `make paper` measures and writes this page; a table "
    "alone: `python -m benchmarks.paper table1`. What was tried on the way: [the log](log.md).",
    "Quality is negative log perplexity on held-out text, nats per target; the paper's is of "
    "larger models on other text, so that differences are what compares. A figure is the mean over "
    "the seeds, with the smallest and the largest; a claim has the value of each seed.",
)


def page(tables: Sequence[Table], place: Place) -> str:
    """Return the page of what is finished, and of what is missing."""
    parts = [*HEAD, *(words.__doc__ or "").strip().split("\n\n")[1:]]
    found = {table.name: table.results(place) for table in tables}
    parts.append(origin([one for name in found for runs in found[name] for one in runs.values()]))
    for table in tables:
        parts += section(table, found[table.name], place)
    return "\n\n".join(part for part in parts if part) + "\n"


def origin(results: Sequence[Result]) -> str:
    """Return what was run where, by which commits."""
    if not results:
        return ""
    environments = [one.record["environment"] for one in results]

    def each(name: str) -> str:
        return ", ".join(sorted({str(one[name]) for one in environments}))

    changes = any(one["uncommitted_changes"] for one in environments)
    return (
        f"Processor {each('processor')}; {each('device')}; threads per run: {each('threads')}, two "
        f"runs at a time; torch {each('torch')}; commit {each('commit')}"
        f"{', with uncommitted changes' * changes}; seeds "
        f"{', '.join(sorted({str(one.record['seed']) for one in results}))}."
    )


def section(table: Table, found: Sequence[Runs], place: Place) -> Iterator[str]:
    """Yield the parts of a table: rows, claims, picture, and what is missing."""
    yield f"## {table.title}"
    yield table.text
    if not any(found):
        yield f"{MISSING.capitalize()}: {table.missing_data(place) or 'no run is finished'}."
        return
    yield harness.table(heads(table), [cells(row, table, found) for row in table.rows])
    claims = [claim_cells(claim, found) for claim in table.claims]
    seeds = ", ".join(map(str, table.seeds))
    yield harness.table(["claim", "paper", f"here (seeds {seeds})", ""], claims)
    if table.picture is not None and complete(table, found):
        yield f"![{table.title}]({table.name}.png)"
    yield missing(table, place)


def complete(table: Table, found: Sequence[Runs]) -> bool:
    """Whether all rows of all seeds are there."""
    return all(row.name in runs for runs in found for row in table.rows)


def missing(table: Table, place: Place) -> str:
    """Return which runs have no result, and why, if that is known."""
    by_row: dict[str, list[str]] = {}
    for name, run in table.runs(place):
        if not run.finished:
            reason = (run.record() or {}).get("failed")
            by_row.setdefault(name, []).append(
                f"{run.seed}{f' (failed: {reason})' if reason else ''}"
            )
    if not by_row:
        return ""
    listed = "; ".join(f"{name}: seed {', '.join(ones)}" for name, ones in by_row.items())
    return f"{MISSING.capitalize()}: {listed}."


def heads(table: Table) -> list[str]:
    """Return the heads of the rows."""
    names = ["", "learning rate", "parameters", "FLOPs per token", "steps"]
    for place, column in enumerate(table.columns):
        if has_paper(table, place):
            names += [f"{column.name}, paper", "here"]
        else:
            names.append(column.name)
    return names


def has_paper(table: Table, place: int) -> bool:
    """Whether the paper has a figure in that column."""
    return any(len(row.paper) > place and row.paper[place] for row in table.rows)


def cells(row: Row, table: Table, found: Sequence[Runs]) -> list[str]:
    """Return a row: what it is, and every column."""
    mine = [runs[row.name] for runs in found if row.name in runs]
    about = next((one.figures for one in mine if not one.diverged), {})

    def of(name: str, form: str) -> str:
        return format(about[name], form) if name in about else ""

    line = [row.name, of("learning_rate", ".3g"), of("parameters", ","),
            of("flops_per_token", ",.0f"), of("step", ",")]  # fmt: skip
    for place, column in enumerate(table.columns):
        if has_paper(table, place):
            line += row.paper[place : place + 1] or ("",)
        line.append(figure(row, column, found))
    return line


def figure(row: Row, column: Column, found: Sequence[Runs]) -> str:
    """Return a column of a row: mean, smallest and largest; what diverged or has none, counted."""
    values: list[float] = []
    diverged, without = 0, 0
    for runs in found:
        if row.name not in runs:
            continue
        if runs[row.name].diverged:
            diverged += 1
            continue
        try:
            value = column.measure(runs[row.name], runs)
        except KeyError:  # takes another run, which is missing
            continue
        if value is None or math.isnan(value):
            without += 1
        else:
            values.append(value)
    notes = [f"{column.otherwise} in {without}"] if without and column.otherwise else []
    notes += [f"diverged in {diverged}"] if diverged else []
    if not values:
        return column.otherwise if without else "diverged" if diverged else MISSING
    return "; ".join([spread(values, column.form), *notes])


def spread(values: Sequence[float], form: str) -> str:
    """Return the mean, and of several values the smallest and the largest."""
    mean = format(statistics.mean(values), form)
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):{form}} to {max(values):{form}})"


def claim_cells(claim: Claim, found: Sequence[Runs]) -> list[str]:
    """Return a claim, the paper's figure, ours by seed, and the word."""
    values = ", ".join(
        format(value, claim.form) if math.isfinite(value) else "diverged"
        for value in claim.values(found)
    )
    return [claim.name, claim.paper, values, claim.verdict(found)]
