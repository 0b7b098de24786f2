"""The format of a checkpoint: its manifest, and training state as tensors and JSON.

The manifest has the size and SHA-256 of every file, and of itself, and is written last. A folder
without a manifest was not finished; if files differ from it, they were damaged later. It detects
accidents and is no signature; reading a checkpoint is safe without it.

Nothing is pickled. `flatten_state` maps nested dicts, lists and tuples to named tensors and JSON:
every tensor is named by its path (`optimizer/state/encoder.final_norm.weight/step`), and is
`{"$tensor": name, "dtype": ..., "shape": ...}` in the JSON. `unflatten_state` is the inverse. Names
and shapes are those of full tensors, however they are sharded.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from switchlm.checkpoint.collective import ALONE, Ranks
from switchlm.errors import CheckpointError
from switchlm.files import sync

NAME = "manifest.json"
FORMAT = 1
LARGEST = 2**24  # bytes; a manifest has about a hundred per file


def write(folder: Path, step: int, known: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Write the manifest of the files in `folder`, as the checkpoint of `step`.

    known: size and SHA-256 of files, by name; others are read to compute them.
    """
    known = known or {}
    files = {
        path.name: known.get(path.name) or _describe(path) for path in sorted(folder.iterdir())
    }
    path = folder / NAME
    path.write_bytes(_encode({"format": FORMAT, "step": step, "files": files}))
    sync(path)


def verify(folder: Path, ranks: Ranks = ALONE) -> int:
    """Read every file of a checkpoint, compare it with the manifest, and return the step.

    Each rank reads a part of the files. Raises CheckpointError on all ranks, which names the first
    file that is missing, not listed, or differs.
    """
    content = ranks.on_rank_zero(lambda: _listed(folder))
    files = content["files"]
    by_size = sorted(files, key=lambda name: (-files[name]["size"], name))
    share = by_size[ranks.rank :: ranks.size]
    ranks.on_all_ranks(lambda: _compare_content(folder, {name: files[name] for name in share}))
    step: int = content["step"]
    return step


def _listed(folder: Path) -> dict[str, Any]:
    """Return the manifest, after comparing the names and sizes of the files."""
    with readable(folder):
        content = _read(folder)
        _compare_names(folder, content["files"])
        return content


def _compare_content(folder: Path, files: dict[str, Any]) -> None:
    with readable(folder):
        for name, expected in files.items():
            if _describe(folder / name) != expected:
                raise damaged(folder, f"{name} does not have the SHA-256 of the manifest")


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Raise errors of reading as CheckpointError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Cannot read the checkpoint {str(folder)!r}: {error}.") from error


def _read(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    if not folder.is_dir():
        raise CheckpointError(f"There is no checkpoint folder {str(folder)!r}.")
    if not path.is_file():
        raise damaged(folder, f"{NAME} is missing")
    with path.open("rb") as stream:
        found = stream.read(LARGEST)
    try:
        content = json.loads(found)
        version, intact = content["format"], found == _encode(content)
    except (ValueError, LookupError, TypeError, RecursionError):
        raise damaged(folder, f"{NAME} cannot be read") from None
    if not intact:
        raise damaged(folder, f"{NAME} has been changed")
    if version != FORMAT:
        raise CheckpointError(
            f"The checkpoint {str(folder)!r} has format {version!r}; this version of switchlm "
            f"reads format {FORMAT}. Load it with the version that wrote it."
        )
    if not isinstance(content.get("step"), int) or not isinstance(content.get("files"), dict):
        raise damaged(folder, f"{NAME} lacks its step or its files")
    return content


def _compare_names(folder: Path, files: dict[str, Any]) -> None:
    present = {path.name: path for path in folder.iterdir() if path.name != NAME}
    for name, path in present.items():
        if path.is_symlink() or (name not in files and name.endswith(".safetensors")):
            raise damaged(folder, f"{name} does not belong to it")
    for name, expected in files.items():
        if name not in present or not present[name].is_file():
            raise damaged(folder, f"{name} is missing")
        size = present[name].stat().st_size
        if not isinstance(expected, dict) or size != expected.get("size"):
            raise damaged(folder, f"{name} has {size} bytes, not those of the manifest")


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"size": stream.tell(), "sha256": digest}


