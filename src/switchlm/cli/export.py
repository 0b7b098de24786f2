"""switchlm export: write a model for another runtime, and check that it says the same there."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from switchlm.cli.options import Json, Model, note, open_model
from switchlm.errors import ConfigError, DataError, SwitchLMError

CHECKED_TOKENS = 64


class Target(StrEnum):
    torch = "torch"
    onnx = "onnx"
    t5 = "t5"


def export(
    model: Model,
    to: Annotated[
        Target,
        typer.Option(
            help="torch: programs of torch.export. onnx: for onnxruntime. t5: a dense model as "
            "transformers' own T5."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    check: Annotated[
        str | None,
        typer.Option(help="Let the other runtime answer this text, and compare the tokens."),
    ] = None,
    capacity_factor: Annotated[
        float | None,
        typer.Option(
            help="Capacity of an expert of the encoder, in times its even share; what is past it "
            "is dropped. Nothing is by default. For torch and onnx."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a model for another runtime: PyTorch's programs, ONNX, or a plain T5."""
    from switchlm.export import formats

    if to is Target.t5 and capacity_factor is not None:
        raise ConfigError("A plain T5 is dense: --capacity-factor is for --to torch and --to onnx.")
    if check is not None and not check.strip():
        raise DataError("The text to --check with is empty.")
    loaded, tokenizer = open_model(model, "cpu")
    if to is Target.t5:
        formats.write_t5(loaded, tokenizer, out, report=note)
    else:
        formats.write_programs(loaded, tokenizer, out, to.value, capacity_factor=capacity_factor)
    result: dict[str, Any] = {"out": str(out), "to": to.value}
    if check is not None:
        theirs = answer(to, out, [*tokenizer.encode(check), loaded.config.end_id], check)
        result |= {"tokens": len(theirs), "output": compare(loaded, tokenizer, check, theirs)}
    if as_json:
        files = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
        typer.echo(json.dumps({**result, "files": files}))
        return
    typer.echo(f"Exported: {out}")
    if check is not None:
        typer.echo(f"The same {result['tokens']} tokens there and here: {result['output']}")


def answer(to: Target, folder: Path, prompt: list[int], text: str) -> list[int]:
    """Return the tokens that the other runtime generates from what was written."""
    from switchlm.export import formats
    from switchlm.export.steps import greedy

    if to is Target.t5:
        return formats.t5_tokens(folder, text, CHECKED_TOKENS)
    opened = formats.open_programs(folder, to.value)
    about = json.loads((folder / formats.ABOUT).read_text(encoding="utf-8"))
    return greedy(*opened, prompt, about, CHECKED_TOKENS)


def compare(model: Any, tokenizer: Any, text: str, theirs: list[int]) -> str:
    """Return the text of the tokens; SwitchLMError where ours, greedy too, are others."""
    import torch

    from switchlm.generation.decode import generate

    prompt = [*tokenizer.encode(text), model.config.end_id]
    generated = generate(model, torch.tensor([prompt]), max_new_tokens=CHECKED_TOKENS)
    ours = generated.rows(model.config.end_id)[0]
    if ours != theirs:
        raise SwitchLMError(
            f"The exported model says something else: {tokenizer.decode(theirs)!r} there, "
            f"{tokenizer.decode(ours)!r} here."
        )
    return tokenizer.decode(theirs)
