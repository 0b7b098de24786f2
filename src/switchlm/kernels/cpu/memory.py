"""Main memory for kernels: a pool between steps, a workspace per thread, large pages.

`empty_reused`: experts' gradients and hidden rows are the largest tensors that a step allocates and
frees. Freed and allocated again, they cost a page fault per 4 KiB, and the system writes zeros
first; with 256 experts that is a third of the layer's time. When its last tensor is freed, a block
goes to the pool for the next step. The pool holds no more than the tensors of one step: when no
free block fits, free blocks of other sizes are returned to the system. `release` empties it.

`Workspace`: temporary rows, and rows padded to one of few sizes. oneDNN, which multiplies in
bfloat16 and float16 on a CPU, compiles code for every new shape, milliseconds each, and loads
differ at every step. So there rows are padded with zeros to one of some fifty sizes.

`empty_on_large_pages`: for weights that every decoding step reads once. With pages of 4 KiB,
reading a model's weights misses the TLB at every page; with 2 MiB there are 512 times fewer. Linux
gives them on request (`madvise`); where it does not, tensors are on ordinary pages.

`keep_freed_memory`: a training step allocates the same tensors as the one before, but the C library
returns large blocks to the system at once: a tenth of a step on a CPU. In training glibc is set to
keep them.

`available_bytes`: how much may still be allocated, to refuse what cannot fit before it is tried.

Shapes: X rows of one piece of an expert (see grouped.py).
"""

import ctypes
import sys
import threading
import weakref
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from switchlm.kernels.cpu import small_matmul

SMALLEST = 4 << 20  # bytes; below, the C library's own free lists are as fast

_free: dict[int, list[Tensor]] = {}
_lock = threading.RLock()  # reentrant: a finalizer may run while its own thread holds it


def empty_reused(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a contiguous, uninitialised tensor in main memory, on a free block if one fits."""
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
    # Only the tensor owns `view`, so it is freed with the last tensor on this block.
    weakref.finalize(view, _give_back, size, block).atexit = False
    return torch.from_numpy(view).view(dtype).view(shape)


def release() -> None:
    """Return the memory of all free blocks to the system."""
    with _lock:
        _free.clear()


def _size_class(size: int) -> int:
    """Round up by less than a fourth, so that batches of varying lengths share blocks.

    Pages that are never touched take no memory.
    """
    step = 1 << (size.bit_length() - 3)
    return -(-size // step) * step


def _give_back(size: int, block: Tensor) -> None:
    with _lock:
        _free.setdefault(size, []).append(block)


EXACT_ROWS = 16  # up to which rows are not padded, as in decoding


def compiles_shapes(dtype: torch.dtype) -> bool:
    """Whether matmul in this dtype is compiled for its shape."""
    return dtype in small_matmul.DTYPES and not small_matmul.is_slow(dtype)


def padded(rows: int, dtype: torch.dtype) -> int:
    """Return the number of rows after padding: at most 15 more, or an eighth."""
    if rows <= EXACT_ROWS or not compiles_shapes(dtype):
        return rows
    step = 16 if rows <= 256 else 32 if rows <= 512 else 64 if rows <= 1024 else 128
    return -(-rows // step) * step


class Workspace:
    """Memory that a thread uses for one piece after the other, so that it stays in the cache."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int, columns: int) -> Tensor:
        """Return uninitialised rows in the buffer `name`, which they overwrite."""
        size = rows * columns
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = self._like.new_empty(size)
        return self._buffers[name][:size].view(rows, columns)

    def filled(self, name: str, rows_X: Tensor) -> Tensor:
        """Return the rows, padded with zeros to a size that is compiled."""
        rows, columns = rows_X.shape
        size = padded(rows, rows_X.dtype)
        if size == rows:
            return rows_X
        full = self(name, size, columns)
        full[:rows].copy_(rows_X)
        full[rows:].zero_()
        return full

    def output_for(self, name: str, result_X: Tensor, rows: int) -> Tensor:
        """Return where to write `rows` rows, the first of which are `result_X`."""
        return result_X if len(result_X) == rows else self(name, rows, result_X.shape[1])


def keep(rows: Tensor, result_X: Tensor) -> None:
    """Copy rows that were written to `output_for` a result into it, unless they are there."""
    if len(rows) != len(result_X):
        result_X.copy_(rows[: len(result_X)])


PAGE = 2 << 20  # bytes of a large page on x86-64 and on arm64 with base pages of 4 KiB
_ADVICE = 14  # MADV_HUGEPAGE in Linux's mman-common.h


def empty_on_large_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a contiguous, uninitialised tensor in main memory, on large pages where it fills them.

    Its end, and tensors smaller than a page, are on ordinary pages, so no memory is wasted.
    """
    size = prod(shape) * dtype.itemsize
    if size < PAGE or not sys.platform.startswith("linux"):
        return torch.empty(tuple(shape), dtype=dtype)
    block = torch.empty(size + PAGE, dtype=torch.uint8)  # untouched pages take no memory
    start = -block.data_ptr() % PAGE
    _advise(block.data_ptr() + start, size // PAGE * PAGE)
    return block[start : start + size].view(dtype).view(tuple(shape))


def _advise(address: int, size: int) -> None:
    """Request large pages; without effect where the system refuses."""
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is not None:
        madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _ADVICE)


_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Keep freed memory for the next step; return whether the C library can."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 64 << 20))
    return all(bool(mallopt(name, value)) for name, value in settings)


def available_bytes() -> int | None:
    """Return the main memory that is free or can be freed; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(found[0]) if found else None
