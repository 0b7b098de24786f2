"""Which part of each tensor is where: on which rank, and in which safetensors file.

A box is the part of a tensor between a start and a stop in every dim. Tensors may be DTensors on
any mesh, or plain ones, which every rank holds whole. Replicas are found by their boxes, since a
tensor need not know every axis along which it is repeated.

A file holds some parts under the names of their tensors, bit for bit; where a part stands in its
tensor is in the metadata of the header, written as torch.distributed.checkpoint (DCP) writes it,
which can read these files. Files are written in one go with their SHA-256, and mapped into memory
when read, so that a process reads no more than it needs. Nothing is pickled.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from switchlm import _torch
from switchlm.checkpoint.collective import Ranks
from switchlm.checkpoint.format import CODES
from switchlm.errors import CheckpointError
from switchlm.model.layers import local

FILE_BYTES = 2**28  # about; a larger part has a file of its own
OFFSETS = "DCP_SHARDING_INFO"

Region = tuple[tuple[int, int], ...]
Place = tuple[tuple[int, ...], str]  # where a part starts in its tensor, and its file


@dataclass(frozen=True)
class StoredRegion:
    """A part of a tensor, and the rank that saves or sends it."""

    rank: int
    box: Region


Layout = dict[str, list[StoredRegion]]


def full_region(shape: tuple[int, ...]) -> Region:
    """Return the box of all of a tensor."""
    return tuple((0, size) for size in shape)


def region_of(tensor: Tensor) -> Region:
    """Return which part of a tensor is here; CheckpointError if that is no box.

    Several axes may split one dim (FSDP after tensor or expert parallelism): PyTorch orders them so
    that a rank's part is in one piece wherever the later split is even.
    """
    if not isinstance(tensor, DTensor):
        return full_region(tuple(tensor.shape))
    if any(placement.is_partial() for placement in tensor.placements):
        raise CheckpointError(
            f"Cannot save a tensor {list(tensor.shape)} that is a pending sum over processes; "
            "redistribute it first."
        )
    shape, offset = _torch.local_shape_and_offset(tensor)
    if shape != tuple(part_of(tensor).shape):
        raise CheckpointError(
            f"Cannot tell which part of a tensor {list(tensor.shape)}, placed as "
            f"{list(tensor.placements)}, a rank holds."
        )
    return tuple((start, start + size) for start, size in zip(offset, shape, strict=True))


def part_of(tensor: Tensor) -> Tensor:
    """Return the memory of the part that is here."""
    return local(tensor.detach())


def overlap(one: Region, other: Region) -> Region | None:
    """Return the box that two share, None if they do not touch."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return common if all(start < stop for start, stop in common) else None


def slices(box: Region, inside: Region) -> tuple[slice, ...]:
    """Return how to cut `box` out of a tensor that holds `inside`."""
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(box, inside, strict=True))


def volume(box: Region) -> int:
    """Return how many numbers a box holds."""
    return math.prod(max(stop - start, 0) for start, stop in box)


class Planner:
    """Works the layout out anew only when it changes on some rank, since all must talk for it."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._digests: list[str] = []
        self._layout: Layout = {}

    def layout(self, tensors: Mapping[str, Tensor]) -> Layout:
        """Return who holds what of every tensor, each part once; all ranks name the same tensors.

        Of several holders the one with the fewest bytes so far is taken. Plain tensors are rank
        0's. Raises CheckpointError if ranks have different tensors.
        """
        if self.ranks.size == 1:
            return {
                name: [StoredRegion(0, full_region(tuple(t.shape)))] for name, t in tensors.items()
            }
        boxes = {
            name: region_of(tensor) if isinstance(tensor, DTensor) else None
            for name, tensor in tensors.items()
        }
        kinds = [(name, str(t.dtype), list(t.shape)) for name, t in tensors.items()]
        digests = self.ranks.on_all_ranks(lambda: _digest([kinds, boxes]))
        if digests != self._digests:
            found = self.ranks.on_all_ranks(lambda: (kinds, list(boxes.values())))
            for rank, (theirs, _) in enumerate(found):
                if theirs != found[0][0]:
                    raise CheckpointError(
                        f"Rank {rank} saves other tensors than rank 0; all must have the same "
                        "names, shapes and dtypes."
                    )
            self._layout = _assign(tensors, [places for _, places in found])
            self._digests = digests
        return self._layout


def _assign(tensors: Mapping[str, Tensor], boxes_by_rank: list[list[Region | None]]) -> Layout:
    layout: Layout = {}
    load = [0] * len(boxes_by_rank)
    for index, (name, tensor) in enumerate(tensors.items()):
        holders: dict[Region, list[int]] = {}
        for rank, boxes in enumerate(boxes_by_rank):
            box = boxes[index]
            if box is None and rank == 0:  # whole on every rank
                box = full_region(tuple(tensor.shape))
            if box is not None:
                holders.setdefault(box, []).append(rank)
        layout[name] = []
        for box, ranks in sorted(holders.items()):
            if volume(box):
                rank = min(ranks, key=load.__getitem__)
                load[rank] += volume(box) * tensor.dtype.itemsize
                layout[name].append(StoredRegion(rank, box))
    return layout


def _digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


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


def save(
    folder: Path, places: Mapping[str, Place], parts: Mapping[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """Write parts of tensors, in CPU memory, into their files, synced.

    Returns size and SHA-256 by file. Raises OSError.
    """
    by_file: dict[str, dict[str, Tensor]] = {}
    for name, (_, file) in places.items():
        by_file.setdefault(file, {})[name] = parts[name]
    return {file: _write(folder / file, places, held) for file, held in by_file.items()}


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


def _write(path: Path, places: Mapping[str, Place], parts: dict[str, Tensor]) -> dict[str, Any]:
    ordered = dict(sorted(parts.items(), key=lambda item: (-item[1].itemsize, item[0])))
    offsets = {name: {"saved_offsets": list(places[name][0])} for name in ordered}
    head = header(
        {name: (part.dtype, tuple(part.shape)) for name, part in ordered.items()},
        {OFFSETS: json.dumps(offsets), "DCP_VERSION": "1.0"},
    )
    digest = hashlib.sha256(head)
    size = len(head)
    with path.open("wb") as stream:
        stream.write(head)
        for part in ordered.values():
            content = raw(part)
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
