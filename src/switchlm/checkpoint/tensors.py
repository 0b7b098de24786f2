"""Parts of named tensors to safetensors files and back, bit for bit, on any layout.

A file holds some parts under the names of their tensors; where a part stands in its tensor is in
the metadata of the header, written as torch.distributed.checkpoint (DCP) writes it, which can read
these files. Files are written in one go with their SHA-256, and mapped into memory when read, so
that a process reads no more than it needs. Nothing is pickled.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from switchlm.checkpoint.format import CODES
from switchlm.checkpoint.layout import Layout, Region, overlap, part_of, region_of, slices, volume
from switchlm.errors import CheckpointError

FILE_BYTES = 2**28  # about; a larger part has a file of its own
OFFSETS = "DCP_SHARDING_INFO"


@dataclass(frozen=True)
class Piece:
    """A part of a tensor on its way to a file: CPU memory, and where it starts in the tensor."""

    tensor: Tensor
    offset: tuple[int, ...]
    file: str


@dataclass(frozen=True)
class Stored:
    """A part of a tensor in a file: its box, the dtype's code, the file's name."""

    box: Region
    code: str
    file: str


def assign_files(layout: Layout, item_bytes: Mapping[str, int]) -> dict[tuple[str, int], str]:
    """Return the file of each (name, rank); a file is of one rank, of about FILE_BYTES."""
    numbers: dict[tuple[str, int], int] = {}
    number = 0
    by_rank: dict[int, list[tuple[str, int]]] = {}
    for name, holders in layout.items():
        for held in holders:
            size = volume(held.box) * item_bytes[name]
            if size:
                by_rank.setdefault(held.rank, []).append((name, size))
    for rank, parts in sorted(by_rank.items()):
        filled = FILE_BYTES
        for name, size in parts:
            if filled + size > FILE_BYTES:
                number, filled = number + 1, 0
            filled += size
            numbers[name, rank] = number
    return {key: f"model-{n:05}-of-{number:05}.safetensors" for key, n in numbers.items()}


def save(folder: Path, pieces: Mapping[str, Piece]) -> dict[str, dict[str, Any]]:
    """Write the pieces into their files, synced; return size and SHA-256 by file.

    Raises OSError.
    """
    files: dict[str, dict[str, Piece]] = {}
    for name, piece in pieces.items():
        files.setdefault(piece.file, {})[name] = piece
    return {file: _write(folder / file, content) for file, content in files.items()}


def index(paths: Iterable[Path]) -> Iterator[tuple[str, Stored]]:
    """Yield the name and place of every part in the files, from their headers.

    Raises CheckpointError for a file whose header makes no sense.
    """
    for path in paths:
        with _opened(path) as file:
            try:
                offsets = json.loads((file.metadata() or {}).get(OFFSETS, "{}"))
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    part = file.get_slice(name)
                    shape = part.get_shape()
                    start = offsets[name]["saved_offsets"] if name in offsets else [0] * len(shape)
                    box = tuple((int(a), int(a) + n) for a, n in zip(start, shape, strict=True))
                    yield name, Stored(box, part.get_dtype(), path.name)
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                raise CheckpointError(f"The header of {str(path)!r} is damaged: {error}") from None


@torch.no_grad()
def load(folder: Path, into: Mapping[str, Tensor], stored: Mapping[str, Iterable[Stored]]) -> None:
    """Fill what is here of each tensor from the parts that overlap it; nothing else is read."""
    wanted: dict[str, list[tuple[str, Region, Region, Region]]] = {}
    for name, tensor in into.items():
        here = region_of(tensor)
        for part in stored.get(name, ()):
            common = overlap(here, part.box)
            if common is not None:
                wanted.setdefault(part.file, []).append((name, here, part.box, common))
    for file_name, parts in wanted.items():
        with _opened(folder / file_name) as file:
            for name, here, box, common in parts:
                found = file.get_tensor(name)  # backed by the file, read where it is used
                part_of(into[name])[slices(common, here)].copy_(found[slices(common, box)])


def header(shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Any) -> bytes:
    """Return the header of a safetensors file that holds such tensors in this order.

    The format wants no gaps, so put larger dtypes first to have all of them aligned.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    start = 0
    for name, (dtype, shape) in shapes.items():
        stop = start + volume(tuple((0, size) for size in shape)) * dtype.itemsize
        entries[name] = {
            "dtype": CODES[dtype],
            "shape": list(shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def raw(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, without a copy."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _write(path: Path, pieces: Mapping[str, Piece]) -> dict[str, Any]:
    ordered = dict(sorted(pieces.items(), key=lambda item: (-item[1].tensor.itemsize, item[0])))
    offsets = {name: {"saved_offsets": list(piece.offset)} for name, piece in ordered.items()}
    head = header(
        {name: (piece.tensor.dtype, tuple(piece.tensor.shape)) for name, piece in ordered.items()},
        {OFFSETS: json.dumps(offsets), "DCP_VERSION": "1.0"},
    )
    digest = hashlib.sha256(head)
    size = len(head)
    with path.open("wb") as stream:
        stream.write(head)
        for piece in ordered.values():
            content = raw(piece.tensor)
            stream.write(content)
            digest.update(content)
            size += len(content)
        stream.flush()
        os.fsync(stream.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged: {str(error)[:200]}") from None