def _encode(content: dict[str, Any]) -> bytes:
    body = {key: value for key, value in content.items() if key != "sha256"}
    canonical = json.dumps(body, sort_keys=True).encode()
    body["sha256"] = hashlib.sha256(canonical).hexdigest()
    return json.dumps(body, indent=1, sort_keys=True).encode() + b"\n"


def damaged(folder: Path, what: str) -> CheckpointError:
    """Return the error for files that are not as they were written."""
    return CheckpointError(f"The checkpoint {str(folder)!r} is damaged: {what}.")


# Dtypes by their codes in safetensors files.
CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in CODES}
TensorSpec = tuple[torch.dtype, tuple[int, ...]]  # dtype and shape


def flatten_state(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors of `state` by name, and its structure as JSON values.

    Keys are strings or integers; leaves besides tensors are numbers, strings, booleans and None.
    Raises CheckpointError for anything else, with its path.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _flatten(state, (), tensors)


def unflatten_state(structure: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the state of which `flatten_state` made `structure` and the names of `tensors`."""
    if isinstance(structure, list):
        return [unflatten_state(item, tensors) for item in structure]
    if not isinstance(structure, dict):
        return structure
    match structure:
        case {"$tensor": str(name)}:
            return tensors[name]
        case {"$tuple": list(items)}:
            return tuple(unflatten_state(item, tensors) for item in items)
        case {"$float": str(text)}:
            return float(text)
        case {"$items": list(items)}:
            return {key: unflatten_state(item, tensors) for key, item in items}
    return {key: unflatten_state(item, tensors) for key, item in structure.items()}


def whole(number: Any) -> int:
    """Return a number from a file; ValueError for any other value, such as 2.0 and Infinity."""
    if type(number) is not int:
        raise ValueError(f"{number!r} is no whole number")
    return number


def tensor_specs(structure: Any) -> dict[str, TensorSpec]:
    """Return dtype and shape by name of every tensor in a structure made by `flatten_state`."""
    if isinstance(structure, dict) and "$tensor" in structure:
        name, dtype, shape = (structure[key] for key in ("$tensor", "dtype", "shape"))
        return {str(name): (DTYPES[dtype], tuple(whole(size) for size in shape))}
    if isinstance(structure, dict):
        structure = list(structure.values())
    specs: dict[str, TensorSpec] = {}
    for item in structure if isinstance(structure, list) else ():
        specs |= tensor_specs(item)
    return specs


def _flatten(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return _name_tensor(value, path, tensors)
    if isinstance(value, Mapping):
        return _flatten_mapping(value, path, tensors)
    if type(value) in (list, tuple):
        items = [_flatten(item, (*path, str(i)), tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if type(value) is float and not math.isfinite(value):
        return {"$float": repr(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise CheckpointError(
        f"Cannot save {'/'.join(path) or 'the state'}, which is a {type(value).__name__}: a "
        "checkpoint holds tensors, numbers, strings, booleans, None, and dicts, lists and tuples "
        "of them. Convert it to one of these."
    )


def _flatten_mapping(
    value: Mapping[Any, Any], path: tuple[str, ...], tensors: dict[str, Tensor]
) -> dict[str, Any]:
    items = []
    for key, item in value.items():
        if type(key) not in (str, int):
            raise CheckpointError(
                f"Cannot save the key {key!r} of {'/'.join(path) or 'the state'}: keys of a "
                "checkpoint are strings or integers."
            )
        items.append((key, _flatten(item, (*path, _escape(str(key))), tensors)))
    if any(type(key) is int or key.startswith("$") for key, _ in items):
        return {"$items": [[key, item] for key, item in items]}
    return dict(items)


def _name_tensor(tensor: Tensor, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    name = "/".join(path)
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES or tensor.layout != torch.strided:
        raise CheckpointError(
            f"Cannot save the tensor {name}: safetensors files do not support {tensor.dtype}, "
            f"{tensor.layout}. Convert it to one of: {', '.join(DTYPES)}."
        )
    if name in tensors:
        raise CheckpointError(f"Cannot save two tensors under the name {name}; rename a key.")
    tensors[name] = tensor
    return {"$tensor": name, "dtype": dtype, "shape": list(tensor.shape)}


def _escape(key: str) -> str:
    # As in JSON pointers (RFC 6901), so that a slash in a key cannot make two names equal.
    return key.replace("~", "~0").replace("/", "~1")
