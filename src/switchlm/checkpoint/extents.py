"""Where tensors lie in safetensors files: for reading parts of them again and again, without a map.

A mapped file that is cut short while in use kills the process; a read that comes back short is an
error that can be told.
"""

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from switchlm.checkpoint.weights import Description
from switchlm.errors import CheckpointError

HEADER = struct.Struct("<Q")  # the length of the JSON that follows


@dataclass(frozen=True, slots=True)
class Extent:
    """Consecutive bytes of a file that are a tensor of that shape and dtype."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size

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
            (length,) = HEADER.unpack(file.read(HEADER.size))
            if length > os.fstat(file.fileno()).st_size:
                raise _changed(path)
            header = json.loads(file.read(length))
    except (OSError, ValueError, struct.error):
        raise _changed(path) from None
    data = HEADER.size + length
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
