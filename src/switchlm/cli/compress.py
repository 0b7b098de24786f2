"""switchlm compress: quantise weights, prune and merge experts, and measure the loss."""

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from switchlm.cli import options
from switchlm.errors import ConfigError, DataError
from switchlm.files import to_json

if TYPE_CHECKING:
    from switchlm.data.pretraining.loader import Loader
    from switchlm.data.tasks.loader import PairLoader
    from switchlm.data.text.tokenizer import Tokenizer
    from switchlm.recipes.compress import CompressionData, CompressionPlan, CompressionResult

HELD_OUT = 0.2  # of the documents, on which the loss is measured
INPUT_LENGTH, TARGET_LENGTH = 512, 128  # tokens of a task, of models that do not say theirs


class What(StrEnum):
    experts = "experts"
    all = "all"


class By(StrEnum):
    load = "load"
    gradient = "gradient"


def compress(
    model: options.Model,
    out: options.OutFolder,
    bits: Annotated[int | None, typer.Option(help="Bits per weight: 8 or 4.")] = None,
    group_size: Annotated[
        int, typer.Option(help="With 4 bits, inputs that share a scale: 32, 64, 128 or 256.")
    ] = 64,
    what: Annotated[
        What | None,
        typer.Option(
            help="Experts, the default where there are some, or all: attention, dense layers and "
            "the vocabulary too."
        ),
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Fit the codes to the text (GPTQ).")
    ] = False,
    keep_experts: Annotated[
        int | None,
        typer.Option(help="Number of experts to keep per layer, by importance."),
    ] = None,
    by: Annotated[
        By, typer.Option(help="Importance of an expert: its load, or the gradient of the loss.")
    ] = By.load,
    merge_experts: Annotated[
        int | None, typer.Option(help="Number of experts per layer to merge similar ones to.")
    ] = None,
    data: options.Data = None,
    task: options.Tasks = None,
    batches: options.Batches = 16,
    batch_size: options.BatchSize = None,
    input_length: options.InputLength = None,
    cache: options.Cache = None,
    as_json: options.Json = False,
) -> None:
    """Make a model smaller: fewer bits per weight, fewer experts.

    With text (--data, --task, or the run's own) the loss is measured before and after every step,
    on held-out documents. --bits alone needs no text, and then works for models of any size.
    """
    from switchlm.huggingface.quantised import Quantisation
    from switchlm.recipes.compress import CompressionData, CompressionPlan, quantise_folder
    from switchlm.recipes.compress import compress as recipe

    if bits not in (None, 8, 4):
        raise ConfigError(f"--bits is {bits}; weights have 8 or 4 bits.")
    quantisation = None
    if bits is not None:
        quantisation = Quantisation(
            bits=8 if bits == 8 else 4, group_size=group_size, what=_what(model, what).value
        )
    plan = CompressionPlan(
        keep_experts=keep_experts,
        by=by.value,
        merge_experts=merge_experts,
        quantisation=quantisation,
        calibrate=calibrate,
    )

    def read(tokenizer: "Tokenizer") -> "CompressionData":
        loader: Loader | PairLoader
        if task:
            loader = _open_tasks(model, task, data, tokenizer, batch_size, input_length)
        else:
            loader, _ = options.open_text(
                model,
                tokenizer,
                data,
                held_out_share=HELD_OUT,
                batch_size=batch_size,
                input_length=input_length,
                cache=cache,
            )
        calibration = [loader.batch(step) for step in range(batches)]
        try:
            held_out = loader.held_out(batches)
        except DataError:
            options.note(
                "The text is a single document, or a short one: the loss is measured on the text "
                "that the model is fitted to. Give more text for a reliable loss."
            )
            held_out = calibration
        return CompressionData(calibration, held_out, loader.sources)

    if quantisation is not None and not (plan.needs_text or data or task):
        result = quantise_folder(model, out, quantisation, report=options.note)
    else:
        result = recipe(model, out, plan, read, report=options.note)
    _present(result, plan, out, as_json)


def _what(model: str, stated: What | None) -> What:
    """Return what to quantise: of a model without experts all, since nothing would change else."""
    from switchlm.huggingface.load import load_config

    if load_config(model).num_experts:
        return stated or What.experts
    if stated is What.experts:
        raise ConfigError(
            f"--what is experts, but the model {model!r} is dense and has none. Take --what all."
        )
    options.note(f"{model} is dense: all its matrices are quantised (--what all).")
    return What.all


def _open_tasks(
    model: str,
    names: list[str],
    data: list[str] | None,
    tokenizer: "Tokenizer",
    batch_size: int | None,
    input_length: int | None,
) -> "PairLoader":
    """Return a loader of training examples, with the validation examples held out.

    What is not given is as in the model's fine-tuning.
    """
    from switchlm.data.tasks.loader import PairLoader
    from switchlm.data.tasks.mixture import read_splits
    from switchlm.recipes.trained_with import trained_with

    section = trained_with(model).get("finetune", {})
    input_length = input_length or section.get("input_length", INPUT_LENGTH)
    target_length = section.get("target_length", TARGET_LENGTH)
    options.note(f"{model}: inputs of up to {input_length:,} tokens, targets of {target_length:,}.")
    tasks = options.find_tasks(names, None, [model])
    paths = options.task_paths(tasks, data)

    splits = ("train", "validation")
    found = {one.name: read_splits(one, splits, paths[one.name], options.note) for one in tasks}
    return PairLoader(
        {name: part["train"] for name, part in found.items()},
        tokenizer,
        input_length=input_length,
        target_length=target_length,
        batch_size=batch_size or section.get("batch_size", 32),
        seed=0,
        held_out={name: part["validation"] for name, part in found.items()},
        long_targets="truncate",
        report=options.note,
    )


def _present(
    result: "CompressionResult", plan: "CompressionPlan", out: Path, as_json: bool
) -> None:
    if as_json:
        settings = dataclasses.asdict(plan)
        typer.echo(to_json({"out": str(out), "plan": settings, **dataclasses.asdict(result)}))
        return
    first = result.steps[0]
    table = Table()
    table.add_column("")
    for column in ("loss", "change", "bytes", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    for step in result.steps:
        loss = change = ""
        if "loss" in step:
            loss = f"{step['loss']:.4f}"
            change = "" if step is first else f"{step['loss'] - first['loss']:+.4f}"
        share = f"{step['bytes'] / first['bytes']:.0%}"
        table.add_row(step["step"], loss, change, f"{step['bytes']:,}", share)
    Console().print(table)
    typer.echo(f"Model: {out}")
