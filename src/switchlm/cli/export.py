"""switchlm export: write a model for another runtime, and check that it says the same there."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from switchlm.cli.options import Json, Model, note, open_model
from switchlm.errors import SwitchLMError

CHECKED_TOKENS = 64


class Target(StrEnum):
    t5 = "t5"


def export(
    model: Model,
    to: Annotated[Target, typer.Option(help="t5: a dense model as transformers' own T5.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    check: Annotated[
        str | None,
        typer.Option(help="Let the other runtime answer this text, and compare the tokens."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a model for another runtime."""
    from switchlm.export.t5 import t5_tokens, write_t5

    loaded, tokenizer = open_model(model, "cpu")
    write_t5(loaded, tokenizer, out, report=note)
    result: dict[str, Any] = {"out": str(out), "to": to.value}
    if check is not None:
        theirs = t5_tokens(out, check, CHECKED_TOKENS)
        result |= {"tokens": len(theirs), "output": compare(loaded, tokenizer, check, theirs)}
    if as_json:
        files = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
        typer.echo(json.dumps({**result, "files": files}))
        return
    typer.echo(f"Exported: {out}")
    if check is not None:
        typer.echo(f"The same {result['tokens']} tokens there and here: {result['output']}")


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
