"""switchlm compress: fewer bits per weight, fewer experts, and what that costs on a text."""

import dataclasses
import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from switchlm.cli import options
from switchlm.cli.options import (
    Batches,
    BatchSize,
    Data,
    InputLength,
    Json,
    Model,
    note,
    open_text,
)
from switchlm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from switchlm.data.text.tokenizer import Tokenizer
    from switchlm.recipes.compress import Compressed, Plan, Texts

HELD_OUT = 0.2  # of the documents, on which the loss is measured
TARGET_LENGTH = 128  # tokens of a task's answers


class What(StrEnum):
    experts = "experts"
    all = "all"


class By(StrEnum):
    load = "load"
    gradient = "gradient"


def compress(
    model: Model,
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    bits: Annotated[int | None, typer.Option(help="Bits a weight: 8 or 4.")] = None,
    group_size: Annotated[
        int, typer.Option(help="Of 4 bits: so many inputs share a scale (32, 64, 128 or 256).")
    ] = 64,
    what: Annotated[
        What,
        typer.Option(help="Experts, or all: attention, dense layers and the vocabulary too."),
    ] = What.experts,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Fit the codes to the text (GPTQ).")
    ] = False,
    keep_experts: Annotated[
        int | None, typer.Option(help="Keep so many experts per layer, those that matter most.")
    ] = None,
    by: Annotated[
        By, typer.Option(help="What matters: tokens taken, or the gradient of the loss.")
    ] = By.load,
    merge_experts: Annotated[
        int | None, typer.Option(help="Merge experts that are alike, to so many a layer.")
    ] = None,
    data: Data = None,
    task: options.Tasks = None,
    batches: Batches = 16,
    batch_size: BatchSize = None,
    input_length: InputLength = None,
    as_json: Json = False,
) -> None:
    """Make a model smaller: fewer bits per weight, fewer experts.

    With text (--data, --task, or the run's own) the loss is measured before and after every step,
    on documents that the steps do not see. --bits alone, of models of any size, needs no text and
    is measured where text is named.
    """
    from switchlm.huggingface.quantised import Quantisation
    from switchlm.recipes.compress import Plan, quantise_folder
    from switchlm.recipes.compress import compress as recipe

    if bits not in (None, 8, 4):
        raise ConfigError(f"--bits is {bits}; weights have 8 or 4 bits.")
    quantisation = None
    if bits is not None:
        quantisation = Quantisation(
            bits=8 if bits == 8 else 4, group_size=group_size, what=what.value
        )
    plan = Plan(
        keep_experts=keep_experts,
        by=by.value,
        merge_experts=merge_experts,
        quantisation=quantisation,
        calibrate=calibrate,
    )
    if quantisation is not None and not (plan.needs_text or data or task):
        done = quantise_folder(model, out, quantisation, report=note)
    else:

        def read(tokenizer: "Tokenizer") -> "Texts":
            if task:
                return _tasks(task, data, tokenizer, batches, batch_size, input_length)
            return _text(model, data, tokenizer, batches, batch_size, input_length)

        done = recipe(model, out, plan, read, report=note)
    _present(done, plan, out, as_json)


def _text(
    model: str,
    data: list[str] | None,
    tokenizer: "Tokenizer",
    batches: int,
    batch_size: int | None,
    input_length: int | None,
) -> "Texts":
    """Return batches of text to fit to, and others to measure on."""
    from switchlm.recipes.compress import Texts

    loader = open_text(
        model,
        tokenizer,
        data,
        held_out_share=HELD_OUT,
        batch_size=batch_size,
        input_length=input_length,
    )
    seen = [loader.batch(step) for step in range(batches)]
    try:
        measured = loader.held_out(batches)
    except DataError:
        note(
            "The text is a single document, or a short one: the loss is measured on what the model "
            "is fitted to. Give more text for a figure to rely on."
        )
        measured = seen
    return Texts(seen, measured, loader.sources)


def _tasks(
    names: list[str],
    data: list[str] | None,
    tokenizer: "Tokenizer",
    batches: int,
    batch_size: int | None,
    input_length: int | None,
) -> "Texts":
    """Return examples for training to fit to, and those for validation to measure on."""
    from switchlm.data.tasks.loader import PairLoader
    from switchlm.data.tasks.mixture import find_tasks, read_examples
    from switchlm.recipes.compress import Texts

    tasks = find_tasks(names)
    places = options.places(tasks, data)

    def read(split: str) -> dict[str, list]:  # type: ignore[type-arg]
        return {one.name: list(read_examples(one, split, places[one.name])) for one in tasks}

    loader = PairLoader(
        read("train"),
        tokenizer,
        input_length=input_length or 512,
        target_length=TARGET_LENGTH,
        batch_size=batch_size or 32,
        seed=0,
        held_out=read("validation"),
        long_targets="truncate",
        report=note,
    )
    seen = [loader.batch(step) for step in range(batches)]
    return Texts(seen, loader.held_out(batches), loader.sources)


def _present(done: "Compressed", plan: "Plan", out: Path, as_json: bool) -> None:
    if as_json:
        asked = dataclasses.asdict(plan)
        typer.echo(json.dumps({"out": str(out), "plan": asked, **dataclasses.asdict(done)}))
        return
    first = done.steps[0]
    table = Table()
    table.add_column("")
    for column in ("loss", "change", "bytes", "of before"):
        table.add_column(column, justify="right", no_wrap=True)
    for step in done.steps:
        loss = change = ""
        if "loss" in step:
            loss = f"{step['loss']:.4f}"
            change = "" if step is first else f"{step['loss'] - first['loss']:+.4f}"
        share = f"{step['bytes'] / first['bytes']:.0%}"
        table.add_row(step["step"], loss, change, f"{step['bytes']:,}", share)
    Console().print(table)
    typer.echo(f"Model: {out}")
