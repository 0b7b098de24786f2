"""The weight files of a model folder, written by all ranks, none of which ever holds the model.

The tensors of the files go by one at a time, in one order on all ranks: those that hold a part of
it send the part to the rank that writes the file, which keeps only what it is writing.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from switchlm.checkpoint.layout import Held, Planner, box_of, overlap, part_of, slices, whole
from switchlm.checkpoint.names import Entry
from switchlm.checkpoint.ranks import Ranks
from switchlm.checkpoint.tensors import header, raw
from switchlm.checkpoint.weights import SAFETENSORS


@dataclass(frozen=True)
class Shard:
    """A weight file: its name, the keys in it, and the bytes of their tensors."""

    file: str
    keys: list[str]
    num_bytes: int


@torch.no_grad()
def write_shards(
    folder: Path, tensors: Mapping[str, Tensor], shards: list[list[Entry]], ranks: Ranks
) -> list[Shard]:
    """Write a file a shard into `folder`, each rank its own; return what they hold.

    tensors: of the model by our names, plain or DTensors. An error of one rank is raised on all.
    """
    layout = Planner(ranks).layout(tensors)
    # The format wants no gaps: with larger dtypes first all tensors are aligned.
    shards = [sorted(s, key=lambda entry: -tensors[entry.ours].element_size()) for s in shards]
    files = [shard_name(number, len(shards)) for number in range(len(shards))]
    problem: OSError | None = None
    for first in range(0, len(shards), ranks.size):
        now = shards[first : first + ranks.size]  # one a rank, written at the same time
        output = None
        if ranks.rank < len(now):
            head = _header(now[ranks.rank], tensors)
            output = _Output(folder / files[first + ranks.rank], head)
        for turn in zip_longest(*now):
            for writer, entry in enumerate(turn):
                if entry is None:
                    continue
                found = _fetch(tensors[entry.ours], entry, layout[entry.ours], writer, ranks)
                if output is not None and found is not None:
                    output.write(raw(found))
        if output is not None:
            output.close()
            problem = problem or output.problem

    def report() -> None:
        if problem is not None:
            raise problem

    ranks.each(report)
    return [
        Shard(file, [entry.theirs for entry in shard], sum(_size(e, tensors) for e in shard))
        for file, shard in zip(files, shards, strict=True)
    ]


class _Output:
    """A file that keeps its first error for later.

    The other ranks still wait to be rid of their parts, which must be taken whatever happens here.
    """

    def __init__(self, path: Path, head: bytes) -> None:
        self.problem: OSError | None = None
        self._stream: BinaryIO | None = None
        try:
            self._stream = path.open("wb")
        except OSError as error:
            self.problem = error
        self.write(head)

    def write(self, content: bytes | memoryview) -> None:
        """Append bytes, unless something went wrong before."""
        if self._stream is not None and self.problem is None:
            try:
                self._stream.write(content)
            except OSError as error:
                self.problem = error

    def close(self) -> None:
        """Sync and close."""
        if self._stream is not None:
            try:
                with self._stream:
                    self._stream.flush()
                    os.fsync(self._stream.fileno())
            except OSError as error:
                self.problem = self.problem or error


def shard_name(number: int, count: int, whole: str = SAFETENSORS) -> str:
    """Return the name of a weight file, of so many; `whole` is that of the only one."""
    if count == 1:
        return whole
    return f"{whole.removesuffix('.safetensors')}-{number + 1:05}-of-{count:05}.safetensors"


def _header(shard: list[Entry], tensors: Mapping[str, Tensor]) -> bytes:
    return header({entry.theirs: (tensors[entry.ours].dtype, entry.shape) for entry in shard}, {})


def _size(entry: Entry, tensors: Mapping[str, Tensor]) -> int:
    return math.prod(entry.shape) * tensors[entry.ours].element_size()


def _fetch(
    tensor: Tensor, entry: Entry, holders: list[Held], writer: int, ranks: Ranks
) -> Tensor | None:
    """Return their tensor on the rank that writes it; the others send what they hold of it."""
    wanted = whole(tuple(tensor.shape))
    if entry.expert is not None:
        wanted = ((entry.expert, entry.expert + 1), *wanted[1:])
    target = None
    if ranks.rank == writer:
        target = torch.empty([stop - start for start, stop in wanted], dtype=tensor.dtype)
    for held in holders:
        common = overlap(held.box, wanted)
        if common is None:
            continue
        if ranks.rank == held.rank:
            part = part_of(tensor)[slices(common, box_of(tensor))]
            if target is not None:
                target[slices(common, wanted)].copy_(part)
            else:
                ranks.send(part.cpu().contiguous(), writer)
        elif target is not None:
            part = torch.empty([stop - start for start, stop in common], dtype=tensor.dtype)
            ranks.receive(part, held.rank)
            target[slices(common, wanted)].copy_(part)
    if target is None:
        return None
    return target if entry.expert is None else target[0].t().contiguous()
