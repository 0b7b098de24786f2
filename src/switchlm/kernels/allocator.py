"""Tell the C library to keep what training frees, instead of giving it back to the system.

A training step allocates the same tensors as the one before. The C library returns large blocks to
the system at once and gets them back, empty, a moment later: a page fault for every 4 KiB, a tenth
of a step on a CPU. Only glibc is told, and only by who owns the process: a training run.
"""

import ctypes
import sys

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
