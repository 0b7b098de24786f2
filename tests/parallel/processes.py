"""Run a function in several connected processes over gloo, as a test of what they do together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_in_processes(number: int, folder: Path, work: Callable[..., None], *arguments: Any) -> None:
    """Call work(rank, *arguments) in each of `number` processes; an error in one is raised here.

    work: a function of a module, so that a new process can import it.
    """
    torch.multiprocessing.spawn(_start, (number, str(folder), work, arguments), nprocs=number)


def _start(
    rank: int, number: int, folder: str, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=number
    )
    work(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()
