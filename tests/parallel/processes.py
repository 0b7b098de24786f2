"""Run a function in several connected processes over gloo, as a test of what they do together."""

import faulthandler
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

SECONDS = 240


def run_in_processes(number: int, folder: Path, work: Callable[..., None], *arguments: Any) -> None:
    """Call work(rank, *arguments) in each of `number` processes; an error in one is raised here.

    work: a function of a module, so that a new process can import it. One that hangs says where.
    """
    workers = torch.multiprocessing.spawn(
        _start, (number, str(folder), work, arguments), nprocs=number, join=False
    )
    until = time.monotonic() + SECONDS
    while not workers.join(timeout=1):
        if time.monotonic() > until:
            for process in workers.processes:
                process.kill()
            pytest.fail(f"{work.__name__} hung for {SECONDS} s; where it did, stands above")


def _start(
    rank: int, number: int, folder: str, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(SECONDS - 5)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=number
    )
    work(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()
