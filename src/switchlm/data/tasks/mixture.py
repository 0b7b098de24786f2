"""Tasks by name or from a file of the user's, and their examples.

The tasks that have a name are in `registry.py`; records come from `files.py`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from switchlm.data.order import derive_key
from switchlm.data.tasks import files
from switchlm.data.tasks.registry import MIXTURES, TASKS
from switchlm.data.tasks.task import Example, Task, make_examples
from switchlm.errors import ConfigError, DataError, nearest

__all__ = [
    "Example",
    "Task",
    "TaskOptions",
    "find_task",
    "find_tasks",
    "read_examples",
    "spread_evenly",
]

EVERYTHING = "all"  # the split that is all of a file
_HELD_OUT = 10  # one in so many examples of a single file is kept for validation


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """How to read a file that is no named task.

    input_column, target_column: their names.
    template, target_template: texts with `{column}` in them, instead of a bare column.
    metrics: the first decides.
    """

    input_column: str = "input"
    target_column: str = "target"
    template: str | None = None
    target_template: str | None = None
    metrics: tuple[str, ...] = ("exact_match", "f1")


def find_task(name: str, options: TaskOptions | None = None) -> Task:
    """Return the task of that name, or one over the file or folder of that path.

    Raises ConfigError for an unknown name (naming the near miss), for the name of a mixture, and
    for options given to a named task.
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
    """Return the tasks of those names, mixtures spelt out, each once.

    Other files of the same name get a number.
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
    """Return all examples of a split: `train`, `validation` or `test`, or how a file's name begins.

    where: a folder or a file; None reads the task's own path, or else the hub. One file has no
        splits: `all` is the whole of it, `validation` a tenth of its examples chosen by what they
        say, `train` the rest.

    Raises DataError for what cannot be read, and for an empty split.
    """
    place = task.path if where is None else Path(where)
    if place is None:
        examples = list(make_examples(task, files.read_hub(task, split), f"{task.hub}"))
    else:
        examples = [
            example
            for path in files.find_files(task, split, place)
            for example in make_examples(task, files.read(task, path), repr(str(path)))
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
    """Return at most `limit` examples, from all over: files are often sorted by label or text."""
    if limit is None or limit >= len(examples):
        return examples
    return [examples[number * len(examples) // limit] for number in range(limit)]


def _split_of(example: Example) -> str:
    """Return where an example of a single file belongs; examples of one identity stay together."""
    held_out = derive_key("task", example.identity) % _HELD_OUT == 0
    return "validation" if held_out else "train"
