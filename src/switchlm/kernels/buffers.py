"""Memory for large tensors that outlives a training step.

Experts' gradients and hidden rows are the largest tensors that a step allocates and frees. Given
back to the system every time, they cost a page fault for every 4 KiB and a second write of all
their bytes (zeros by the kernel); with 256 experts that is a third of the layer's time. Blocks from
here wait for the next step when the last tensor on them is gone.

The pool holds no more than the tensors of one step: whenever no free block fits, the free blocks
of other sizes go back to the system first. `release` returns all that is free.
"""

import threading
import weakref
from math import prod

import torch
from torch import Tensor

SMALLEST = 4 << 20  # below this the C library's own free lists serve as well

_free: dict[int, list[Tensor]] = {}
_lock = threading.RLock()  # reentrant: a finalizer may run while its own thread holds it


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a contiguous, uninitialised tensor in main memory, on a kept block if one is free."""
    bytes_needed = prod(shape) * dtype.itemsize
    if bytes_needed < SMALLEST:
        return torch.empty(shape, dtype=dtype, device="cpu")
    size = _size_class(bytes_needed)
    block = _take(size)
    view = block.numpy()[:bytes_needed]
    # The tensor owns `view`, and nothing else does: its end is the end of the last tensor here.
    weakref.finalize(view, _give_back, size, block).atexit = False
    return torch.from_numpy(view).view(dtype).view(shape)


def release() -> None:
    """Give the memory of all free blocks back to the system."""
    with _lock:
        _free.clear()


def free_bytes() -> int:
    """Return the bytes that wait for the next step."""
    with _lock:
        return sum(size * len(blocks) for size, blocks in _free.items())


def _size_class(size: int) -> int:
    """Round up by less than a fourth, so that batches of varying lengths share blocks.

    Pages that nobody touches cost nothing.
    """
    step = 1 << (size.bit_length() - 3)
    return -(-size // step) * step


def _take(size: int) -> Tensor:
    with _lock:
        blocks = _free.get(size)
        if blocks:
            return blocks.pop()
        _free.clear()
    return torch.empty(size, dtype=torch.uint8, device="cpu")


def _give_back(size: int, block: Tensor) -> None:
    with _lock:
        _free.setdefault(size, []).append(block)
