"""Find a model folder, or one on the hub; what its weight files hold, tensor by tensor.

Names in an index are not to be trusted: a file is only opened if it lies in the folder. Shapes are
known before any tensor is read. safetensors files are mapped into memory, never read whole; `.bin`
files are unpickled with weights_only, which runs no code of theirs.

Parts that are read again and again, such as experts left in their files, are read by offset and not
through a map: a mapped file that is cut short while in use kills the process, while a read that
comes back short is an error with a message.
"""

import json
import math
import os
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from switchlm.checkpoint.format import CODES
from switchlm.errors import CheckpointError, MissingExtraError

CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
# A name of its own, so that no other reader takes it for weights.
QUANTISED = "quantised.safetensors"
PICKLED = "pytorch_model.bin"
LARGEST_CONFIG = 2**24  # bytes
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[\w.-]{1,96})?", re.ASCII)
_SMALL_FILES = ("*.json", "tokenizer*", "*.txt", "README.md")
_DTYPES = {
    CODES[dtype]: dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}
_CODES = {CODES[dtype]: dtype for dtype in (torch.int8, torch.uint8)}  # of quantised weights


def find_model(
    name: str | Path, revision: str | None = None, local_files_only: bool = False
) -> Path:
    """Return the folder of a model: DIR/model of a run, DIR itself, or the cached files of the hub.

    Cache, offline mode and token are huggingface_hub's own (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN).
    """
    folder = Path(name)
    if (folder / CONFIG).is_file():
        return folder
    if (folder / "model" / CONFIG).is_file():
        return folder / "model"
    if folder.exists():
        raise CheckpointError(
            f"{str(name)!r} is neither a model folder ({CONFIG} is missing) nor a run with a saved "
            "model in it."
        )
    if isinstance(name, Path) or not _HUB_NAME.fullmatch(name):
        raise CheckpointError(f"There is no folder {str(name)!r}, and it is no name on the hub.")
    return _download(name, revision, local_files_only)


