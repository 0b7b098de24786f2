"""Which part of each tensor is where: boxes, and who of several holders of one stands for them.

A box is the part of a tensor between a start and a stop in every dim. Tensors may be DTensors on
any mesh, or plain ones, which every rank holds whole. Replicas are found by their boxes, since a
tensor need not know every axis along which it is repeated.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor

from switchlm import _torch
from switchlm.checkpoint.collective import Ranks
from switchlm.errors import CheckpointError
from switchlm.model.layers import local

Region = tuple[tuple[int, int], ...]


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
            name: [list(side) for side in region_of(tensor)]
            if isinstance(tensor, DTensor)
            else None
            for name, tensor in tensors.items()
        }
        digests = self.ranks.on_all_ranks(lambda: _digest([list(boxes), _kinds(tensors), boxes]))
        if digests != self._digests:
            kinds = self.ranks.on_all_ranks(lambda: _digest(_kinds(tensors)))
            for rank, kind in enumerate(kinds):
                if kind != kinds[0]:
                    raise CheckpointError(
                        f"Rank {rank} saves other tensors than rank 0; all must have the same "
                        "names, shapes and dtypes."
                    )
            everywhere = self.ranks.on_all_ranks(lambda: list(boxes.values()))
            self._layout = _assign(tensors, everywhere)
            self._digests = digests
        return self._layout


def _assign(
    tensors: Mapping[str, Tensor], boxes_by_rank: list[list[list[list[int]] | None]]
) -> Layout:
    layout: Layout = {}
    load = [0] * len(boxes_by_rank)
    for index, (name, tensor) in enumerate(tensors.items()):
        holders: dict[Region, list[int]] = {}
        for rank, boxes in enumerate(boxes_by_rank):
            found = boxes[index]
            if found is None:
                if rank == 0:
                    holders[full_region(tuple(tensor.shape))] = [0]
                continue
            box = tuple((start, stop) for start, stop in found)
            holders.setdefault(box, []).append(rank)
        layout[name] = []
        for box, ranks in sorted(holders.items()):
            if volume(box):
                rank = min(ranks, key=load.__getitem__)
                load[rank] += volume(box) * tensor.dtype.itemsize
                layout[name].append(StoredRegion(rank, box))
    return layout


def _kinds(tensors: Mapping[str, Tensor]) -> list[tuple[str, str, list[int]]]:
    return [(name, str(t.dtype), list(t.shape)) for name, t in tensors.items()]


def _digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
