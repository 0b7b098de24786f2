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

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

Run = tuple[int, int, int]

FIXED_ROWS = 48  # reading an expert's weights costs as much as multiplying about so many rows
LEAST_WORK = 2**25  # multiply-adds a product below which waking a thread does not pay
WORST_IMBALANCE = 1.3


@dataclass(frozen=True)
class Plan:
    """Which rows are whose, and which thread takes whom.

    parts: for every thread its (expert, first row, end row); one part where sharing does not pay.
    idle: the experts without rows. total: the rows that have an expert.
    """

    parts: list[list[Run]]
    idle: list[int]
    total: int

    @property
    def most_rows(self) -> int:
        """The rows of the busiest expert."""
        return max((end - start for part in self.parts for _, start, end in part), default=0)


def plan(counts: list[int], num_rows: int, work_per_row: int) -> Plan:
    """Share experts out, the largest first, each to the thread with the least so far.

    counts: rows of each expert. work_per_row: multiply-adds of one row in one product.
    """
    runs = []
    idle = []
    start = 0
    for expert, count in enumerate(counts):
        if count:
            runs.append((expert, start, start + count))
            start += count
        else:
            idle.append(expert)
    assert start <= num_rows, f"experts have {start} rows in all, the input has {num_rows}"
    threads = torch.get_num_threads()
    if threads == 1 or len(runs) < threads or start * work_per_row < LEAST_WORK:
        return Plan([runs], idle, start)
    heap: list[tuple[int, int]] = [(0, thread) for thread in range(threads)]
    parts: list[list[Run]] = [[] for _ in range(threads)]
    for run in sorted(runs, key=lambda run: run[1] - run[2]):
        load, thread = heap[0]
        parts[thread].append(run)
        heapq.heapreplace(heap, (load + run[2] - run[1] + FIXED_ROWS, thread))
    fair = (start + FIXED_ROWS * len(runs)) / threads
    if max(heap)[0] > WORST_IMBALANCE * fair:
        return Plan([runs], idle, start)
    return Plan(parts, idle, start)


def share(work: Callable[[list[Run]], None], parts: list[list[Run]]) -> None:
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


def _quietly(work: Callable[[list[Run]], None], part: list[Run], inference: bool) -> None:
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
