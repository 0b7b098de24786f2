"""switchlm compress: fewer bits a weight."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from switchlm.cli.options import Json, Model, note
from switchlm.errors import ConfigError


class What(StrEnum):
    experts = "experts"
    all = "all"


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
    as_json: Json = False,
) -> None:
    """Make a model smaller."""
    from switchlm.checkpoint.quantised import Quantisation
    from switchlm.recipes.compress import quantise_folder

    if bits not in (8, 4):
        raise ConfigError(f"--bits is {bits}; weights have 8 or 4 bits.")
    quantisation = Quantisation(bits=8 if bits == 8 else 4, group_size=group_size, what=what.value)
    sizes = quantise_folder(model, out, quantisation, report=note)
    if as_json:
        typer.echo(json.dumps({"out": str(out), **sizes}))
    else:
        typer.echo(
            f"Model: {out} ({sizes['bytes_after']:,} bytes, before {sizes['bytes_before']:,})"
        )
