"""Reads of experts from files into reused memory.

Plain reads, no memory maps: a truncated file is an error instead of the end of the process. Large
matrices are read without the page cache (O_DIRECT, where the file system has it), which takes less
processor time and keeps no second copy.
"""

import errno
import math
import mmap
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from switchlm.errors import CheckpointError
from switchlm.huggingface.weights import TensorOffset

ALIGNMENT = 64  # bytes, a cache line, to which tensors in memory are aligned
PAGE = 4096  # bytes, to which direct reads are aligned, in files and in memory
LARGE = 2**20  # bytes from which a matrix is read directly
HUGE = 2**21  # bytes of a large page of memory
GRAIN = 2**14  # numbers converted at a time: so few that PyTorch uses one thread
STAGE = 2**21  # bytes read at a time where numbers are converted


@dataclass(frozen=True)
class Recipe:
    """The tensors of one expert, by name: where they are in files, and their dtype in memory.

    dtype: None keeps that of the files, as codes of quantised weights (integers) always do.
    """

    parts: Mapping[str, TensorOffset]
    dtype: torch.dtype | None = None

    def dtype_of(self, part: TensorOffset) -> torch.dtype:
        """Return the dtype of a part in memory."""
        if self.dtype is None or not part.dtype.is_floating_point:
            return part.dtype
        return self.dtype

    def num_bytes(self) -> int:
        """Return the bytes of the expert in memory."""
        return self._places()[1]

    def file_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts.values())

    def stage_bytes(self) -> int:
        """Return the bytes of the buffer for conversion; zero if the dtype is that of the file."""
        converted = (part for part in self.parts.values() if self.dtype_of(part) != part.dtype)
        return max(map(_stage, converted), default=0)

    def place(self) -> tuple[str, int]:
        """Return the file and offset of the expert, for reading in this order."""
        return min((str(part.file), part.offset) for part in self.parts.values())

    def tensors(self, buffer: Tensor) -> dict[str, Tensor]:
        """Return the tensors as views of `buffer`: uint8, of `num_bytes`."""
        found, starts = {}, self._places()[0]
        for name, part in self.parts.items():
            start = starts[name]
            flat = buffer[start : start + self._size(part)].view(self.dtype_of(part))
            found[name] = flat.view(part.shape)
        return found

    def _places(self) -> tuple[dict[str, int], int]:
        """Return the offset of each part in memory, and the size of all."""
        starts, end = {}, 0
        for name, part in self.parts.items():
            if is_large(part) and self.dtype_of(part) == part.dtype:
                end = _padded(end, PAGE)
                starts[name] = end + part.offset % PAGE
                end += _padded(part.num_bytes, PAGE) + PAGE
            else:
                starts[name] = end
                end += _padded(self._size(part), ALIGNMENT)
        return starts, end

    def _size(self, part: TensorOffset) -> int:
        return math.prod(part.shape) * self.dtype_of(part).itemsize


def is_large(part: TensorOffset) -> bool:
    """Whether it is read in full pages, to the offset in a page that it has in the file."""
    return part.num_bytes >= LARGE and part.offset % part.dtype.itemsize == 0


def _stage(part: TensorOffset) -> int:
    return STAGE + 2 * PAGE if is_large(part) else min(STAGE, part.num_bytes)


def new_buffer(size: int) -> Tensor:
    """Return memory aligned to a page, uint8."""
    if size < LARGE:
        return torch.empty(size, dtype=torch.uint8)
    buffer = mmap.mmap(-1, _padded(size, PAGE), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        buffer.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(buffer, dtype=torch.uint8, count=size)


@dataclass
class _Open:
    """An open file, for plain and for direct reads; `state`: size and time when it was opened."""

    plain: int
    direct: int | None
    state: tuple[int, int]


class ExpertFiles:
    """The open files of the experts."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files: dict[Path, _Open] = {}
        self._close = weakref.finalize(self, _close, self._files)
        for path in paths:
            try:
                plain = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(f"Cannot open {str(path)!r}: {error.strerror}.") from None
            self._files[path] = _Open(plain, _open_direct(path), _state(plain))

    def read(self, recipe: Recipe, buffer: Tensor) -> None:
        """Read an expert into memory; CheckpointError if a file was changed since it was opened."""
        for name, tensor in recipe.tensors(buffer).items():
            part = recipe.parts[name]
            if tensor.dtype == part.dtype:
                self._fill(part, 0, tensor.view(-1).view(torch.uint8), buffer)
            else:
                self._convert(part, tensor.view(-1))
            file = self._files[part.file]
            if _state(file.plain) != file.state:
                raise _changed(part.file, "changed")

    def close(self) -> None:
        """Close the files; nothing can be read any more."""
        self._close()

    def _fill(self, part: TensorOffset, start: int, target: Tensor, buffer: Tensor) -> None:
        """Fill the target from byte `start` of the part.

        target: a view of `buffer`. If the part is large, the full pages around it may be
            overwritten.
        """
        file, offset, size = self._files[part.file], part.offset + start, target.numel()
        first = target.storage_offset() - buffer.storage_offset()
        shift = offset % PAGE
        begin, length = first - shift, _padded(shift + size, PAGE)
        fits = begin >= 0 and begin + length <= buffer.numel()
        aligned = (buffer.data_ptr() + begin) % PAGE == 0
        if file.direct is not None and is_large(part) and fits and aligned:
            pages = memoryview(cast(Any, buffer[begin : begin + length].numpy()))
            if _read(part.file, file.direct, pages, offset - shift, shift + size):
                return
            file.direct = None  # the file system opens with O_DIRECT, but does not read
        _read(part.file, file.plain, memoryview(cast(Any, target.numpy())), offset, size)

    def _convert(self, part: TensorOffset, target: Tensor) -> None:
        """Read a part a piece at a time, and convert it to the dtype of the target."""
        size, step = part.dtype.itemsize, STAGE // part.dtype.itemsize
        buffer = new_buffer(_stage(part))
        for first in range(0, target.numel(), step):
            piece = target[first : first + step]
            shift = (part.offset + first * size) % PAGE if is_large(part) else 0
            raw = buffer[shift : shift + piece.numel() * size]
            self._fill(part, first * size, raw, buffer)
            for to, numbers in zip(
                piece.split(GRAIN), raw.view(part.dtype).split(GRAIN), strict=True
            ):
                to.copy_(numbers)


def _read(path: Path, descriptor: int, view: memoryview, offset: int, needed: int) -> bool:
    """Read at least `needed` bytes; return false where direct reads are not supported."""
    done = 0
    while done < needed:
        try:
            count = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as error:
            if error.errno == errno.EINVAL and not done:
                return False
            raise CheckpointError(f"Cannot read {path.name}: {error.strerror}.") from None
        done += count
        if not count or (done < needed and offset + done >= os.fstat(descriptor).st_size):
            raise _changed(path, "was cut short")
    return True


def _open_direct(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT) if hasattr(os, "O_DIRECT") else None
    except OSError:
        return None


def _padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _state(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns


def _close(files: dict[Path, _Open]) -> None:
    while files:
        file = files.popitem()[1]
        for descriptor in (file.plain, file.direct):
            if descriptor is not None:
                os.close(descriptor)


def _changed(path: Path, how: str) -> CheckpointError:
    return CheckpointError(
        f"{path.name} {how} while the model was in use, and its experts are read from it as they "
        "are needed. Load the model again, and replace model folders as a whole instead of "
        "writing into them."
    )
