"""Reading experts from files into memory that is used again and again.

Plain reads, no maps: a file that is cut short is an error and not the end of the process. Large
matrices go from the disk to their place without passing through the page cache (O_DIRECT, where the
file system has it): that leaves the processor to those who compute, and no second copy behind.
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

ALIGNMENT = 64  # bytes, a line of cache, where tensors begin in memory
PAGE = 4096  # bytes; where direct reads begin and end, in files and in memory
LARGE = 2**20  # bytes from which a matrix is read directly
HUGE = 2**21  # bytes of a large page of memory
GRAIN = 2**14  # numbers converted at a time: so few that PyTorch leaves its other threads alone
STAGE = 2**21  # bytes read at a time where numbers are converted on their way


@dataclass(frozen=True)
class Recipe:
    """What makes up one expert: its tensors by name, where they lie, and their dtype in memory.

    dtype: None keeps that of the files; codes of quantised weights (integers) always keep theirs.
    """

    parts: Mapping[str, TensorOffset]
    dtype: torch.dtype | None = None

    def dtype_of(self, part: TensorOffset) -> torch.dtype:
        """Return its dtype in memory."""
        if self.dtype is None or not part.dtype.is_floating_point:
            return part.dtype
        return self.dtype

    def num_bytes(self) -> int:
        """Return the bytes it takes in memory."""
        return self._places()[1]

    def file_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts.values())

    def stage_bytes(self) -> int:
        """Return the bytes that converting numbers on their way takes; zero where there is none."""
        converted = (part for part in self.parts.values() if self.dtype_of(part) != part.dtype)
        return max(map(_stage, converted), default=0)

    def place(self) -> tuple[str, int]:
        """Return where it begins, for reading in the order of the files."""
        return min((str(part.file), part.offset) for part in self.parts.values())

    def tensors(self, buffer: Tensor) -> dict[str, Tensor]:
        """Return the tensors over that memory: uint8, `num_bytes` of them."""
        found, starts = {}, self._places()[0]
        for name, part in self.parts.items():
            start = starts[name]
            flat = buffer[start : start + self._size(part)].view(self.dtype_of(part))
            found[name] = flat.view(part.shape)
        return found

    def _places(self) -> tuple[dict[str, int], int]:
        """Return where in memory each part begins, and the length of all."""
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
    """Whether it is read in whole pages, to the same place in a page that it has in the file."""
    return part.num_bytes >= LARGE and part.offset % part.dtype.itemsize == 0


def _stage(part: TensorOffset) -> int:
    return STAGE + 2 * PAGE if is_large(part) else min(STAGE, part.num_bytes)


def new_buffer(size: int) -> Tensor:
    """Return memory that begins with a page, uint8."""
    if size < LARGE:
        return torch.empty(size, dtype=torch.uint8)
    buffer = mmap.mmap(-1, _padded(size, PAGE), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        buffer.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(buffer, dtype=torch.uint8, count=size)


@dataclass
class _Open:
    """An open file: for any reads, and for direct ones; how it was when it was opened."""

    plain: int
    direct: int | None
    state: tuple[int, int]


class ExpertFiles:
    """The open files that experts lie in, and how they were when they were opened."""

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
        """Fill memory with an expert; CheckpointError where a file is not what it was."""
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
        """Read from byte `start` of the part as many bytes as the target has.

        target: a view of `buffer`. What it has around it up to whole pages may be overwritten where
            the part is large.
        """
        file, offset, size = self._files[part.file], part.offset + start, target.numel()
        first = target.storage_offset() - buffer.storage_offset()
        shift = offset % PAGE
        begin, length = first - shift, _padded(shift + size, PAGE)
        fits = begin >= 0 and begin + length <= buffer.numel()
        aligned = (buffer.data_ptr() + begin) % PAGE == 0
        if file.direct is not None and is_large(part) and fits and aligned:
            whole = memoryview(cast(Any, buffer[begin : begin + length].numpy()))
            if _read(part.file, file.direct, whole, offset - shift, shift + size):
                return
            file.direct = None  # the file system opens files so, but does not read them
        _read(part.file, file.plain, memoryview(cast(Any, target.numpy())), offset, size)

    def _convert(self, part: TensorOffset, target: Tensor) -> None:
        """Read a part a piece at a time, as numbers of another dtype."""
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
    """Read at least the bytes needed; false where a direct read is not possible at all."""
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
