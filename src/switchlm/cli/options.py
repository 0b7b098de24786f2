"""What several commands have in common: options, and how they read models, texts and tasks."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from switchlm.cli.expert_memory import parse_size
from switchlm.errors import CheckpointError, ConfigError, DataError, nearest

if TYPE_CHECKING:
    from switchlm.data.batch import Batch
    from switchlm.data.pretraining.loader import Loader
    from switchlm.data.tasks.task import Task
    from switchlm.data.text.tokenizer import Tokenizer
    from switchlm.model.transformer import SwitchTransformer

LONGEST_INPUT = 4096  # tokens; attention takes memory with the square of it

Model = Annotated[str, typer.Option(help="A run, a model folder, or a name on the hub.")]
Device = Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:1, ...")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Data = Annotated[
    list[str] | None,
    typer.Option(help="Text: [name=]path[:weight], python:stdlib, ...; may be repeated."),
]
Batches = Annotated[int, typer.Option(min=1, help="Read at most so many batches of text.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Rows in a batch.")]
InputLength = Annotated[
    int | None, typer.Option(min=1, help="Tokens in a row of inputs; the run's, or 512.")
]


def note(message: str) -> None:
    """Say something beside the result."""
    typer.echo(f"Note: {message}", err=True)


def find_device(name: str) -> Any:
    """Return the torch.device of that name; `auto` is the GPU if there is one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"Cannot compute on the device {name!r}: {reason}") from None
    return torch.device(name)


def open_model(
    name: str, device: str = "auto", expert_memory: str | None = None
) -> "tuple[SwitchTransformer, Tokenizer]":
    """Load a model that must have a tokenizer.

    expert_memory: a size such as 4GB, with which experts stay on the disk; None loads all.
    """
    if expert_memory is not None:
        model, tokenizer = _open_offloaded(name, device, parse_size(expert_memory))
    else:
        place = find_device(device)
        from switchlm.huggingface.load import load

        model, tokenizer = load(name, device=place, report=note)
    if tokenizer is None:
        raise CheckpointError(
            f"The model {name!r} has no tokenizer.json, so there is no telling its tokens from "
            "text. Copy the one it was trained with into its folder."
        )
    return model, tokenizer


def _open_offloaded(
    name: str, device: str, expert_memory: int
) -> "tuple[SwitchTransformer, Tokenizer | None]":
    if device not in ("auto", "cpu"):
        raise ConfigError(
            f"--expert-memory reads experts into main memory, and {device!r} is no CPU. Leave "
            "--device out, or --expert-memory."
        )
    from switchlm.compression.offload import load_offloaded

    loaded = load_offloaded(name, expert_memory, report=note)
    return loaded.model, loaded.tokenizer


def read_text(argument: str | None) -> str:
    """Return the text of the argument, or of standard input where that is left out or `-`."""
    if argument is not None and argument != "-":
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            raise DataError("The text is not valid UTF-8.") from None
        return argument
    if sys.stdin.isatty():
        raise DataError("There is no text: give it as an argument, or pipe it in.")
    try:
        return sys.stdin.buffer.read().decode("utf-8").rstrip("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"The text on standard input is not valid UTF-8: {error}") from None


def read_batches(
    name: str,
    tokenizer: "Tokenizer",
    data: list[str] | None,
    *,
    batches: int,
    batch_size: int | None,
    input_length: int | None,
) -> "tuple[list[Batch], tuple[str, ...]]":
    """Return masked text and the names of its sources.

    It is all of the text of `data`, or, where that is left out, what the run of that name held out
    in training. Rows are as in that run, if it is one.
    """
    loader = open_text(
        name,
        tokenizer,
        data,
        held_out_share=0.0,
        batch_size=batch_size,
        input_length=input_length,
    )
    read = [loader.batch(step) for step in range(batches)] if data else loader.held_out(batches)
    return read, loader.sources


def open_text(
    name: str,
    tokenizer: "Tokenizer",
    data: list[str] | None,
    *,
    held_out_share: float,
    batch_size: int | None,
    input_length: int | None,
) -> "Loader":
    """Return masked text: `data`, so much of it held out, or the run's own, as it held it out."""
    from switchlm.config import from_mapping, read_yaml
    from switchlm.data.config import DataConfig
    from switchlm.data.pretraining.loader import open_data
    from switchlm.training.run_folder import RunFolder

    run = RunFolder(Path(name)).config
    # A run on tasks has no such section, and others that are of no concern here.
    values = read_yaml(run).get("data", {}) if run.is_file() else {}
    config = from_mapping(DataConfig, values, "data")
    stated = {"batch_size": batch_size, "input_length": input_length}
    changes: dict[str, Any] = {key: value for key, value in stated.items() if value is not None}
    if data:
        changes |= {"sources": tuple(data), "held_out_share": held_out_share}
    elif not config.sources:
        raise DataError(
            f"There is no text: {name!r} is no run whose held-out text could be used. Give some "
            "with --data."
        )
    if input_length is not None:
        changes["target_length"] = None
    return open_data(
        dataclasses.replace(config, **changes), seed=0, tokenizer=tokenizer, report=note
    )


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
    from switchlm.data.tasks.mixture import TaskOptions, find_tasks
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
