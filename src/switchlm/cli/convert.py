"""switchlm convert: write a model in another layout or number format.

One layout serves both ends: safetensors with the names of transformers, and a config.json whose
key of our own says what transformers has no field for. Stacked experts would be read 2 to 5 times
as fast (0.4 instead of 0.8 seconds for half a gigabyte on one core), which does not earn a second
format. So `native` writes any model, and `huggingface` the same files once it is certain that
transformers loads them and computes the same.
"""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from switchlm.cli.options import Json, Model, note
from switchlm.errors import CheckpointError


class Layout(StrEnum):
    huggingface = "huggingface"
    native = "native"


class Precision(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def convert(
    model: Model,
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    to: Annotated[
        Layout,
        typer.Option(help="huggingface refuses what transformers cannot represent; native not."),
    ] = Layout.huggingface,
    adapters: Annotated[
        Path | None, typer.Option(help="Melt these adapters in: RUN/adapters of a fine-tuning.")
    ] = None,
    dtype: Annotated[
        Precision | None, typer.Option(help="Number format of the weights; as they are by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a model in another layout."""
    import torch

    from switchlm.huggingface.adapters import load_adapters
    from switchlm.huggingface.load import load, save
    from switchlm.huggingface.save import limits
    from switchlm.model import lora

    kind = None if dtype is None else getattr(torch, dtype.value)
    # What is melted in is added in float32 and rounded once.
    melting = adapters is not None and kind is not None
    loaded, tokenizer = load(model, dtype=torch.float32 if melting else kind, report=note)
    if adapters is not None:
        load_adapters(loaded, adapters)
        loaded = lora.merged(loaded).to(kind)
    obstacles = limits(loaded.config)
    if to is Layout.huggingface and obstacles:
        raise CheckpointError(
            f"{model!r} has no faithful form in transformers. {' '.join(obstacles)} "
            "Use --to native, which keeps everything."
        )
    save(loaded, tokenizer, out, report=note)
    if as_json:
        files = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
        typer.echo(json.dumps({"out": str(out), "layout": to.value, "files": files}))
    else:
        typer.echo(f"Model: {out}")
