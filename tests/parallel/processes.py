"""Run a function, or a command, in several processes, as a test of what they do together.

The processes outlive a test, since each takes seconds to start and to import torch; a test in which
one fails or hangs ends them all, and the next starts new ones.
"""

import contextlib
import faulthandler
import gc
import json
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.commands import Done
from tests.parallel.jobs import free_port
from typer.testing import CliRunner

from switchlm import _torch
from switchlm.cli.main import app

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
    """Call work(rank, *arguments) in each of `number` processes connected by gloo.

    work: a function of a module, so that another process can import it. One that hangs says where,
        and an error in one is raised here.
    """
    _call_in_processes(number, f"{folder}/store-{uuid.uuid4().hex}", work, *arguments)


def run_switchlm(number: int, home: Path, arguments: Sequence[str], slurm: bool = False) -> Done:
    """Run a command line of switchlm as torchrun would in `number` processes, in the folder `home`.

    slurm: as srun would, each process on a node of its own.

    The output of one process follows that of another.
    """
    job = f"{home}/.job-{uuid.uuid4().hex}"
    names = [launch_names(rank, number, slurm) for rank in range(number)]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "HOME": str(home)}
    environments = [address | (name if number > 1 else {}) for name in names]
    _call_in_processes(number, None, _switchlm, environments, job, home, list(arguments))
    found = [json.loads(Path(f"{job}-{rank}").read_text("utf-8")) for rank in range(number)]
    status, out, error = zip(*found, strict=True)
    return Done(["switchlm", *arguments], max(status), "".join(out), "".join(error))


def launch_names(rank: int, number: int, slurm: bool) -> dict[str, str]:
    """Return what torchrun, or srun with a process per node, adds to the environment."""
    if slurm:
        names = {"SLURM_PROCID": rank, "SLURM_LOCALID": 0, "SLURM_NODEID": rank}
        names |= {"SLURM_STEP_NUM_TASKS": number}
        return {k: str(v) for k, v in names.items()} | {
            "SLURM_STEP_TASKS_PER_NODE": f"1(x{number})"
        }
    names = {"RANK": rank, "WORLD_SIZE": number, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": number}
    return {k: str(v) for k, v in names.items()}


def _switchlm(
    rank: int, environments: list[dict[str, str]], job: str, home: Path, arguments: list[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(home):
        for name, value in environments[rank].items():
            patch.setenv(name, value)
        done = CliRunner().invoke(app, arguments)
    error = done.stderr
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        error += "".join(traceback.format_exception(done.exception))
    Path(f"{job}-{rank}").write_text(json.dumps([done.exit_code, done.stdout, error]))


def _call_in_processes(
    number: int, store: str | None, work: Callable[..., None], *arguments: Any
) -> None:
    while len(_workers) < number:
        _workers.append(Worker())
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
    rank: int,
    number: int,
    store: str | None,
    work: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    faulthandler.dump_traceback_later(SECONDS - 5)
    if store is not None:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=number)
    try:
        work(rank, *arguments)
        if store is not None:
            dist.barrier()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        _torch.clear_sharding_cache()  # an equal mesh of the next job would be taken for this one's
        # Groups are freed by the second pass; until then their threads wake a hundred times a
        # second.
        for _ in range(2):
            gc.collect()
        faulthandler.cancel_dump_traceback_later()
