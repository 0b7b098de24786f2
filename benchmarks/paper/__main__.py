"""The paper's tables and figures, measured at laptop scale, three seeds or more: `make paper`.

    python -m benchmarks.paper [table1 figure1 ...] [--seeds 0 1 2] [--data FOLDER] [--out FOLDER]
    python -m benchmarks.paper --steps 20 --seeds 0
    python -m benchmarks.paper --only-write

Does the runs of the tables that have no result below OUT yet, two at a time, one thread each, and
writes OUT/results.md. Once all runs of all tables are finished, docs/results.md and its pictures
are written too, and the results go to benchmarks/results/paper; --write does so before, and what is
missing is said. --steps cuts every run: a draft below /tmp, from which docs are never written.
--recorded reads benchmarks/results/paper in place of OUT. Fine-tuning and languages need FOLDER.
"""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from benchmarks.paper.page import complete, page
from benchmarks.paper.runs import Place, Run, with_needs
from benchmarks.paper.schedule import run_all
from benchmarks.paper.table import LEAST_SEEDS, Table

from benchmarks import harness

ROOT = Path(__file__).parents[2]
RECORD, DOCS = harness.RESULTS / "paper", ROOT / "docs"
TABLES = (
    "figure1", "figure1_long", "figure5", "table1", "table2", "table3", "table6", "table7",
    "table10", "table11", "appendix", "figure7", "table4", "table5",
)  # fmt: skip


def main() -> None:
    """Run what is asked for and not finished, and write what is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}; all")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: each table's own")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, help="default: runs/paper")
    parser.add_argument("--steps", type=int, help="of a draft: at most so many per run")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--only-write", action="store_true", help="run nothing")
    parser.add_argument("--write", action="store_true", help="write docs, whatever is missing")
    parser.add_argument("--recorded", action="store_true", help="run nothing, write what is kept")
    asked = parser.parse_args()
    unknown = [name for name in asked.tables if name not in TABLES]
    if unknown:
        parser.error(f"There is no {unknown[0]}; there are {', '.join(TABLES)}.")
    out = asked.out or (RECORD if asked.recorded else default_folder(asked.steps))
    place = Place(asked.data.resolve(), out.resolve(), asked.steps)
    tables = [load(name, asked.seeds) for name in TABLES]
    wanted = [table for table in tables if table.name in (asked.tables or TABLES)]
    if not (asked.only_write or asked.recorded):
        try:
            perform(wanted, place, asked.workers)
        except KeyboardInterrupt:
            raise SystemExit("Stopped; the next start goes on with what is not finished.") from None
    if asked.tables:
        print(page(wanted, place))
    has_pictures = find_spec("matplotlib") is not None
    if not has_pictures:
        print("matplotlib is not installed: no pictures are drawn, and docs/ stays as it is.")
    if not asked.recorded:
        write(tables, place, place.out, has_pictures)
    finished = asked.write or whole(tables, place)
    if asked.steps is None and has_pictures and finished:
        write(tables, place, DOCS, has_pictures)
        keep(tables, place)


def default_folder(steps: int | None) -> Path:
    """Return where runs are kept; drafts out of the way."""
    if steps is None:
        return ROOT / "runs" / "paper"
    return Path(tempfile.gettempdir()) / "switchlm-paper-draft"


def load(name: str, seeds: Sequence[int] | None = None) -> Table:
    """Return a table by the name of its file; seeds: in place of its own."""
    table = import_module(f"benchmarks.paper.{name}").TABLE
    assert isinstance(table, Table)
    return replace(table, seeds=tuple(seeds)) if seeds else table


def perform(tables: Sequence[Table], place: Place, workers: int) -> None:
    """Do the runs of all tables that can be measured here."""
    place.out.mkdir(parents=True, exist_ok=True)
    runs: list[Run] = []
    names: dict[str, str] = {}
    for table in tables:
        if reason := table.missing_data(place):
            print(f"{table.title}: not measured, {reason}.")
            continue
        table.prepare(place)
        for name, run in table.runs(place):
            runs.append(run)
            for one in with_needs([run]):
                label = name if one is run else f"{name}, what it starts from"
                names.setdefault(one.key, f"{table.name}: {label}, seed {run.seed}")
    run_all(list(with_needs(runs)), names, workers, lambda line: print(line, flush=True))


def write(tables: Sequence[Table], place: Place, folder: Path, pictures: bool) -> None:
    """Write the page, and the pictures of the tables that are finished."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.md").write_text(page(tables, place), encoding="utf-8")
    for table in tables if pictures else ():
        found = table.results(place)
        if table.picture is not None and complete(table, found):
            table.picture(found, folder / f"{table.name}.png")
    print(f"Written: {folder / 'results.md'}")


def whole(tables: Sequence[Table], place: Place) -> bool:
    """Whether all tables are finished, with enough seeds."""
    return all(
        len(table.seeds) >= LEAST_SEEDS and complete(table, table.results(place))
        for table in tables
    )


def keep(tables: Sequence[Table], place: Place) -> None:
    """Copy the results that docs/results.md comes from, and those alone, to where they are kept."""
    if place.out == RECORD:
        return
    shutil.rmtree(RECORD, ignore_errors=True)
    RECORD.mkdir(parents=True)
    for run in with_needs([run for table in tables for _, run in table.runs(place)]):
        if run.finished:
            shutil.copy(run.file, RECORD / run.file.name)


if __name__ == "__main__":
    main()
