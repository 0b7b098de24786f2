"""Records of tasks, out of files or off the hub.

Files are TSV, CSV, JSON, JSONL, Parquet, or pairs of lines. A folder may hold one task, or a folder
for each of several. The file of a split is recognised by its name: `train.tsv`, `dev.jsonl`,
`train-v1.1.json`, `val.jsonl.zst`. The hub needs the optional package `datasets`.
"""

import csv
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from switchlm.data.tasks.task import Record, Task
from switchlm.data.text.readers import open_stream
from switchlm.errors import DataError, MissingExtraError

# The file of line pairs that holds the inputs; its `.target` holds the targets.
_SOURCE = "source"
KINDS = ("tsv", "csv", "jsonl", "ndjson", "json", "parquet", _SOURCE)
_NAMES = {
    "train": ("train",),
    "validation": ("validation", "dev", "val", "valid"),
    "test": ("test",),
}
_SHARD = re.compile(r"-\d+-of-\d+$")


def read(task: Task, path: Path) -> Iterator[Record]:
    """Yield the records of one file."""
    try:
        yield from _read_file(path, task)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"Cannot read {str(path)!r}: {error}") from None


def find_files(task: Task, split: str, where: Path) -> list[Path]:
    """Return the file of a split, or its shards in order; where: a folder, or the one file.

    Raises DataError where there is none, or where several may be it.
    """
    if where.is_file():
        if _kind(where) is None:
            raise DataError(
                f"Cannot tell what kind of file {str(where)!r} is; a task's file ends in "
                f"{', '.join('.' + kind for kind in KINDS)}."
            )
        return [where]
    if not where.is_dir():
        raise DataError(f"There is no file or folder {str(where)!r} for the task {task.name!r}.")
    folder = _folder_of(task, where)
    files = sorted(path for path in folder.iterdir() if path.is_file() and _kind(path))
    names = (task.files[split],) if split in task.files else _NAMES.get(split, (split,))
    for fits in (str.__eq__, str.startswith, _has_part):
        for name in names:
            found = [path for path in files if fits(_stem(path), name)]
            if len(found) > 1 and not all(_SHARD.search(_stem(path)) for path in found):
                raise DataError(
                    f"Several files in {str(folder)!r} may be the {split} split of "
                    f"{task.name!r}: {', '.join(path.name for path in found)}. Give one of them."
                )
            if found:
                return found
    listed = ", ".join(path.name for path in files) or "no file of a known kind"
    raise DataError(
        f"There is no {split} split of {task.name!r} in {str(folder)!r}: its name would begin with "
        f"{' or '.join(names)}. The folder has: {listed}."
    )


def _folder_of(task: Task, where: Path) -> Path:
    """Return the task's own folder in `where`, or `where` itself if it has none."""
    wanted = {_plain(task.folder), _plain(task.name)} - {""}
    for path in sorted(where.iterdir()):
        if path.is_dir() and _plain(path.name) in wanted:
            return path
    return where


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _has_part(stem: str, name: str) -> bool:
    return name in re.split(r"[-_.]", stem)


def _kind(path: Path) -> str | None:
    kinds = path.name.lower().split(".")[1:]
    if kinds[-1:] in (["gz"], ["zst"]):
        kinds.pop()
    return kinds[-1] if kinds and kinds[-1] in KINDS else None


def _stem(path: Path) -> str:
    """Return the lower-case name up to the kind of file."""
    return path.name.lower().rpartition(f".{_kind(path)}")[0]


def _read_file(path: Path, task: Task) -> Iterator[Record]:
    kind = _kind(path)
    if kind == "parquet":
        yield from _parquet(path)
        return
    text = _text(path)
    if kind in ("json", "jsonl", "ndjson"):
        yield from _json(text, path, by_line=kind != "json")
    elif kind == _SOURCE:
        yield from _pairs(text, path)
    else:
        yield from _table(text, path, task, kind == "csv")


