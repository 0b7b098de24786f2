"""Main memory for kernels: reused between steps, a workspace per thread, large pages.

`empty_reused`: experts' gradients and hidden rows are the largest tensors that a step allocates and
frees. Given back to the system every time, they cost a page fault for every 4 KiB and a second
write of all their bytes (zeros by the kernel); with 256 experts that is a third of the layer's
time. A block waits for the next step when the last tensor on it is gone. The pool holds no more
than the tensors of one step: whenever no free block fits, the free blocks of other sizes go back to
the system first. `release` returns all that is free.

`Workspace`: rows that are needed for a moment, and rows padded to one of few sizes. oneDNN, which
multiplies in bfloat16 and float16 on a CPU, compiles code for every shape that it meets:
milliseconds each, while loads differ at every step. So there rows are padded with zeros to one of
some fifty sizes, each of which is compiled once.

`empty_on_large_pages`: for weights that every decoding step reads once. A processor remembers where
few pages lie. With pages of 4 KiB, reading a model's weights from end to end misses that memory at
every page; of 2 MiB pages there are 512 times fewer. Linux gives them on request (`madvise`),
without any right or setting, and where it cannot, all works as before.

`keep_freed_memory`: a training step allocates the same tensors as the one before, while the C
library returns large blocks to the system at once and gets them back, empty, a moment later: a
tenth of a step on a CPU. Only glibc is told to keep them, and only in a training run.

Shapes: X rows of one piece of an expert (see grouped.py).
"""

import ctypes
import sys
import threading
import weakref
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from switchlm.kernels.cpu import small_matmul

SMALLEST = 4 << 20  # below this the C library's own free lists serve as well

_free: dict[int, list[Tensor]] = {}
_lock = threading.RLock()  # reentrant: a finalizer may run while its own thread holds it


def empty_reused(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a contiguous, uninitialised tensor in main memory, on a kept block if one is free."""
    bytes_needed = prod(shape) * dtype.itemsize
    if bytes_needed < SMALLEST:
        return torch.empty(shape, dtype=dtype, device="cpu")
    size = _size_class(bytes_needed)
    with _lock:
        if blocks := _free.get(size):
            block = blocks.pop()
        else:
            _free.clear()
            block = torch.empty(size, dtype=torch.uint8, device="cpu")
    view = block.numpy()[:bytes_needed]
    # The tensor owns `view`, and nothing else does: its end is the end of the last tensor here.
    weakref.finalize(view, _give_back, size, block).atexit = False
    return torch.from_numpy(view).view(dtype).view(shape)


def release() -> None:
    """Give the memory of all free blocks back to the system."""
    with _lock:
        _free.clear()


def _size_class(size: int) -> int:
    """Round up by less than a fourth, so that batches of varying lengths share blocks.

    Pages that nobody touches cost nothing.
    """
    step = 1 << (size.bit_length() - 3)
    return -(-size // step) * step


def _give_back(size: int, block: Tensor) -> None:
    with _lock:
        _free.setdefault(size, []).append(block)


EXACT_ROWS = 16  # up to here every number of rows has code of its own, as in decoding


def compiles_shapes(dtype: torch.dtype) -> bool:
    """Whether products in this dtype are compiled for their shape."""
    return dtype in small_matmul.DTYPES and not small_matmul.is_slow(dtype)


def padded(rows: int, dtype: torch.dtype) -> int:
    """Return the size that so many rows are filled up to: at most 15 more, or an eighth."""
    if rows <= EXACT_ROWS or not compiles_shapes(dtype):
        return rows
    step = 16 if rows <= 256 else 32 if rows <= 512 else 64 if rows <= 1024 else 128
    return -(-rows // step) * step


class Workspace:
    """Memory that one thread uses again and again for one piece after the other: stays in cache."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int, columns: int) -> Tensor:
        """Return uninitialised rows; what this buffer held before is gone."""
        size = rows * columns
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = self._like.new_empty(size)
        return self._buffers[name][:size].view(rows, columns)

    def filled(self, name: str, rows_X: Tensor) -> Tensor:
        """Return the rows, and zeros up to a size that is compiled."""
        rows, columns = rows_X.shape
        size = padded(rows, rows_X.dtype)
        if size == rows:
            return rows_X
        full = self(name, size, columns)
        full[:rows].copy_(rows_X)
        full[rows:].zero_()
        return full

    def output_for(self, name: str, result_X: Tensor, rows: int) -> Tensor:
        """Return where so many rows may be written of which `result_X` wants the first."""
        return result_X if len(result_X) == rows else self(name, rows, result_X.shape[1])


def keep(rows: Tensor, result_X: Tensor) -> None:
    """Bring what was written to `output_for` a result there, unless it stands there already."""
    if len(rows) != len(result_X):
        result_X.copy_(rows[: len(result_X)])


PAGE = 2 << 20  # bytes of a large page on x86-64 and on arm64 with base pages of 4 KiB
_ADVICE = 14  # MADV_HUGEPAGE in Linux's mman-common.h


def empty_on_large_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a contiguous, uninitialised tensor in main memory, on large pages where it fills them.

    Its end, and tensors smaller than a page, lie on ordinary ones, so that no memory is wasted.
    """
    size = prod(shape) * dtype.itemsize
    if size < PAGE or not sys.platform.startswith("linux"):
        return torch.empty(tuple(shape), dtype=dtype)
    block = torch.empty(size + PAGE, dtype=torch.uint8)  # what nobody touches takes no memory
    start = -block.data_ptr() % PAGE
    _advise(block.data_ptr() + start, size // PAGE * PAGE)
    return block[start : start + size].view(dtype).view(tuple(shape))


def _advise(address: int, size: int) -> None:
    """Ask for large pages; a system that refuses leaves the memory as it is."""
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is not None:
        madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _ADVICE)


_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Keep freed memory for the next step; return whether the C library understood."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 64 << 20))
    return all(bool(mallopt(name, value)) for name, value in settings)
