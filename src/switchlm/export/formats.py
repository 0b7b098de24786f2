"""A model for another runtime: two programs of PyTorch's or in ONNX, or a plain T5.

A folder with programs has export.json, tokenizer.json and README.md too. It is written atomically,
and replaces only an earlier export.
"""

import inspect
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from switchlm import files
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import CheckpointError, MissingExtraError
from switchlm.export.steps import SIGNATURES, Names, Program, examples, greedy, programs
from switchlm.files import Report
from switchlm.generation.decode import before_end
from switchlm.huggingface import load
from switchlm.huggingface.metadata import Metadata
from switchlm.model.transformer import SwitchTransformer

ABOUT = "export.json"
KIND = "export"  # in the manifest of its folder


@dataclass(frozen=True)
class Form:
    """How the two programs of a model are stored.

    files: of the encoder and of the decoder step.
    save: writes a traced program to a path, with the names of its inputs and outputs.
    open: returns a program from and to arrays. Its source is part of README.md, so it imports
        nothing of this package.
    imports: the imports of that source.
    packages: what writing needs, of the extra `onnx`.
    """

    files: tuple[str, str]
    save: Callable[[ExportedProgram, Path, Names, tuple[str, ...]], None]
    open: Callable[[str], Program]
    imports: str
    packages: tuple[str, ...] = ()


def save_torch(
    program: ExportedProgram, path: Path, _inputs: Names, _outputs: tuple[str, ...]
) -> None:
    """Write a .pt2 file, which PyTorch runs without this package."""
    copy_views(program.state_dict)
    torch.export.save(program, path)


def copy_views(weights: dict[str, Tensor]) -> None:
    """Copy views of larger storages, in place: the full storage would be saved."""
    for name, weight in weights.items():
        if weight.untyped_storage().nbytes() > weight.nbytes:
            weights[name] = nn.Parameter(weight.detach().clone(), requires_grad=False)


def torch_program(file: str) -> Program:
    """Return the program of a .pt2 file, from and to arrays."""
    program = torch.export.load(file).module()
    return lambda *arrays: [y.numpy() for y in program(*map(torch.from_numpy, arrays))]


