"""Records of one file of a task: TSV, CSV, JSON, JSONL, Parquet, or pairs of lines.

A record that cannot be read is left out and counted, since one damaged line should not cost a file
of a million. Bytes that are not UTF-8 become surrogates; whether they matter is known when the
templates have chosen their columns (task.py).
"""

import codecs
import csv
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from switchlm.data.tasks.task import Record, Task
from switchlm.data.text.readers import open_stream, read_parquet
from switchlm.errors import DataError

# The file of line pairs that holds the inputs; its `.target` holds the targets.
_SOURCE = "source"
KINDS = ("tsv", "csv", "jsonl", "ndjson", "json", "parquet", _SOURCE)
_LONGEST_CELL = 2**31 - 1  # the most that the module csv takes on every system

Leave = Callable[[str], None]  # called with why a record cannot be read


def read_records(task: Task, path: Path, leave: Leave) -> Iterator[Record]:
    """Yield the records of one file; raises DataError for one that cannot be read at all."""
    kind = kind_of(path)
    try:
        if kind == "parquet":
            yield from read_parquet(path)
        elif kind in ("json", "jsonl", "ndjson"):
            yield from _json(_text(path), path, leave, by_line=kind != "json")
        elif kind == _SOURCE:
            yield from _pairs(_text(path), path)
        elif kind == "csv":
            yield from _table(_rows(_text(path), path), path, task, leave)
        else:
            # No quoting, as in GLUE: a quotation mark is part of the text.
            rows = (line.split("\t") for line in _lines(_text(path)))
            yield from _table(rows, path, task, leave)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"Cannot read {str(path)!r}: {error}") from None


def kind_of(path: Path) -> str | None:
    """Return which of KINDS a file is, by its name."""
    kinds = path.name.lower().split(".")[1:]
    if kinds[-1:] in (["gz"], ["zst"]):
        kinds.pop()
    return kinds[-1] if kinds and kinds[-1] in KINDS else None


def _text(path: Path) -> str:
    with open_stream(path, path.name.lower().split(".")) as stream:
        raw = stream.read()
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # as spreadsheets write it
        return raw.decode("utf-16", errors="replace")
    return raw.decode("utf-8-sig", errors="surrogateescape")


def _json(text: str, path: Path, leave: Leave, *, by_line: bool) -> Iterator[Record]:
    """Yield records of a file with one per line, or with one list, perhaps under a key."""
    if not by_line:
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            if not str(error).startswith("Extra data"):
                raise DataError(f"The file {str(path)!r} is not JSON: {error}") from None
            content = None  # a .json file with one record per line
        if content is not None:
            if isinstance(content, dict):
                lists = [value for value in content.values() if isinstance(value, list)]
                content = lists[0] if len(lists) == 1 else [content]
            yield from (_record(one, f"Item {n} of {path}") for n, one in enumerate(content, 1))
            return
    for number, line in enumerate(io.StringIO(text), 1):
        if line.strip():
            try:
                value = json.loads(line, strict=False)
            except (ValueError, RecursionError) as error:
                leave(f"line {number} of {str(path)!r} is not JSON: {error}")
            else:
                yield _record(value, f"Line {number} of {path}")


def _record(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{where} is not a JSON object with named columns, but {value!r:.40}.")
    return value


def _pairs(text: str, path: Path) -> Iterator[Record]:
    """Yield `source` and `target` of two files of the same number of lines."""
    other = path.with_name(re.sub(rf"\.{_SOURCE}(?=\.|$)", ".target", path.name))
    if not other.is_file():
        raise DataError(f"Beside {str(path)!r} there is no {other.name!r} with the targets.")
    sources, targets = _lines(text), _lines(_text(other))
    if len(sources) != len(targets):
        raise DataError(
            f"{path.name!r} has {len(sources):,} lines and {other.name!r} {len(targets):,}, but "
            "each line needs its target on the same line."
        )
    for source, target in zip(sources, targets, strict=True):
        yield {"source": source, "target": target}


def _table(
    lines: Iterator[Sequence[str]], path: Path, task: Task, leave: Leave
) -> Iterator[Record]:
    """Yield the rows of a table by the names in its first line, or in `task.header`."""
    first = [cell.strip() for cell in next(lines, [])]
    headless = not {task.columns.get(cell, cell) for cell in first} & set(task.needed)
    names = list(task.header) if headless and task.header else first
    rows = chain([first], lines) if names is not first else lines
    for number, cells in enumerate(rows, 1 if names is not first else 2):
        if len(cells) == len(names):
            yield dict(zip(names, cells, strict=True))
        elif any(map(str.strip, cells)) and not task.ragged:
            leave(
                f"row {number} of {str(path)!r} has {len(cells)} columns, and there are names for "
                f"{len(names)}: {', '.join(names)}"
            )


def _rows(text: str, path: Path) -> Iterator[list[str]]:
    """Yield the rows of a CSV; DataError if a quotation mark makes the rest one cell."""
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""))
    row: list[str] = []
    try:
        for row in reader:
            yield row
    except csv.Error as error:
        raise DataError(f"The file {str(path)!r} is no CSV: {error}") from None
    if row and "\n" in row[-1] and text.endswith(row[-1]):
        raise DataError(
            f"In {str(path)!r} a quotation mark opens a cell that none closes: {row[-1][:60]!r}. "
            "The rest of the file would be one cell. Close it, or quote the cell and write the "
            'mark twice ("").'
        )


def _lines(text: str) -> list[str]:
    """Cut at line ends alone: a text may hold the other characters that `splitlines` cuts at."""
    return text.removesuffix("\n").replace("\r\n", "\n").split("\n")
