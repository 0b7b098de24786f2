"""Options of the verbs that take tasks, and how these name their data."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from switchlm.errors import ConfigError, nearest

if TYPE_CHECKING:
    from switchlm.data.task import Task

Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--task", help="A task or mixture by name, or a file or folder of yours; may be repeated."
    ),
]
InputColumn = Annotated[str, typer.Option(help="Of a file of yours: the column to read.")]
TargetColumn = Annotated[str, typer.Option(help="Of a file of yours: the column to write.")]
Template = Annotated[
    str | None,
    typer.Option(help="Of a file of yours: the input, as in 'question: {question} text: {text}'."),
]
TargetTemplate = Annotated[
    str | None, typer.Option(help="Of a file of yours: the target, as in '{answers.text}'.")
]
Metrics = Annotated[
    list[str] | None,
    typer.Option("--metric", help="Of a file of yours: exact_match, f1, rouge2, ...; repeatable."),
]


def find(
    names: Sequence[str],
    *,
    input_column: str,
    target_column: str,
    template: str | None,
    target_template: str | None,
    metrics: Sequence[str] | None,
) -> "tuple[Task, ...]":
    """Return the tasks of those names; raises ConfigError where the options do not fit them."""
    from switchlm.data.tasks import TaskOptions, find_tasks
    from switchlm.evaluation.metrics import find_metric

    for metric in metrics or ():
        find_metric(metric)
    options = TaskOptions(
        input_column=input_column,
        target_column=target_column,
        template=template,
        target_template=target_template,
        **({"metrics": tuple(metrics)} if metrics else {}),
    )
    return find_tasks(names, options)


def places(tasks: "Sequence[Task]", data: Sequence[str] | None) -> dict[str, Path | None]:
    """Return where each task's examples are, None for the hub; data: `PATH` or `TASK=PATH`.

    A bare path is every named task's, which may have a folder of its own in it.
    """
    found: dict[str, Path | None] = {task.name: task.path for task in tasks}
    named = [task.name for task in tasks if task.path is None]
    for text in data or ():
        name, equals, path = text.partition("=")
        if not equals or os.path.exists(text):
            if not named:
                raise ConfigError(f"--data {text!r} is for no task here: --task is a file itself.")
            found.update(dict.fromkeys(named, Path(text)))
        elif name in found:
            found[name] = Path(path)
        else:
            raise ConfigError(f"--data {text!r} is for no task here.{nearest(name, found)}")
    return found
