"""How a process learns that it is one of many, and joins the others.

    launch = launched()                                  # None: one plain process
    with process_group(launch, timeout_seconds=600) as watch:
        ...
        watch.note(step)

torchrun, or srun, starts the processes; torch.distributed connects them; docs/guides/cluster.md.
Nothing else in the package reads the environment.
"""

import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from switchlm.errors import LaunchError
from switchlm.parallel.watch import Watch

# Processes of one job may start minutes apart: Python and torch come from a shared file system.
START_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Which process of a job this is.

    rank, world_size: of all processes; local_rank, local_world_size: of those of this node.
    node: the number of this node. restarts: how often the job was restarted before.
    shares_store: torchrun's agent keeps one store over restarts, so each needs names of its own.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: int = 0
    restarts: int = 0
    shares_store: bool = False


def launched(environment: Mapping[str, str] | None = None) -> Launch | None:
    """Return what torchrun or srun says of this process; None if neither started it.

    Raises LaunchError if they say only half.
    """
    found = os.environ if environment is None else environment
    if "RANK" in found or "WORLD_SIZE" in found:
        launch = _by_torchrun(found)
    elif int(found.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        launch = _by_slurm(found)
    else:
        return None
    if not 0 <= launch.rank < launch.world_size:
        raise LaunchError(
            f"This process has rank {launch.rank} of {launch.world_size}; ranks count from 0 to "
            f"{launch.world_size - 1}. Let torchrun set RANK and WORLD_SIZE."
        )
    return launch


def _by_torchrun(found: Mapping[str, str]) -> Launch:
    world_size = _number(found, "WORLD_SIZE")
    launch = Launch(
        rank=_number(found, "RANK"),
        world_size=world_size,
        local_rank=_number(found, "LOCAL_RANK"),
        local_world_size=_number(found, "LOCAL_WORLD_SIZE"),
        node=int(found.get("GROUP_RANK", "0")),
        restarts=int(found.get("TORCHELASTIC_RESTART_COUNT", "0")),
        shares_store=found.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )
    _check_address(found, "torchrun sets both; start the processes by it.")
    return launch


def _by_slurm(found: Mapping[str, str]) -> Launch:
    """Return the place in a job step whose tasks srun started one a GPU, without torchrun."""
    node = _number(found, "SLURM_NODEID")
    launch = Launch(
        rank=_number(found, "SLURM_PROCID"),
        world_size=_number(found, "SLURM_STEP_NUM_TASKS"),
        local_rank=_number(found, "SLURM_LOCALID"),
        local_world_size=_tasks_of_node(found.get("SLURM_STEP_TASKS_PER_NODE", "1"), node),
        node=node,
        restarts=int(found.get("SLURM_RESTART_COUNT", "0")),
    )
    _check_address(
        found,
        'Before srun, write: export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | '
        "head -n 1) MASTER_PORT=29500",
    )
    return launch


def _number(found: Mapping[str, str], name: str) -> int:
    text = found.get(name)
    if text is None or not re.fullmatch(r"\d+", text):
        raise LaunchError(
            f"The environment says that this is one of several processes, but {name} is "
            f"{'missing' if text is None else repr(text)}. Start the processes by torchrun, which "
            "sets it, or unset RANK and WORLD_SIZE to run a single one."
        )
    return int(text)


def _check_address(found: Mapping[str, str], advice: str) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not found.get(name):
            raise LaunchError(
                f"{name} is missing: the processes of this job cannot find one another. {advice}"
            )
    _number(found, "MASTER_PORT")


def _tasks_of_node(text: str, node: int) -> int:
    """Read SLURM's `4(x2),1`: four tasks on each of two nodes, one on the third."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    if node >= len(counts):
        raise LaunchError(
            f"SLURM_STEP_TASKS_PER_NODE is {text!r}, but this is node {node}. Start the processes "
            "by srun or torchrun."
        )
    return counts[node]


@contextmanager
def process_group(
    launch: Launch, timeout_seconds: float, *, start_seconds: float = START_SECONDS
) -> Iterator[Watch]:
    """Join the processes of the job for the length of the block.

    timeout_seconds: the longest that a collective waits for the others. start_seconds: the longest
    that the processes wait for one another at the start.

    Gloo on CPUs; with GPUs NCCL too, each process on the GPU of its local rank. Raises LaunchError
    if they do not find one another, and, whenever a collective fails in the block, LostRankError,
    which names who did not come.
    """
    backend = _choose_backend(launch)
    store = _open_store(launch, start_seconds)
    if launch.shares_store:
        # One store lives through all restarts: a new rank would read the address of a dead one.
        store = dist.PrefixStore(f"attempt_{launch.restarts}", store)
    watch = Watch(store, launch.rank, launch.world_size, launch.local_rank, launch.node)
    _meet(watch, start_seconds)
    with watch.naming_the_lost():
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("default", store),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )
        yield watch
        dist.barrier()  # nobody takes the store away from those who still use it
    # After a failure nothing is taken down: that would wait for the lost rank once more.
    dist.destroy_process_group()


def _choose_backend(launch: Launch) -> str:
    """Return the backend, and select the GPU of this process if there are any."""
    num_gpus = torch.cuda.device_count()
    if num_gpus == 0:
        return "gloo"
    if not dist.is_nccl_available():
        raise LaunchError(
            f"There are {num_gpus} GPUs, but this build of PyTorch ({torch.__version__}) has no "
            "NCCL to connect them. Install a CUDA build, or hide the GPUs: CUDA_VISIBLE_DEVICES=''."
        )
    if launch.local_rank >= num_gpus:
        raise LaunchError(
            f"{launch.local_world_size} processes were started on {socket.gethostname()}, which "
            f"has {num_gpus} GPUs; each process needs one. Give torchrun --nproc-per-node "
            f"{num_gpus}."
        )
    torch.cuda.set_device(launch.local_rank)
    return "cpu:gloo,cuda:nccl"


def _open_store(launch: Launch, start_seconds: float) -> dist.Store:
    """Connect to the store at MASTER_ADDR:MASTER_PORT; rank 0, or torchrun's agent, hosts it."""
    try:
        store, _rank, _world_size = next(
            dist.rendezvous(
                "env://",
                launch.rank,
                launch.world_size,
                timeout=timedelta(seconds=start_seconds),
            )
        )
    except dist.DistError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise LaunchError(
            f"Rank {launch.rank} of {launch.world_size} did not meet the others at {place} in "
            f"{start_seconds:g} s. Look whether all {launch.world_size} processes were started, "
            "the port is free on the first host, and firewalls let it through. "
            f"({_first_line(error)})"
        ) from error
    return store


def _meet(watch: Watch, start_seconds: float) -> None:
    """Let every rank say who it is, and wait for all of them."""
    missing = watch.meet(start_seconds)
    if missing:
        raise LaunchError(
            f"Rank {watch.rank} waited {start_seconds:g} s for {_ranks(missing)} of "
            f"{watch.world_size} processes. Look into the log of those; all must start within that "
            "time."
        )


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]


__all__ = ["Launch", "Watch", "launched", "process_group"]
