"""Threads that each do a part of a layer's work, while PyTorch itself uses one thread."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from switchlm import _torch

Item = TypeVar("Item")


def parallel_for(work: Callable[[Sequence[Item]], None], parts: Sequence[Sequence[Item]]) -> None:
    """Call `work` once per part, each on its own thread; the first runs on this one.

    Threads record no gradients. Under a dispatch mode (such as a FLOP counter), which belongs to
    one thread, everything runs here.
    """
    if len(parts) == 1 or _torch.has_dispatch_mode():
        for part in parts:
            work(part)
        return
    threads = torch.get_num_threads()
    pool = _pool(len(parts) - 1)
    inference = torch.is_inference_mode_enabled()
    futures: list[Future[None]] = [pool.submit(_run, work, part, inference) for part in parts[1:]]
    torch.set_num_threads(1)
    try:
        work(parts[0])
    finally:
        wait(futures)
        torch.set_num_threads(threads)
    for future in futures:
        future.result()


def _run(work: Callable[[Sequence[Item]], None], part: Sequence[Item], inference: bool) -> None:
    with torch.inference_mode(inference), torch.no_grad():
        work(part)


_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()


def _pool(size: int) -> ThreadPoolExecutor:
    with _lock:
        if size not in _pools:
            _pools[size] = ThreadPoolExecutor(
                size,
                thread_name_prefix="switchlm-expert",
                initializer=torch.set_num_threads,
                initargs=(1,),
            )
        return _pools[size]


def _reset_pools() -> None:
    """Threads do not survive a fork: the child starts its own."""
    global _lock
    _lock = threading.Lock()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_pools)
