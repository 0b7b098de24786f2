"""Main memory in large pages, for weights that every decoding step reads once.

A processor remembers where few pages lie. With pages of 4 KiB, reading a model's weights from end
to end misses that memory at every page; of 2 MiB pages there are 512 times fewer. Linux gives them
to who asks (`madvise`), without any right or setting, and where it cannot, all works as before.
"""

import ctypes
import sys
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

PAGE = 2 << 20  # bytes of a large page on x86-64 and on arm64 with base pages of 4 KiB
_ADVICE = 14  # MADV_HUGEPAGE in Linux's mman-common.h


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
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
