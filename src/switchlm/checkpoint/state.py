"""Training state as named tensors and JSON: nothing in a checkpoint is pickled.

`split` takes nested dicts, lists and tuples apart: every tensor gets the name of its path
(`optimizer/state/encoder.final_norm.weight/step`), and the structure that is left is plain JSON, a
tensor in it being `{"$tensor": name, "dtype": ..., "shape": ...}`. `join` is the inverse. A tensor
is stored whole under its name, whatever layout it had over processes.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from switchlm.errors import CheckpointError

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
    )
}  # fmt: skip


def split(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors of `state` by name, and its structure as JSON values.

    Keys are strings or integers; other leaves are numbers, strings, booleans and None. Raises
    CheckpointError for anything else, naming where it stands.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _take_apart(state, (), tensors)


def join(structure: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the state that `split` took apart, with `tensors` in their places."""
    if isinstance(structure, list):
        return [join(item, tensors) for item in structure]
    if not isinstance(structure, dict):
        return structure
    match structure:
        case {"$tensor": str(name)}:
            return tensors[name]
        case {"$tuple": list(items)}:
            return tuple(join(item, tensors) for item in items)
        case {"$float": str(text)}:
            return float(text)
        case {"$items": list(items)}:
            return {key: join(item, tensors) for key, item in items}
    return {key: join(item, tensors) for key, item in structure.items()}


def describe(structure: Any) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Yield name, dtype and shape of every tensor in a structure made by `split`."""
    if isinstance(structure, list):
        for item in structure:
            yield from describe(item)
    elif isinstance(structure, dict):
        if "$tensor" in structure:
            name, dtype, shape = (structure[key] for key in ("$tensor", "dtype", "shape"))
            yield str(name), DTYPES[dtype], tuple(int(size) for size in shape)
        else:
            for item in structure.values():
                yield from describe(item)


def _take_apart(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return _name_tensor(value, path, tensors)
    if isinstance(value, Mapping):
        return _take_mapping_apart(value, path, tensors)
    if type(value) in (list, tuple):
        items = [_take_apart(item, (*path, str(i)), tensors) for i, item in enumerate(value)]
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


def _take_mapping_apart(
    value: Mapping[Any, Any], path: tuple[str, ...], tensors: dict[str, Tensor]
) -> dict[str, Any]:
    items = []
    for key, item in value.items():
        if type(key) not in (str, int):
            raise CheckpointError(
                f"Cannot save the key {key!r} of {'/'.join(path) or 'the state'}: keys of a "
                "checkpoint are strings or integers."
            )
        items.append((key, _take_apart(item, (*path, _escape(str(key))), tensors)))
    if any(type(key) is int or key.startswith("$") for key, _ in items):
        return {"$items": [[key, item] for key, item in items]}
    return dict(items)


def _name_tensor(tensor: Tensor, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    name = "/".join(path)
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES or tensor.layout != torch.strided:
        raise CheckpointError(
            f"Cannot save the tensor {name}: its kind ({tensor.dtype}, {tensor.layout}) has no "
            f"place in a safetensors file. Store it as one of: {', '.join(DTYPES)}."
        )
    if name in tensors:
        raise CheckpointError(f"Cannot save two tensors under the name {name}; rename a key.")
    tensors[name] = tensor
    return {"$tensor": name, "dtype": dtype, "shape": list(tensor.shape)}


def _escape(key: str) -> str:
    # As in JSON pointers (RFC 6901), so that a slash in a key cannot make two names equal.
    return key.replace("~", "~0").replace("/", "~1")
