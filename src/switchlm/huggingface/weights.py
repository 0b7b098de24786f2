"""Find a model folder, or one on the hub, and read its weight files.

File names in an index are not trusted: a file is only opened if it lies in the folder. Shapes are
known before any tensor is read. safetensors files are memory-mapped; `.bin` files are
checked and unpickled by pickled.py, which runs no code.

Experts that are offloaded are read by offset and not through a memory map: truncating a mapped file
kills the process, while a short read is an error with a message.
"""

import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from switchlm.checkpoint.format import CODES
from switchlm.errors import CheckpointError, MissingExtraError
from switchlm.huggingface.pickled import unpickle
from switchlm.kernels.cpu import memory

CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
# Another name, so that no other program reads it as weights.
QUANTISED = "quantised.safetensors"
PICKLED = "pytorch_model.bin"
LARGEST_CONFIG = 2**24  # bytes
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[\w.-]{1,96})?", re.ASCII)
_SMALL_FILES = ("*.json", "tokenizer*", "spiece.model", "*.txt", "README.md")
FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_DTYPES = {CODES[dtype]: dtype for dtype in FLOATING}
_CODES = {CODES[dtype]: dtype for dtype in (torch.int8, torch.uint8)}  # of quantised weights


def find_model(
    name: str | Path,
    revision: str | None = None,
    local_files_only: bool = False,
    *,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
) -> Path:
    """Return the folder of a model: DIR/model of a run, DIR itself, or the cache of the hub.

    huggingface_hub's cache, offline mode and token are used (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN)
    where `cache_dir` and `token` are None.
    """
    folder = Path(name)
    if (folder / CONFIG).is_file():
        return folder
    if (folder / "model" / CONFIG).is_file():
        return folder / "model"
    if folder.exists():
        raise CheckpointError(
            f"{str(name)!r} is neither a model folder ({CONFIG} is missing) nor a run with a saved "
            "model."
        )
    if isinstance(name, Path) or not _HUB_NAME.fullmatch(name):
        raise CheckpointError(f"There is no folder {str(name)!r}, and it is not a name on the hub.")
    return _download(
        name,
        revision=revision,
        local_files_only=local_files_only,
        cache_dir=cache_dir,
        token=token,
    )


def _download(name: str, **options: Any) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )
    except ImportError:
        raise MissingExtraError(
            "huggingface_hub", "hub", f"Loading {name!r} from the hub"
        ) from None

    def fetch(*patterns: str) -> Path:
        try:
            return Path(
                snapshot_download(name, allow_patterns=[*_SMALL_FILES, *patterns], **options)
            )
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise CheckpointError(
                f"There is no folder {name!r}, and downloading it from the hub failed: "
                f"{str(error)[:300]}"
            ) from None

    folder = fetch("*.safetensors")
    if not any(folder.glob("*.safetensors")):
        folder = fetch("*.bin")
    return folder


@dataclass(frozen=True, slots=True)
class Description:
    """A tensor in a file, not yet read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path


class Weights:
    """All tensors of a model folder.

    tensors: by key, in the order of the files.
    """

    def __init__(
        self, folder: Path, files: Mapping[str, frozenset[str] | None], codes: bool = False
    ) -> None:
        """files: the keys that the index lists for each file name; None without an index.
        codes: whether the weights may be quantised, and so include 8-bit integers.
        """
        self.tensors: dict[str, Description] = {}
        self.pickled = any(name.endswith(".bin") for name in files)
        for name, listed in files.items():
            path = inside(folder, name)
            described = _describe_pickled(path) if self.pickled else _describe(path, codes)
            if listed is not None and listed != described.keys():
                key = min(listed ^ described.keys())
                where = "the index" if key in listed else "the file"
                raise CheckpointError(
                    f"{name} and the weight index differ: only {where} has {key[:200]!r}. The "
                    "folder mixes files of different models, or a download is incomplete."
                )
            for key, description in described.items():
                if key in self.tensors:
                    raise CheckpointError(f"{key[:200]!r} is in two weight files.")
                self.tensors[key] = description

    def read(self, keys: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (key, tensor) of the keys, file by file; tensors are memory-mapped."""
        by_file: dict[Path, list[str]] = {}
        for key, description in self.tensors.items():
            if key in keys:
                by_file.setdefault(description.file, []).append(key)
        for path, names in by_file.items():
            if self.pickled:
                loaded = unpickle(path)
                yield from ((name, loaded[name]) for name in names)
            else:
                with _opened(path) as file:
                    yield from ((name, file.get_tensor(name)) for name in names)

    def equal(self, first: str, second: str) -> bool:
        """Return whether two tensors are equal."""
        one, two = self.tensors[first], self.tensors[second]
        if (one.shape, one.dtype) != (two.shape, two.dtype):
            return False
        found = dict(self.read({first, second}))
        return torch.equal(found[first], found[second])