def _text(path: Path) -> str:
    with open_stream(path, path.name.lower().split(".")) as stream:
        try:
            return stream.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"The file {str(path)!r} is not UTF-8: {error}") from None


def _json(text: str, path: Path, *, by_line: bool) -> Iterator[Record]:
    """Yield records of a file of one a line, or of one list, which may stand under one key."""
    if not by_line:
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError) as error:
            if not str(error).startswith("Extra data"):
                raise DataError(f"The file {str(path)!r} is not JSON: {error}") from None
            whole = None  # one record a line, under the name .json
        if whole is not None:
            if isinstance(whole, dict):
                lists = [value for value in whole.values() if isinstance(value, list)]
                whole = lists[0] if len(lists) == 1 else [whole]
            yield from (_record(one, f"Item {n} of {path}") for n, one in enumerate(whole, 1))
            return
    for number, line in enumerate(io.StringIO(text), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"Line {number} of {str(path)!r} is not JSON: {error}") from None
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
            "each line of the one belongs to a line of the other."
        )
    for source, target in zip(sources, targets, strict=True):
        yield {"source": source, "target": target}


def _table(text: str, path: Path, task: Task, commas: bool) -> Iterator[Record]:
    """Yield the rows of a table by the names in its first line, or in `task.header`.

    Tab-separated files know no quotes, as GLUE's: a quotation mark is part of the text.
    """
    lines: Iterator[Sequence[str]]
    if commas:
        lines = csv.reader(io.StringIO(text, newline=""))
    else:
        lines = (line.split("\t") for line in _lines(text) if line)
    try:
        first = [cell.strip() for cell in next(lines, [])]
        headless = not {task.columns.get(cell, cell) for cell in first} & set(task.needed)
        names = list(task.header) if headless and task.header else first
        rows = chain([first], lines) if names is not first else lines
        for number, cells in enumerate(rows, 1 if names is not first else 2):
            if len(cells) == len(names):
                yield dict(zip(names, cells, strict=True))
            elif cells and not task.ragged:
                raise DataError(
                    f"Row {number} of {str(path)!r} has {len(cells)} columns, and there are names "
                    f"for {len(names)}: {', '.join(names)}."
                )
    except csv.Error as error:
        raise DataError(f"The file {str(path)!r} is no CSV: {error}") from None


def _lines(text: str) -> list[str]:
    """Cut at line ends alone: a text may hold the other characters that `splitlines` cuts at."""
    return text.removesuffix("\n").replace("\r\n", "\n").split("\n")


def _parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "data", f"Reading {path.name}") from None
    try:
        for rows in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            yield from rows.to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"Cannot read the Parquet file {str(path)!r}: {error}") from None


def read_hub(task: Task, split: str) -> Iterator[Record]:
    """Yield the records of a split of `task.hub`.

    Raises MissingExtraError without the extra, DataError for what the hub does not have or where it
    cannot be reached.
    """
    if task.hub is None:
        raise DataError(f"The task {task.name!r} is not on the hub: give its files with --data.")
    try:
        import datasets
    except ImportError:
        raise MissingExtraError(
            "datasets", "hub", f"Reading the task {task.name!r} from the hub (or give --data PATH)"
        ) from None
    location, _, revision = task.hub.partition("@")
    name, _, config = location.partition(":")
    theirs = task.hub_splits.get(split, split)
    # A branch of Parquet files has a folder, and no description, for each configuration.
    part = {"data_dir": config, "revision": revision} if revision else {"name": config or None}
    try:
        rows = datasets.load_dataset(name, split=theirs, **part)
        for row in rows:
            yield dict(row)
    # The packages behind `datasets` raise errors of their own kinds.
    except Exception as error:
        raise DataError(
            f"Cannot read the {split} split of {task.name!r} from the hub ({task.hub}): {error}. "
            "Without a way to the hub, give its files with --data PATH."
        ) from None