def _download(name: str, revision: str | None, local_files_only: bool) -> Path:
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
                snapshot_download(
                    name,
                    revision=revision,
                    local_files_only=local_files_only,
                    allow_patterns=[*_SMALL_FILES, *patterns],
                )
            )
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise CheckpointError(
                f"There is no folder {name!r}, and the hub could not give it: {str(error)[:300]}"
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

    tensors: what there is, by key, in the order of the files.
    """

    def __init__(
        self, folder: Path, files: Mapping[str, frozenset[str] | None], codes: bool = False
    ) -> None:
        """files: names of files, and the keys the index promises of each, None without one.
        codes: whether the weights may be quantised: codes of 8 bits among the numbers.
        """
        self.tensors: dict[str, Description] = {}
        self.pickled = any(name.endswith(".bin") for name in files)
        for name, promised in files.items():
            path = inside(folder, name)
            described = _describe_pickled(path) if self.pickled else _describe(path, codes)
            if promised is not None and promised != described.keys():
                key = min(promised ^ described.keys())
                where = "the index" if key in promised else "the file"
                raise CheckpointError(
                    f"{name} and the weight index disagree: only {where} has {key[:200]!r}. The "
                    "folder mixes files of different models, or a download is incomplete."
                )
            for key, description in described.items():
                if key in self.tensors:
                    raise CheckpointError(f"{key[:200]!r} is in two weight files.")
                self.tensors[key] = description

    def read(self, keys: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (key, tensor) of the keys, file by file; a tensor is backed by its file."""
        by_file: dict[Path, list[str]] = {}
        for key, description in self.tensors.items():
            if key in keys:
                by_file.setdefault(description.file, []).append(key)
        for path, names in by_file.items():
            if self.pickled:
                loaded = _unpickle(path)
                yield from ((name, loaded[name]) for name in names)
            else:
                with _opened(path) as file:
                    yield from ((name, file.get_tensor(name)) for name in names)

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors hold the same numbers."""
        one, two = self.tensors[first], self.tensors[second]
        if (one.shape, one.dtype) != (two.shape, two.dtype):
            return False
        found = dict(self.read({first, second}))
        return torch.equal(found[first], found[second])


def open_weights(folder: Path, codes: bool = False) -> Weights:
    """Find the weights of a model folder as transformers does, safetensors first.

    codes: whether they are quantised, and so have another name.
    """
    singles = (QUANTISED,) if codes else (SAFETENSORS, PICKLED)
    for single in singles:
        if (folder / single).is_file():
            return Weights(folder, {single: None}, codes)
        index = folder / f"{single}.index.json"
        if index.is_file():
            return Weights(folder, _read_index(folder, index.name), codes)
    raise CheckpointError(
        f"There are no weights in {str(folder)!r}: no {' and no '.join(singles)}, whole or with an "
        "index."
    )


def inside(folder: Path, name: str) -> Path:
    """Return the file of that name in the folder; anything that leads out of it is an error.

    In a cache of huggingface_hub, links from a snapshot to the blobs beside it are followed.
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
        raise CheckpointError(f"{name[:200]!r} is a link that leads out of the model folder.")
    if not target.is_file():
        raise CheckpointError(
            f"The file {name[:200]!r} is missing in {str(folder)!r}; the model is incomplete."
        )
    return path


def read_json(folder: Path, name: str, largest: int | None = LARGEST_CONFIG) -> dict[str, Any]:
    """Read a JSON object of at most so many bytes; every damage is a CheckpointError."""
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
    places = read_json(folder, name, largest=None).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{name} has no weight_map from tensors to files.")
    suffix = ".bin" if name.startswith(PICKLED) else ".safetensors"
    keys: dict[str, set[str]] = {}
    for key, file in places.items():
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


def _unpickle(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:  # damaged pickles program the unpickler, wrong arguments and all
        raise CheckpointError(
            f"{path.name} is damaged, or holds more than tensors, which could run code and is not "
            f"read: {str(error)[:200]}"
        ) from None
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise CheckpointError(f"{path.name} holds no table of tensors.")
    return loaded


def _describe_pickled(path: Path) -> dict[str, Description]:
    described = {}
    claimed = 0
    for key, tensor in _unpickle(path).items():
        whole = isinstance(tensor, Tensor) and tensor.layout == torch.strided
        if not whole or tensor.dtype not in _DTYPES.values():
            raise CheckpointError(f"{key[:200]!r} in {path.name} is not a tensor of numbers.")
        size = tensor.numel() * tensor.element_size()
        claimed += size
        # Tensors may be views of one memory: honest ones are the four names of the embedding.
        if size > tensor.untyped_storage().nbytes() or claimed > 4 * path.stat().st_size:
            raise CheckpointError(f"{key[:200]!r} in {path.name} claims more than the file holds.")
        described[key] = Description(tuple(tensor.shape), tensor.dtype, path)
    return described


@dataclass(frozen=True, slots=True)
class Extent:
    """Consecutive bytes of a file that are a tensor of that shape and dtype."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def slice(self, index: int) -> "Extent":
        """Return the index-th part along the first dim."""
        part = Extent(self.file, self.offset, self.shape[1:], self.dtype)
        return Extent(self.file, self.offset + index * part.num_bytes, part.shape, part.dtype)


def find_extents(tensors: Mapping[str, Description]) -> dict[str, Extent]:
    """Return where each of the tensors lies, which `weights.Weights` found in safetensors files."""
    starts = {path: _starts(path) for path in {tensor.file for tensor in tensors.values()}}
    found = {}
    for key, tensor in tensors.items():
        start, stop = starts[tensor.file].get(key, (0, -1))
        extent = Extent(tensor.file, start, tensor.shape, tensor.dtype)
        if stop - start != extent.num_bytes:
            raise _changed(tensor.file)
        found[key] = extent
    return found


def _starts(path: Path) -> dict[str, tuple[int, int]]:
    """Return the first byte of every tensor in the file, and the one after its last."""
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
        f"{path.name} changed while it was being opened. Let whatever writes it finish, then try "
        "again."
    )


def put_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make a tensor the parameter or the buffer of that name."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    is_parameter = isinstance(getattr(module, attribute), nn.Parameter)
    setattr(module, attribute, nn.Parameter(tensor) if is_parameter else tensor)
