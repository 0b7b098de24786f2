"""Share the experts of one layer out among the cores: one product a core, not all cores a product.

Products of 64 rows are too small to split; each thread taking whole experts is faster, does not
wait at a barrier after every product (which on a shared machine costs milliseconds), and gives the
same bits with any number of threads. Where few experts have rows or one has most of them, the
products are split among the cores as usual.
"""

import heapq
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

Item = TypeVar("Item")

FIXED_ROWS = 48  # reading an expert's weights costs as much as multiplying about so many rows
LEAST_WORK = 2**25  # multiply-adds a product below which waking a thread does not pay
WORST_IMBALANCE = 1.3


@dataclass(frozen=True)
class Plan:
    """Which rows are whose, and which thread takes whom.

    sizes: rows of every expert, and last the rows of none. parts: for every thread its experts,
    those with rows only; one part where sharing does not pay. idle: the experts without rows.
    """

    sizes: list[int]
    parts: list[list[int]]
    idle: list[int]

    def pieces(self, rows: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
        """Return views of the rows of every expert, and last of those of none."""
        return rows.split_with_sizes(self.sizes, dim)

    def empty(self, like: Tensor, width: int) -> Tensor:
        """Return uninitialised rows of this width; those of no expert are zeros."""
        rows = like.new_empty(sum(self.sizes), width)
        if self.sizes[-1]:
            rows[-self.sizes[-1] :].zero_()
        return rows


def plan(counts: list[int], num_rows: int, work_per_row: int) -> Plan:
    """Share experts out, the largest first, each to the thread with the least so far.

    counts: rows of each expert. work_per_row: multiply-adds of one row in one product.
    """
    total = sum(counts)
    assert total <= num_rows, f"experts have {total} rows in all, the input has {num_rows}"
    sizes = [*counts, num_rows - total]
    busy = [expert for expert, count in enumerate(counts) if count]
    idle = [expert for expert, count in enumerate(counts) if not count]
    threads = torch.get_num_threads()
    if threads == 1 or len(busy) < threads or total * work_per_row < LEAST_WORK:
        return Plan(sizes, [busy], idle)
    heap: list[tuple[int, int]] = [(0, thread) for thread in range(threads)]
    parts: list[list[int]] = [[] for _ in range(threads)]
    for expert in sorted(busy, key=counts.__getitem__, reverse=True):
        load, thread = heap[0]
        parts[thread].append(expert)
        heapq.heapreplace(heap, (load + counts[expert] + FIXED_ROWS, thread))
    fair = (total + FIXED_ROWS * len(busy)) / threads
    if max(heap)[0] > WORST_IMBALANCE * fair:
        return Plan(sizes, [busy], idle)
    return Plan(sizes, parts, idle)


def share(work: Callable[[list[Item]], None], parts: list[list[Item]]) -> None:
    """Call `work` once a part, each on its own thread; the first runs on this one.

    Threads record no gradients. Under a dispatch mode (a FLOP counter, say), which lives in one
    thread, everything runs here.
    """
    if len(parts) == 1 or _get_current_dispatch_mode() is not None:
        for part in parts:
            work(part)
        return
    threads = torch.get_num_threads()
    pool = _pool(len(parts) - 1)
    inference = torch.is_inference_mode_enabled()
    futures: list[Future[None]] = [
        pool.submit(_quietly, work, part, inference) for part in parts[1:]
    ]
    torch.set_num_threads(1)
    try:
        work(parts[0])
    finally:
        wait(futures)
        torch.set_num_threads(threads)
    for future in futures:
        future.result()


def _quietly(work: Callable[[list[Item]], None], part: list[Item], inference: bool) -> None:
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


def _forget() -> None:
    """Threads do not survive a fork: the child starts its own."""
    global _lock
    _lock = threading.Lock()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