def open_weights(folder: Path, codes: bool = False) -> Weights:
    """Find the weights of a model folder as transformers does, safetensors first.

    codes: whether they are quantised; these have another file name.
    """
    singles = (QUANTISED,) if codes else (SAFETENSORS, PICKLED)
    for single in singles:
        if (folder / single).is_file():
            return Weights(folder, {single: None}, codes)
        index = folder / f"{single}.index.json"
        if index.is_file():
            return Weights(folder, _read_index(folder, index.name), codes)
    raise CheckpointError(
        f"There are no weights in {str(folder)!r}: no {' and no '.join(singles)}, single or with "
        "an index."
    )


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file in the folder; a path outside of it is an error.

    In a cache of huggingface_hub, links from a snapshot to its blobs are followed.
    """
    plain = name and Path(name).name == name and name not in (".", "..") and "\0" not in name
    path = folder / name if plain and "\\" not in name else None
    if path is None:
        raise CheckpointError(
            f"The weight index names the file {name[:200]!r}, which is not a plain file name."
        )
    home = folder.resolve()
    roots = [home]
    if home.parent.name == "snapshots":
        roots.append(home.parent.parent / "blobs")
    target = path.resolve()
    if not any(target.is_relative_to(root) for root in roots):
        raise CheckpointError(f"{name[:200]!r} is a link to a file outside of the model folder.")
    if not target.is_file():
        raise CheckpointError(
            f"The file {name[:200]!r} is missing in {str(folder)!r}; the model is incomplete."
        )
    return path


def read_json(folder: Path, name: str, largest: int | None = LARGEST_CONFIG) -> dict[str, Any]:
    """Read a JSON object of at most `largest` bytes. Raises CheckpointError."""
    path = inside(folder, name)
    if largest is not None and path.stat().st_size > largest:
        raise CheckpointError(f"{name} has {path.stat().st_size} bytes; that is no configuration.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"Cannot read {name}: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{name} must hold a JSON object.")
    return values


def _read_index(folder: Path, name: str) -> dict[str, frozenset[str]]:
    file_of = read_json(folder, name, largest=None).get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
        raise CheckpointError(f"{name} has no weight_map from tensors to files.")
    suffix = ".bin" if name.startswith(PICKLED) else ".safetensors"
    keys: dict[str, set[str]] = {}
    for key, file in file_of.items():
        if not file.endswith(suffix):
            raise CheckpointError(f"{name} names the file {file[:200]!r}, not a {suffix} file.")
        keys.setdefault(file, set()).add(key)
    if not keys:
        raise CheckpointError(f"The weight_map of {name} is empty.")
    return {file: frozenset(names) for file, names in keys.items()}


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} is damaged: {str(error)[:200]}") from None


def _describe(path: Path, codes: bool) -> dict[str, Description]:
    described = {}
    known = _DTYPES | _CODES if codes else _DTYPES
    with _opened(path) as file:
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            part = file.get_slice(key)
            dtype = known.get(part.get_dtype())
            if dtype is None:
                raise CheckpointError(
                    f"{key[:200]!r} in {path.name} is of type {part.get_dtype()}; weights are "
                    f"{', '.join(known)}."
                )
            described[key] = Description(tuple(part.get_shape()), dtype, path)
    return described


def _describe_pickled(path: Path) -> dict[str, Description]:
    described = {}
    total = 0
    for key, tensor in unpickle(path).items():
        dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided
        if not dense or tensor.dtype not in _DTYPES.values():
            raise CheckpointError(f"{key[:200]!r} in {path.name} is not a tensor of numbers.")
        size = tensor.numel() * tensor.element_size()
        total += size
        # Tensors may share memory, as the four names of the embedding do.
        if size > tensor.untyped_storage().nbytes() or total > 4 * path.stat().st_size:
            raise CheckpointError(f"{key[:200]!r} in {path.name} claims more than the file holds.")
        described[key] = Description(tuple(tensor.shape), tensor.dtype, path)
    return described


@dataclass(frozen=True, slots=True)
class TensorOffset:
    """Where a tensor lies in a file: its first byte, shape and dtype."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def slice(self, index: int) -> "TensorOffset":
        """Return the offset of `self[index]`."""
        part = TensorOffset(self.file, self.offset, self.shape[1:], self.dtype)
        return TensorOffset(self.file, self.offset + index * part.num_bytes, part.shape, part.dtype)


def find_tensor_offsets(tensors: Mapping[str, Description]) -> dict[str, TensorOffset]:
    """Return the offset of each tensor of safetensors files, as described by `Weights`."""
    ranges = {path: _byte_ranges(path) for path in {tensor.file for tensor in tensors.values()}}
    found = {}
    for key, tensor in tensors.items():
        start, stop = ranges[tensor.file].get(key, (0, -1))
        offset = TensorOffset(tensor.file, start, tensor.shape, tensor.dtype)
        if stop - start != offset.num_bytes:
            raise _changed(tensor.file)
        found[key] = offset
    return found


def _byte_ranges(path: Path) -> dict[str, tuple[int, int]]:
    """Return the first byte of every tensor in the file, and the end of the last."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > os.fstat(file.fileno()).st_size:
                raise _changed(path)
            header = json.loads(file.read(length))
    except (OSError, ValueError):
        raise _changed(path) from None
    data = 8 + length
    return {
        key: (data + value["data_offsets"][0], data + value["data_offsets"][1])
        for key, value in header.items()
        if key != "__metadata__"
    }


def _changed(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path.name} changed while it was being opened. Try again when the program that writes "
        "it has finished."
    )


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Return an uninitialised tensor, on large pages in main memory."""
    if torch.device(device).type == "cpu":
        return memory.empty_on_large_pages(shape, dtype)
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Set the parameter or buffer of that name."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    is_parameter = isinstance(getattr(module, attribute), nn.Parameter)
    setattr(module, attribute, nn.Parameter(tensor) if is_parameter else tensor)
