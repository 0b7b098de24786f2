"""Run a function in several connected processes over gloo, as a test of what they do together.

The processes outlive a test, since each takes seconds to start and to import torch; a test in which
one fails or hangs ends them all, and the next starts new ones.
"""

import faulthandler
import time
import traceback
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from switchlm import _torch

SECONDS = 240


class Worker:
    """A process that does one job after the other."""

    def __init__(self) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self.connection, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there,), daemon=True)
        self.process.start()
        there.close()  # so that the end of the process is the end of the connection


_workers: list[Worker] = []


def run_in_processes(number: int, folder: Path, work: Callable[..., None], *arguments: Any) -> None:
    """Call work(rank, *arguments) in each of `number` processes; an error in one is raised here.

    work: a function of a module, so that another process can import it. One that hangs says where.
    """
    while len(_workers) < number:
        _workers.append(Worker())
    store = f"{folder}/store-{uuid.uuid4().hex}"
    ranks: dict[Any, int] = {}
    for rank, worker in enumerate(_workers[:number]):
        worker.connection.send((rank, number, store, work, arguments))
        ranks[worker.connection] = rank
    until = time.monotonic() + SECONDS
    while ranks:
        ready = wait(list(ranks), timeout=max(until - time.monotonic(), 0))
        if not ready:
            _end_all()
            pytest.fail(f"{work.__name__} hung for {SECONDS} s; where it did, stands above")
        for connection in ready:
            rank = ranks.pop(connection)
            assert isinstance(connection, Connection)
            try:
                problem = connection.recv()
            except EOFError:
                problem = "the process ended"
            if problem is not None:
                _end_all()  # the others may wait for this one for ever
                pytest.fail(f"{work.__name__} failed on rank {rank}:\n{problem}")


def _end_all() -> None:
    for worker in _workers:
        worker.process.kill()
        worker.process.join()
    _workers.clear()


def _serve(connection: Connection) -> None:
    """Do jobs until the other end is gone."""
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            _run(*job)
        except BaseException:
            connection.send(traceback.format_exc())
            return
        connection.send(None)


def _run(
    rank: int, number: int, store: str, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    faulthandler.dump_traceback_later(SECONDS - 5)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=number)
    try:
        work(rank, *arguments)
        dist.barrier()
    finally:
        dist.destroy_process_group()
        _torch.clear_sharding_cache()  # an equal mesh of the next job would be taken for this one's
        faulthandler.cancel_dump_traceback_later()