def save_onnx(
    program: ExportedProgram, path: Path, inputs: Names, outputs: tuple[str, ...]
) -> None:
    """Write an ONNX file; weights are beside it, in *.data."""
    with _quiet():
        torch.onnx.export(
            program,
            f=path,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=tuple(inputs.values()),
            dynamo=True,
            external_data=True,
            verbose=False,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's messages about packages that it does not need here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def onnx_program(file: str) -> Program:
    """Return the program of a .onnx file, from and to arrays."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    names = [one.name for one in session.get_inputs()]
    return lambda *arrays: session.run(None, dict(zip(names, arrays, strict=True)))


FORMS = {
    "torch": Form(("encoder.pt2", "decoder_step.pt2"), save_torch, torch_program, "import torch\n"),
    "onnx": Form(
        ("encoder.onnx", "decoder_step.onnx"), save_onnx, onnx_program, "", ("onnx", "onnxscript")
    ),
}


def write_programs(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    folder: Path,
    to: str,
    *,
    capacity_factor: float | None = None,
) -> None:
    """Write the two programs of a model (see steps.programs).

    to: `torch` or `onnx`.

    Raises CheckpointError for a folder that holds anything but an earlier export, and
    MissingExtraError.
    """
    form = FORMS[to]
    _need(form.packages)
    dims = {name: Dim(name) for name in ("batch", "source", "places")}
    with new_folder(folder) as partial:
        for program, example, file, (inputs, outputs) in zip(
            programs(model, capacity_factor),
            examples(model.config),
            form.files,
            SIGNATURES,
            strict=True,
        ):
            dynamic: Any = tuple(
                {dim: dims[name] for dim, name in shape.items()} for shape in inputs.values()
            )
            with torch.no_grad():
                traced = torch.export.export(program, example, dynamic_shapes=dynamic)
            form.save(traced, partial / file, inputs, outputs)
        _describe(partial, model, tokenizer, form, capacity_factor)


def open_programs(folder: Path, to: str) -> tuple[Program, Program]:
    """Return the programs of a folder, from and to arrays."""
    form = FORMS[to]
    if to == "onnx":
        _need(("onnxruntime",))
    first, second = (form.open(str(folder / file)) for file in form.files)
    return first, second


def _need(packages: tuple[str, ...]) -> None:
    """Raise MissingExtraError for the first package that is not installed."""
    for package in packages:
        if find_spec(package) is None:
            raise MissingExtraError(package, "onnx", "ONNX")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces `folder` at the end, unless an exception is raised."""
    files.check_replaceable(folder, KIND, _is_earlier)
    with files.new_folder(folder, KIND) as partial:
        yield partial


def _is_earlier(folder: Path) -> bool:
    """Return whether a folder without a manifest is an export of an earlier version."""
    found = {path.name for path in folder.iterdir()}
    weights = {f"{name}.data" for form in FORMS.values() for name in form.files}
    programs = {name for form in FORMS.values() for name in form.files}
    described = {ABOUT, "README.md", "tokenizer.json", "tokenizer_config.json"}
    return described <= found <= described | programs | weights


def _describe(
    folder: Path,
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    form: Form,
    capacity_factor: float | None,
) -> None:
    """Write export.json, the tokenizer and README.md."""
    config, metadata = model.config, model.metadata or Metadata()
    about = {
        "layers": config.num_decoder_layers,
        "heads": config.num_heads,
        "width": config.d_kv,
        "start_id": config.first_id,
        "end_ids": list(config.end_ids),
        "end_id": config.end_id,
        "before": list(tokenizer.before),
        "after": [*tokenizer.after, config.end_id],
        "vocabulary": config.vocabulary_size,
        "training": dict(metadata.training),
    }
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(folder)
    routing = ""
    if config.num_experts:
        routing = (
            "No token is dropped, however uneven the loads.\n"
            if capacity_factor is None
            else f"In the encoder an expert has capacity for {capacity_factor:g} times its even "
            "share of a batch's tokens, padding included; those past it get zeros from the layer, "
            "and outputs then differ from those of the model. The decoder drops none.\n"
        )
    table = "\n".join(
        f"| `{file}` | {', '.join(map(_describe_input, inputs.items()))} | {', '.join(outputs)} |"
        for file, (inputs, outputs) in zip(form.files, SIGNATURES, strict=True)
    )
    run = form.open.__name__
    text = f"""# A model in two programs

| program | inputs | outputs |
|---|---|---|
{table}

Dims named `batch`, `source` (the input) and `places` (of the cache) are free. Token ids and
`position` are int64, `mask` is bool and false at padding, all else is float32. The step takes one
token per row, {config.first_id} first, and gives the logits of the next and the cache with
this one in it; `places` is the longest output that fits the cache.
{routing}
```python
import json

import numpy as np
{form.imports}from tokenizers import Tokenizer


{_source(form.open)}


{_source(greedy)}


encode, step = {run}("{form.files[0]}"), {run}("{form.files[1]}")
tokenizer = Tokenizer.from_file("tokenizer.json")
about = json.load(open("{ABOUT}"))
ids = tokenizer.encode("TEXT", add_special_tokens=False).ids
prompt = about["before"] + ids + about["after"]
print(tokenizer.decode(greedy(encode, step, prompt, about, 64), skip_special_tokens=False))
```
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def _describe_input(item: tuple[str, dict[int, str]]) -> str:
    name, dims = item
    free = ", ".join(f"{dim}: {word}" for dim, word in dims.items())
    return f"{name} ({free})" if free else name


def _source(function: Callable[..., object]) -> str:
    """Return the source of a function without its annotations, whose names a script lacks."""
    source = inspect.getsource(function).rstrip()
    for annotation in (": Program", " -> Program", ": dict[str, Any]"):
        source = source.replace(annotation, "")
    return source


def write_t5(
    model: SwitchTransformer, tokenizer: Tokenizer, folder: Path, *, report: Report | None = None
) -> None:
    """Save a dense model, its tokenizer and generation_config.json in T5's own layout.

    transformers loads it as `T5ForConditionalGeneration`. Raises CheckpointError for a sparse
    model, which T5 cannot be: its dense student can.
    """
    if model.config.num_experts:
        raise CheckpointError(
            f"A plain T5 is dense, and this model has {model.config.num_experts} experts per "
            "Switch layer. Distil it first, `switchlm distill --teacher MODEL --out RUN`, and "
            "export the student; or keep it sparse with --to onnx or --to torch."
        )
    load.save(model, tokenizer, folder, report=report)


def t5_tokens(folder: Path, text: str, max_new_tokens: int) -> list[int]:
    """Return the tokens that transformers generates greedily, without the end token.

    The model is loaded from the folder by AutoModelForSeq2SeqLM, its tokenizer by AutoTokenizer.
    """
    if find_spec("transformers") is None:
        raise MissingExtraError("transformers", "transformers", "Checking a T5 with transformers")
    import transformers

    theirs: Any = transformers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = theirs.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
        inputs = theirs.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
        with torch.no_grad():
            row = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )[0].tolist()[1:]
    ends = model.generation_config.eos_token_id
    return before_end(row, ends if isinstance(ends, list) else [ends])
