"""Which region of each tensor is on which rank, and in which safetensors file.

A region is the part of a tensor between a start and a stop in every dim. Tensors may be DTensors on
any mesh, or plain tensors, which are complete on every rank. Replicas are found by equal regions,
since a DTensor need not have every axis along which it is replicated.

A file holds parts of tensors under their names; the offsets of a part are in the metadata of the
header, in the format of torch.distributed.checkpoint (DCP), which can read these files. Files are
mapped into memory when read, so a process reads only the parts that it needs.
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
from switchlm.checkpoint.format import CODES, whole
from switchlm.errors import CheckpointError
from switchlm.model.layers import local

FILE_BYTES = 2**28  # approximate size of a file; a larger part has a file of its own
OFFSETS = "DCP_SHARDING_INFO"

Region = tuple[tuple[int, int], ...]
Place = tuple[tuple[int, ...], str]  # offsets of a part in its tensor, and its file


@dataclass(frozen=True)
class StoredRegion:
    """A region of a tensor, and the rank that saves or sends it."""

    rank: int
    region: Region


Layout = dict[str, list[StoredRegion]]


def full_region(shape: tuple[int, ...]) -> Region:
    """Return the region of a full tensor."""
    return tuple((0, size) for size in shape)


def region_of(tensor: Tensor) -> Region:
    """Return the region of a tensor on this rank; CheckpointError if the part is no region.

    Several axes may split one dim (FSDP after tensor or expert parallelism); PyTorch orders them so
    that the part of a rank is contiguous if the later split is even.
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
            f"Cannot save a tensor {list(tensor.shape)} with the placements "
            f"{list(tensor.placements)}: the part of a rank is not contiguous."
        )
    return tuple((start, start + size) for start, size in zip(offset, shape, strict=True))


def part_of(tensor: Tensor) -> Tensor:
    """Return the part of a tensor on this rank, without a copy."""
    return local(tensor.detach())


def overlap(one: Region, other: Region) -> Region | None:
    """Return the intersection of two regions, None if it is empty."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return common if all(start < stop for start, stop in common) else None


def slices(region: Region, inside: Region) -> tuple[slice, ...]:
    """Return the slices of `region` in a tensor that holds the region `inside`."""
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(region, inside, strict=True))


def volume(region: Region) -> int:
    """Return the number of elements of a region."""
    return math.prod(max(stop - start, 0) for start, stop in region)


class Planner:
    """Computes the layout, and caches it until a tensor changes on some rank."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._digests: list[str] = []
        self._layout: Layout = {}

    def layout(self, tensors: Mapping[str, Tensor]) -> Layout:
        """Return the regions of every tensor, each once, with the rank that saves it.

        Of replicas, the rank with the fewest bytes so far saves it; rank 0 saves plain tensors.
        Raises CheckpointError if ranks have tensors of other names, shapes or dtypes.
        """
        if self.ranks.size == 1:
            return {
                name: [StoredRegion(0, full_region(tuple(t.shape)))] for name, t in tensors.items()
            }
        regions = {
            name: region_of(tensor) if isinstance(tensor, DTensor) else None
            for name, tensor in tensors.items()
        }
        kinds = [(name, str(t.dtype), list(t.shape)) for name, t in tensors.items()]
        digests = self.ranks.on_all_ranks(lambda: _digest([kinds, regions]))
        if digests != self._digests:
            found = self.ranks.on_all_ranks(lambda: (kinds, list(regions.values())))
            for rank, (theirs, _) in enumerate(found):
                if theirs != found[0][0]:
                    raise CheckpointError(
                        f"Rank {rank} saves other tensors than rank 0; names, shapes and dtypes "
                        "must be the same on all ranks."
                    )
            self._layout = _assign(tensors, [regions_of_rank for _, regions_of_rank in found])
            self._digests = digests
        return self._layout


def _assign(tensors: Mapping[str, Tensor], regions_by_rank: list[list[Region | None]]) -> Layout:
    layout: Layout = {}
    load = [0] * len(regions_by_rank)
    for index, (name, tensor) in enumerate(tensors.items()):
        holders: dict[Region, list[int]] = {}
        for rank, regions in enumerate(regions_by_rank):
            region = regions[index]
            if region is None and rank == 0:  # a plain tensor
                region = full_region(tuple(tensor.shape))
            if region is not None:
                holders.setdefault(region, []).append(rank)
        layout[name] = []
        for region, ranks in sorted(holders.items()):
            if volume(region):
                rank = min(ranks, key=load.__getitem__)
                load[rank] += volume(region) * tensor.dtype.itemsize
                layout[name].append(StoredRegion(rank, region))
    return layout


def _digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class FileRegion:
    """A region of a tensor in a file: `code` is the dtype's in safetensors, `file` a name."""

    region: Region
    code: str
    file: str


def assign_files(layout: Layout, item_bytes: Mapping[str, int]) -> dict[tuple[str, int], str]:
    """Return the file of each (tensor, rank); a file is written by one rank."""
    numbers: dict[tuple[str, int], int] = {}
    number = 0
    by_rank: dict[int, list[tuple[str, int]]] = {}
    for name, holders in layout.items():
        for held in holders:
            size = volume(held.region) * item_bytes[name]
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
    """Write parts of tensors, in CPU memory, to their files, and sync them.

    Returns size and SHA-256 by file. Raises OSError.
    """
    by_file: dict[str, dict[str, Tensor]] = {}
    for name, (_, file) in places.items():
        by_file.setdefault(file, {})[name] = parts[name]
    return {file: _write(folder / file, places, held) for file, held in by_file.items()}


def index(paths: Iterable[Path]) -> Iterator[tuple[str, FileRegion]]:
    """Yield the name and region of every part in the files, from their headers.

    Raises CheckpointError for an invalid header.
    """
    for path in paths:
        with _opened(path) as file:
            try:
                offsets = json.loads((file.metadata() or {}).get(OFFSETS, "{}"))
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    part = file.get_slice(name)
                    shape = part.get_shape()
                    start = offsets[name]["saved_offsets"] if name in offsets else [0] * len(shape)
                    region = tuple((whole(a), a + n) for a, n in zip(start, shape, strict=True))
                    yield name, FileRegion(region, part.get_dtype(), path.name)
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                raise CheckpointError(f"The header of {str(path)!r} is damaged: {error}") from None


@torch.no_grad()
def load(
    folder: Path, into: Mapping[str, Tensor], stored: Mapping[str, Iterable[FileRegion]]
) -> None:
    """Fill this rank's part of each tensor; reads only the parts of files that overlap it."""
    wanted: dict[str, list[tuple[str, Region, Region, Region]]] = {}
    for name, tensor in into.items():
        here = region_of(tensor)
        for part in stored.get(name, ()):
            common = overlap(here, part.region)
            if common is not None:
                wanted.setdefault(part.file, []).append((name, here, part.region, common))
    for file_name, parts in wanted.items():
        with _opened(folder / file_name) as file:
            for name, here, region, common in parts:
                found = file.get_tensor(name)  # memory-mapped: only the slices are read
                part_of(into[name])[slices(common, here)].copy_(found[slices(common, region)])


def header(shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Any) -> bytes:
    """Return the header of a safetensors file of tensors in this order, without gaps.

    shapes: dtype and shape by name, larger dtypes first, so that all are aligned.
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
