"""switchlm convert and export: write a model for transformers or another runtime.

`convert` has one format: safetensors with the names of transformers, and a config.json with our own
key for settings that transformers lacks. Stacked experts would be read 2 to 5 times as fast (0.4
instead of 0.8 seconds for half a gigabyte on one core), which is not worth a second format. So
`native` writes any model, and `huggingface` the same files for models that transformers supports.
"""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from switchlm.cli import options
from switchlm.errors import CheckpointError, ConfigError, DataError, SwitchLMError
from switchlm.files import to_json

CHECKED_TOKENS = 64


class Layout(StrEnum):
    huggingface = "huggingface"
    native = "native"


class Target(StrEnum):
    torch = "torch"
    onnx = "onnx"
    t5 = "t5"


def convert(
    model: options.Model,
    out: options.OutFolder,
    to: Annotated[
        Layout,
        typer.Option(help="huggingface: refuse what transformers cannot represent. native: any."),
    ] = Layout.huggingface,
    adapters: Annotated[
        Path | None, typer.Option(help="Merge these adapters in: RUN/adapters of a fine-tuning.")
    ] = None,
    dtype: Annotated[
        options.Precision | None,
        typer.Option(help="Number format of the weights; as they are by default."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write a model in another layout."""
    import torch

    from switchlm.huggingface.adapters import load_adapters
    from switchlm.huggingface.load import load, save
    from switchlm.huggingface.save import unsupported_features
    from switchlm.model import lora

    kind = options.torch_dtype(dtype)
    # Adapters are added in float32 and the sum is rounded once.
    merging = adapters is not None and kind is not None
    loaded, tokenizer = load(model, dtype=torch.float32 if merging else kind, report=options.note)
    if adapters is not None:
        load_adapters(loaded, adapters)
        loaded = lora.merged(loaded).to(kind)
    obstacles = unsupported_features(loaded.config)
    if to is Layout.huggingface and obstacles:
        raise CheckpointError(
            f"{model!r} has no faithful form in transformers. {' '.join(obstacles)} "
            "Use --to native, which keeps everything."
        )
    save(loaded, tokenizer, out, report=options.note)
    if as_json:
        _print_json(out, {"layout": to.value})
    else:
        typer.echo(f"Model: {out}")


def export(
    model: options.Model,
    to: Annotated[
        Target,
        typer.Option(
            help="torch: programs of torch.export. onnx: for onnxruntime. t5: a dense model as "
            "transformers' own T5."
        ),
    ],
    out: options.OutFolder,
    check: Annotated[
        str | None,
        typer.Option(help="Generate from this text in both runtimes, and compare the tokens."),
    ] = None,
    capacity_factor: Annotated[
        float | None,
        typer.Option(
            help="Capacity of the encoder's experts, relative to an even load; further tokens are "
            "dropped. Dropless by default. For torch and onnx."
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write a model for another runtime: PyTorch's programs, ONNX, or a plain T5."""
    from switchlm.export import formats

    if to is Target.t5 and capacity_factor is not None:
        raise ConfigError("A plain T5 is dense: --capacity-factor is for --to torch and --to onnx.")
    if check is not None and not check.strip():
        raise DataError("The text to --check with is empty.")
    loaded, tokenizer = options.open_model(model, "cpu")
    if to is Target.t5:
        formats.write_t5(loaded, tokenizer, out, report=options.note)
    else:
        formats.write_programs(loaded, tokenizer, out, to.value, capacity_factor=capacity_factor)
    result: dict[str, Any] = {"to": to.value}
    if check is not None:
        prompt = tokenizer.complete(tokenizer.encode(check), loaded.config.end_id)
        theirs = generate_exported(to, out, prompt, check)
        result |= {
            "tokens": len(theirs),
            "output": check_same_tokens(loaded, tokenizer, check, theirs),
        }
    if as_json:
        _print_json(out, result)
        return
    typer.echo(f"Exported: {out}")
    if check is not None:
        typer.echo(f"The same {result['tokens']} tokens there and here: {result['output']}")


def _print_json(out: Path, result: dict[str, Any]) -> None:
    """Print the result, the folder, and the size of each of its files."""
    files = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    typer.echo(to_json({"out": str(out), **result, "files": files}))


def generate_exported(to: Target, folder: Path, prompt: list[int], text: str) -> list[int]:
    """Return the tokens that the other runtime generates with the written files."""
    from switchlm.export import formats
    from switchlm.export.steps import greedy

    if to is Target.t5:
        return formats.t5_tokens(folder, text, CHECKED_TOKENS)
    about = json.loads((folder / formats.ABOUT).read_text(encoding="utf-8"))
    return greedy(*formats.open_programs(folder, to.value), prompt, about, CHECKED_TOKENS)


def check_same_tokens(model: Any, tokenizer: Any, text: str, theirs: list[int]) -> str:
    """Return the text of the tokens; SwitchLMError if our own greedy tokens differ."""
    import torch

    from switchlm.generation.decode import generate

    prompt = tokenizer.complete(tokenizer.encode(text), model.config.end_id)
    generated = generate(model, torch.tensor([prompt]), max_new_tokens=CHECKED_TOKENS)
    ours = generated.rows(model.config.end_ids)[0]
    if ours != theirs:
        raise SwitchLMError(
            f"The exported model generates other tokens: {tokenizer.decode(theirs)!r} there, "
            f"{tokenizer.decode(ours)!r} here."
        )
    return tokenizer.decode(theirs)
