"""A folder with an exported model: the programs, export.json, tokenizer.json and README.md.

It appears whole or not at all, and replaces nothing but an earlier export.
"""

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from switchlm import files
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import CheckpointError
from switchlm.export.steps import ENCODER_INPUTS, ENCODER_OUTPUTS, STEP_INPUTS, STEP_OUTPUTS, greedy
from switchlm.model.config import ModelConfig

ABOUT = "export.json"


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `folder` once all went well."""
    folder = folder.absolute()
    taken = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    if taken and not (folder / ABOUT).is_file():
        raise CheckpointError(
            f"Will not replace {str(folder)!r}: it is no folder of an earlier export. Choose "
            "another one with --out, or empty it."
        )
    with files.new_folder(folder) as partial:
        yield partial


def describe(
    folder: Path,
    config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    opening: str,
    programs: tuple[str, str],
    capacity_factor: float | None,
) -> None:
    """Write all but the programs.

    opening: Python that binds `encode` and `step`.
    """
    about = {
        "layers": config.num_decoder_layers,
        "heads": config.num_heads,
        "width": config.d_kv,
        "pad_id": config.pad_id,
        "end_id": config.end_id,
        "vocabulary": config.vocabulary_size,
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
    text = f"""# A model in two programs

| program | inputs | outputs |
|---|---|---|
| `{programs[0]}` | {", ".join(map(_say, ENCODER_INPUTS.items()))} | {", ".join(ENCODER_OUTPUTS)} |
| `{programs[1]}` | {", ".join(map(_say, STEP_INPUTS.items()))} | {", ".join(STEP_OUTPUTS)} |

Dims named `batch`, `source` (the input) and `places` (of the cache) are free. Token ids and
`position` are int64, `mask` is bool and false at padding, all else is float32. The step takes one
token a row, padding ({config.pad_id}) first, and gives the logits of the next and the cache with
this one in it; `places` is the longest output that the cache has room for.
{routing}
```python
import json

{opening}


{_source(greedy)}


tokenizer = Tokenizer.from_file("tokenizer.json")
about = json.load(open("{ABOUT}"))
prompt = tokenizer.encode("TEXT", add_special_tokens=False).ids + [about["end_id"]]
print(tokenizer.decode(greedy(encode, step, prompt, about, 64), skip_special_tokens=False))
```
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def _say(item: tuple[str, dict[int, str]]) -> str:
    name, dims = item
    free = ", ".join(f"{dim}: {word}" for dim, word in dims.items())
    return f"{name} ({free})" if free else name


def _source(function: Callable[..., object]) -> str:
    """Return the source of a function less its annotations' names, which a script lacks."""
    source = inspect.getsource(function).rstrip()
    return source.replace("encode: Program", "encode").replace("step: Program", "step")
