"""switchlm evaluate: held-out loss by source."""

import json
import math

import typer
from rich.console import Console
from rich.table import Table

from switchlm.cli.options import (
    Batches,
    BatchSize,
    Data,
    Device,
    InputLength,
    Json,
    Model,
    open_model,
    read_batches,
)
from switchlm.errors import CheckpointError


def evaluate(
    model: Model,
    data: Data = None,
    batches: Batches = 20,
    batch_size: BatchSize = None,
    input_length: InputLength = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure the loss of a model on text, in total and by source.

    The text is all that --data gives; without it, what the run held out of its own data.
    """
    from switchlm.evaluation.evaluator import held_out_loss

    loaded, tokenizer = open_model(model, device)
    read, names = read_batches(
        model, tokenizer, data, batches=batches, batch_size=batch_size, input_length=input_length
    )
    result = held_out_loss(loaded, read, names)
    if not math.isfinite(result["loss"]):
        raise CheckpointError(
            f"The loss of {model!r} is {result['loss']}: its weights are damaged, or too large for "
            "the number format that it computes in."
        )
    for part in (result, *result["sources"].values()):
        part["perplexity"] = math.exp(min(part["loss"], 700.0))
    if as_json:
        typer.echo(json.dumps({"model": model, **result}))
        return
    table = Table()
    table.add_column("source")
    for column in ("loss (nats a target token)", "perplexity", "target tokens"):
        table.add_column(column, justify="right")
    rows = list(result["sources"].items())
    for name, part in [*rows, ("all", result)] if len(rows) > 1 else rows:
        table.add_row(
            name, f"{part['loss']:.4f}", f"{part['perplexity']:.2f}", f"{part['tokens']:,}"
        )
    Console().print(table)
