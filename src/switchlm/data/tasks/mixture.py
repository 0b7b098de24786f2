"""Find tasks by name or file, and read their examples from files or from the hub.

The named tasks are in `tasks.yaml`. Files are TSV, CSV, JSON, JSONL, Parquet, or pairs
of lines. A folder may hold one task, or a folder for each of several. The file of a split is
recognised by its name: `train.tsv`, `dev.jsonl`, `train-v1.1.json`, `val.jsonl.zst`. The hub needs
the optional package `datasets`.
"""

import csv
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from switchlm.data.order import derive_key
from switchlm.data.tasks.registry import MIXTURES, TASKS
from switchlm.data.tasks.task import Example, Record, Task, make_examples
from switchlm.data.text.readers import open_stream, read_parquet
from switchlm.errors import ConfigError, DataError, nearest, require

EVERYTHING = "all"  # the split with all examples of a file
_HELD_OUT = 10  # one in ten examples of a single file is for validation
# The file of line pairs that holds the inputs; its `.target` holds the targets.
_SOURCE = "source"
KINDS = ("tsv", "csv", "jsonl", "ndjson", "json", "parquet", _SOURCE)
_NAMES = {
    "train": ("train",),
    "validation": ("validation", "dev", "val", "valid"),
    "test": ("test",),
}
_SHARD = re.compile(r"-\d+-of-\d+$")


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """How to read a file that is not a named task.

    input_column, target_column: names of the columns.
    template, target_template: texts with `{column}` in them, instead of a single column.
    metrics: the first chooses the best checkpoint.
    """

    input_column: str = "input"
    target_column: str = "target"
    template: str | None = None
    target_template: str | None = None
    metrics: tuple[str, ...] = ("exact_match", "f1")


def find_task(name: str, options: TaskOptions | None = None) -> Task:
    """Return the named task, or a task for the file or folder with that path.

    Raises ConfigError for an unknown name, for the name of a mixture, and for options of a named
    task.
    """
    if name in TASKS:
        if options not in (None, TaskOptions()):
            raise ConfigError(
                f"The task {name!r} has its own columns, template and metrics; those options are "
                "for a file of yours, as in --task path/to/file.jsonl."
            )
        return TASKS[name]
    if name in MIXTURES:
        raise ConfigError(f"{name!r} is a mixture of {', '.join(MIXTURES[name])}: name one task.")
    path = Path(name)
    if not path.exists():
        raise ConfigError(
            f"There is no task, file or folder {name!r}.{nearest(name, [*TASKS, *MIXTURES])}"
        )
    chosen = options or TaskOptions()
    return Task(
        name=path.resolve().name.split(".")[0] or name,
        input=chosen.template or f"{{{chosen.input_column}}}",
        target=chosen.target_template or f"{{{chosen.target_column}}}",
        metrics=chosen.metrics,
        path=path,
    )


def find_tasks(names: Iterable[str], options: TaskOptions | None = None) -> tuple[Task, ...]:
    """Return the tasks with these names, those of mixtures included, each once.

    Of different files with the same name, later ones get a number.
    """
    found: dict[str, Task] = {}
    for one in (part for name in names for part in MIXTURES.get(name, (name,))):
        task = find_task(one, options)
        if task in found.values():
            continue
        new, number = task.name, 2
        while new in found:
            new, number = f"{task.name}-{number}", number + 1
        found[new] = replace(task, name=new) if new != task.name else task
    return tuple(found.values())


def read_examples(task: Task, split: str, where: Path | str | None = None) -> list[Example]:
    """Return all examples of a split: train, validation, test, or the beginning of a file name.

    where: a folder or a file; None reads the task's own path, or else the hub. Of a single file
        `validation` is a tenth of the examples, chosen by a hash of their identity, `train` the
        rest, and `all` everything.

    Raises DataError for files that cannot be read, and for an empty split.
    """
    place = task.path if where is None else Path(where)
    if place is None:
        examples = list(make_examples(task, _read_hub(task, split), f"{task.hub}"))
    else:
        examples = [
            example
            for path in _find_files(task, split, place)
            for example in make_examples(task, _read(task, path), repr(str(path)))
        ]
        if place.is_file() and split != EVERYTHING:
            examples = [example for example in examples if _split_of(example) == split]
    if not examples:
        raise DataError(
            f"The {split} split of {task.name!r} is empty: there is no example in "
            f"{str(place or task.hub)!r}."
        )
    return examples


def spread_evenly(examples: Sequence[Example], limit: int | None) -> Sequence[Example]:
    """Return at most `limit` evenly spaced examples: files are often sorted by label or text."""
    if limit is None or limit >= len(examples):
        return examples
    return [examples[number * len(examples) // limit] for number in range(limit)]


def _split_of(example: Example) -> str:
    """Return the split of an example of a single file; the same for examples of one identity."""
    held_out = derive_key("task", example.identity) % _HELD_OUT == 0
    return "validation" if held_out else "train"


def _read(task: Task, path: Path) -> Iterator[Record]:
    """Yield the records of one file."""
    kind = _kind(path)
    try:
        if kind == "parquet":
            yield from read_parquet(path)
        elif kind in ("json", "jsonl", "ndjson"):
            yield from _json(_text(path), path, by_line=kind != "json")
        elif kind == _SOURCE:
            yield from _pairs(_text(path), path)
        else:
            yield from _table(_text(path), path, task, kind == "csv")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"Cannot read {str(path)!r}: {error}") from None


def _find_files(task: Task, split: str, where: Path) -> list[Path]:
    """Return the file of a split, or its shards in order.

    where: a folder, or the file itself.

    Raises DataError if there is no file, or several match.
    """
    if where.is_file():
        if _kind(where) is None:
            raise DataError(
                f"Unknown format of {str(where)!r}: a task's file ends in "
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


def _text(path: Path) -> str:
    with open_stream(path, path.name.lower().split(".")) as stream:
        try:
            return stream.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"The file {str(path)!r} is not UTF-8: {error}") from None


def _json(text: str, path: Path, *, by_line: bool) -> Iterator[Record]:
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
            "each line needs its target on the same line."
        )
    for source, target in zip(sources, targets, strict=True):
        yield {"source": source, "target": target}


def _table(text: str, path: Path, task: Task, commas: bool) -> Iterator[Record]:
    """Yield the rows of a table by the names in its first line, or in `task.header`.

    Tab-separated files have no quoting, as in GLUE: a quotation mark is part of the text.
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


def _read_hub(task: Task, split: str) -> Iterator[Record]:
    """Yield the records of a split of `task.hub`.

    Raises MissingExtraError without the extra, DataError if the dataset does not exist or the hub
    cannot be reached.
    """
    if task.hub is None:
        raise DataError(f"The task {task.name!r} is not on the hub: give its files with --data.")
    purpose = f"Reading the task {task.name!r} from the hub (or give --data PATH)"
    datasets = require("datasets", "hub", purpose)
    location, _, revision = task.hub.partition("@")
    name, _, config = location.partition(":")
    theirs = task.hub_splits.get(split, split)
    # A branch of Parquet files has a folder, and no description, for each configuration.
    part = {"data_dir": config, "revision": revision} if revision else {"name": config or None}
    try:
        rows = datasets.load_dataset(name, split=theirs, **part)
        for row in rows:
            yield dict(row)
    # The dependencies of `datasets` raise errors of many classes.
    except Exception as error:
        raise DataError(
            f"Cannot read the {split} split of {task.name!r} from the hub ({task.hub}): {error}. "
            "Without access to the hub, give its files with --data PATH."
        ) from None
