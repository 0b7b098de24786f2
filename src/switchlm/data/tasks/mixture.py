"""Find tasks by name or file, and read their examples from files or from the hub.

The named tasks are in `tasks.yaml`. A folder may hold one task, or a folder for each of several.
The file of a split is recognised by its name: `train.tsv`, `dev.jsonl`, `train-v1.1.json`,
`val.jsonl.zst`. The hub needs the optional package `datasets`.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from switchlm.data.order import derive_key
from switchlm.data.tasks.readers import KINDS, kind_of, read_records
from switchlm.data.tasks.registry import MIXTURES, TASKS
from switchlm.data.tasks.task import Example, ExampleMaker, Record, Task
from switchlm.errors import ConfigError, DataError, nearest, require
from switchlm.files import Report

EVERYTHING = "all"  # the split with all examples of a file
_HELD_OUT = 10  # one in ten examples of a single file is for validation
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
    labels: all possible targets, if they are few; a number in the column is the place of one.
    metrics: the first chooses the best checkpoint.
    skip_empty: leave out records with an empty input or target, or without a label; of named tasks
        too.
    """

    input_column: str = "input"
    target_column: str = "target"
    template: str | None = None
    target_template: str | None = None
    labels: tuple[str, ...] | None = None
    metrics: tuple[str, ...] = ("exact_match", "f1")
    skip_empty: bool = False


def find_task(name: str, options: TaskOptions | None = None) -> Task:
    """Return the named task, or a task for the file or folder with that path.

    Raises ConfigError for an unknown name, for the name of a mixture, and for options of a named
    task.
    """
    chosen = options or TaskOptions()
    if name in TASKS:
        if replace(chosen, skip_empty=False) != TaskOptions():
            raise ConfigError(
                f"The task {name!r} has its own columns, template and metrics; those options are "
                "for your own file, as in --task path/to/file.jsonl."
            )
        return replace(TASKS[name], skip_empty=True) if chosen.skip_empty else TASKS[name]
    if name in MIXTURES:
        raise ConfigError(f"{name!r} is a mixture of {', '.join(MIXTURES[name])}: name one task.")
    path = Path(name)
    if not path.exists():
        raise ConfigError(
            f"There is no task, file or folder {name!r}.{nearest(name, [*TASKS, *MIXTURES])}"
        )
    return Task(
        name=path.resolve().name.split(".")[0] or name,
        input=chosen.template or f"{{{chosen.input_column}}}",
        target=chosen.target_template or f"{{{chosen.target_column}}}",
        labels=chosen.labels,
        metrics=chosen.metrics,
        skip_empty=chosen.skip_empty,
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


def read_examples(
    task: Task,
    split: str,
    where: Path | str | None = None,
    report: Report = lambda line: None,
) -> list[Example]:
    """Return all examples of a split: train, validation, test, or the beginning of a file name.

    where: a folder or a file; None reads the task's own path, or else the hub. Of a single file
        `validation` is a tenth of the examples, chosen by a hash of their identity, one identity
        at least, `train` the rest, and `all` everything.
    report: called with a line on records that are left out, and on empty texts, if there are any:
        those of the split, or of all of a single file.

    Raises DataError for files that cannot be read or are mostly unreadable, and for an empty split.
    """
    return read_splits(task, (split,), where, report)[split]


def read_splits(
    task: Task,
    splits: Iterable[str],
    where: Path | str | None = None,
    report: Report = lambda line: None,
) -> dict[str, list[Example]]:
    """Return all examples of several splits, as of `read_examples`; a single file is read once."""
    place = task.path if where is None else Path(where)
    is_file = place is not None and place.is_file()
    read: dict[str, tuple[list[Example], str]] = {}
    parts: dict[str, list[Example]] = {}
    found = {}
    for split in splits:
        part = EVERYTHING if is_file else split
        if part not in read:
            read[part] = _read(task, part, place)
        examples, said = read[part]
        why = f"there is no example in {str(place or task.hub)!r}"
        if examples and is_file and split != EVERYTHING:
            parts = parts or _split(examples)
            if split not in parts:
                why = f"a single file has {', '.join(parts)} and {EVERYTHING}"
            elif not parts[split]:
                why += f" but {len(examples):,} times the same"
            examples = parts.get(split, [])
        if not examples:
            raise DataError(f"The {split} split of {task.name!r} is empty: {why}.{said}")
        found[split] = examples
    for part, (_, said) in read.items():
        if said:
            report(f"{place if is_file else f'{task.name}, {part}'}:{said}")
    return found


def _read(task: Task, split: str, place: Path | None) -> tuple[list[Example], str]:
    """Return the examples of a split or a single file, and sentences on what is left out or empty.

    place: a folder or a file; None: the hub.
    """
    maker = ExampleMaker(task)
    if place is None:
        examples = list(maker.make(_read_hub(task, split), f"{task.hub}"))
    else:
        examples = [
            example
            for path in _find_files(task, split, place)
            for example in maker.make(read_records(task, path, maker.leave), repr(str(path)))
        ]
    maker.check(str(place or task.hub))
    return examples, maker.describe()


def spread_evenly(examples: Sequence[Example], limit: int | None) -> Sequence[Example]:
    """Return at most `limit` evenly spaced examples: files are often sorted by label or text."""
    if limit is None or limit >= len(examples):
        return examples
    return [examples[number * len(examples) // limit] for number in range(limit)]


def _split(examples: Sequence[Example]) -> dict[str, list[Example]]:
    """Return the splits of a single file; examples of one identity are in the same."""
    keys = [derive_key("task", example.identity) for example in examples]
    different = set(keys)
    held_out = {key for key in different if key % _HELD_OUT == 0}
    if len(different) > 1 and held_out in (set(), different):
        held_out = {min(different)}
    found: dict[str, list[Example]] = {"train": [], "validation": []}
    for key, example in zip(keys, examples, strict=True):
        found["validation" if key in held_out else "train"].append(example)
    return found


def _find_files(task: Task, split: str, where: Path) -> list[Path]:
    """Return the file of a split, or its shards in order.

    where: a folder, or the file itself.

    Raises DataError if there is no file, or several match.
    """
    if where.is_file():
        if kind_of(where) is None:
            raise DataError(
                f"Unknown format of {str(where)!r}: a task's file ends in "
                f"{', '.join('.' + kind for kind in KINDS)}."
            )
        return [where]
    if not where.is_dir():
        raise DataError(f"There is no file or folder {str(where)!r} for the task {task.name!r}.")
    folder = _folder_of(task, where)
    files = sorted(path for path in folder.iterdir() if path.is_file() and kind_of(path))
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


def _stem(path: Path) -> str:
    """Return the lower-case name up to the kind of file."""
    return path.name.lower().rpartition(f".{kind_of(path)}")[0]


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
