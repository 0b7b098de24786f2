"""Reading experts from files into memory that is used again and again.

Plain reads, no maps: a file that is cut short is an error and not the end of the process, what is
read counts against the budget that it was given, and nothing but that stays resident.
"""

import math
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from switchlm.checkpoint.extents import Extent
from switchlm.errors import CheckpointError

ALIGNMENT = 64  # bytes, a line of cache, where tensors begin in memory
STAGE = 2**21  # bytes read at a time where numbers are converted on their way


@dataclass(frozen=True)
class Recipe:
    """What makes up one expert: its tensors by name, where they lie, and their dtype in memory.

    dtype: None keeps that of the files; codes of quantised weights (integers) always keep theirs.
    """

    parts: Mapping[str, Extent]
    dtype: torch.dtype | None = None

    def dtype_of(self, part: Extent) -> torch.dtype:
        keeps = self.dtype is None or not part.dtype.is_floating_point
        return part.dtype if keeps or self.dtype is None else self.dtype

    def num_bytes(self) -> int:
        """Return the bytes it takes in memory."""
        return sum(_padded(self._size(part)) for part in self.parts.values())

    def file_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts.values())

    def converts(self) -> bool:
        return any(self.dtype_of(part) != part.dtype for part in self.parts.values())

    def place(self) -> tuple[str, int]:
        """Return where it begins, for reading in the order of the files."""
        return min((str(part.file), part.offset) for part in self.parts.values())

    def tensors(self, room: Tensor) -> dict[str, Tensor]:
        """Return the tensors over that memory: uint8, `num_bytes` of them."""
        found, start = {}, 0
        for name, part in self.parts.items():
            flat = room[start : start + self._size(part)].view(self.dtype_of(part))
            found[name] = flat.view(part.shape)
            start += _padded(self._size(part))
        return found

    def _size(self, part: Extent) -> int:
        return math.prod(part.shape) * self.dtype_of(part).itemsize


class ExpertFiles:
    """The open files that experts lie in, and how they were when they were opened."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files: dict[Path, tuple[int, tuple[int, int]]] = {}
        for path in paths:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(f"Cannot open {str(path)!r}: {error.strerror}.") from None
            self._files[path] = descriptor, _state(descriptor)
        self._close = weakref.finalize(self, _close, self._files)

    def read(self, recipe: Recipe, room: Tensor) -> None:
        """Fill memory with an expert; CheckpointError where a file is not what it was."""
        for name, tensor in recipe.tensors(room).items():
            part = recipe.parts[name]
            descriptor, before = self._files[part.file]
            if tensor.dtype == part.dtype:
                self._fill(part, descriptor, 0, tensor.view(-1).view(torch.uint8))
            else:
                self._convert(part, descriptor, tensor.view(-1))
            if _state(descriptor) != before:
                raise _changed(part.file, "changed")

    def close(self) -> None:
        """Close the files; nothing can be read any more."""
        self._close()

    def _fill(self, part: Extent, descriptor: int, start: int, target: Tensor) -> None:
        """Read from byte `start` of the part as many bytes as the target has."""
        view, done = memoryview(cast(Any, target.numpy())), 0
        while done < len(view):
            try:
                count = os.preadv(descriptor, [view[done:]], part.offset + start + done)
            except OSError as error:
                raise CheckpointError(f"Cannot read {part.file.name}: {error.strerror}.") from None
            if not count:
                raise _changed(part.file, "was cut short")
            done += count

    def _convert(self, part: Extent, descriptor: int, target: Tensor) -> None:
        """Read a part a piece at a time, as numbers of another dtype."""
        step = STAGE // part.dtype.itemsize
        stage = torch.empty(min(step, target.numel()), dtype=part.dtype)
        for first in range(0, target.numel(), step):
            piece = target[first : first + step]
            raw = stage[: piece.numel()]
            self._fill(part, descriptor, first * part.dtype.itemsize, raw.view(torch.uint8))
            piece.copy_(raw)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _state(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns


def _close(files: dict[Path, tuple[int, tuple[int, int]]]) -> None:
    while files:
        os.close(files.popitem()[1][0])


def _changed(path: Path, how: str) -> CheckpointError:
    return CheckpointError(
        f"{path.name} {how} while the model was in use, and its experts are read from it as they "
        "are needed. Load the model again, and replace model folders as a whole instead of "
        "writing into them."
    )
