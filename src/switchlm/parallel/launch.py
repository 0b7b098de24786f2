"""Read the launch environment of torchrun or srun, and join the process group.

    launch = launched()                                  # None: one plain process
    with process_group(launch, timeout_seconds=600) as heartbeat:
        ...
        heartbeat.beat(step)

torchrun, or srun, starts the processes; torch.distributed connects them; docs/guides/cluster.md.
Nothing else in the package reads the environment, but cli/main.py, for OpenMP.

torchrun's agents keep one store over all restarts, and each agent counts only the restarts of its
own processes. So entries in the store may be those of dead processes. Rank 0 counts the starts of
the job in the store, and answers each process's request with the number of the current start.
"""

import os
import re
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from switchlm.errors import LaunchError
from switchlm.parallel.heartbeat import Heartbeat

# Processes of one job may start minutes apart if Python and torch are on a shared file system.
START_SECONDS = 600.0
# torchrun's agent hosts the store before it starts a process, so a missing store will not appear.
AGENT_SECONDS = 15.0
POLL_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The ranks of this process in its job.

    rank, world_size: among all processes.
    local_rank, local_world_size: among the processes of this node.
    address: HOST:PORT of the store.
    node: index of this node.
    restarts: restarts of this process by torchrun, and of the job by SLURM.
    store_is_up: whether the store was started before this process.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    node: int
    restarts: int
    store_is_up: bool = False

    def __post_init__(self) -> None:
        for kind, rank, size in (
            ("", self.rank, self.world_size),
            ("local ", self.local_rank, self.local_world_size),
        ):
            if rank >= size:
                raise LaunchError(
                    f"This process has {kind}rank {rank} of {size}; {kind}ranks count from 0 to "
                    f"{size - 1}. Start the processes by torchrun or srun, which number them."
                )


def launched(environment: Mapping[str, str] | None = None) -> Launch | None:
    """Return the launch that torchrun or srun set in the environment; None if neither did.

    Raises LaunchError if a variable is missing or invalid.
    """
    found = os.environ if environment is None else environment
    if "RANK" in found or "WORLD_SIZE" in found:
        return Launch(
            rank=_number(found, "RANK"),
            world_size=_number(found, "WORLD_SIZE"),
            local_rank=_number(found, "LOCAL_RANK"),
            local_world_size=_number(found, "LOCAL_WORLD_SIZE"),
            address=_address(found, "torchrun sets both; start the processes by it."),
            node=_number(found, "GROUP_RANK", 0),
            restarts=_number(found, "TORCHELASTIC_RESTART_COUNT", 0) + _requeues(found),
            store_is_up=found.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
    if _number(found, "SLURM_STEP_NUM_TASKS", 1) > 1:
        node = _number(found, "SLURM_NODEID")
        return Launch(
            rank=_number(found, "SLURM_PROCID"),
            world_size=_number(found, "SLURM_STEP_NUM_TASKS"),
            local_rank=_number(found, "SLURM_LOCALID"),
            local_world_size=_tasks_of_node(found.get("SLURM_STEP_TASKS_PER_NODE", ""), node),
            address=_address(found, _SLURM_HINT),
            node=node,
            restarts=_requeues(found),
        )
    return None


_SLURM_HINT = (
    'Before srun, write: export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | '
    "head -n 1) MASTER_PORT=29500"
)


def _requeues(found: Mapping[str, str]) -> int:
    """Return how often SLURM requeued the job."""
    return _number(found, "SLURM_RESTART_COUNT", 0)


def _number(found: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = found.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch(r"[0-9]{1,9}", text):
        raise LaunchError(
            f"The environment says that this is one of several processes, but {name} is "
            f"{'missing' if text is None else repr(text)}. Start the processes by torchrun or "
            "srun, which set it, or, to run a single one, unset RANK, WORLD_SIZE and "
            "SLURM_STEP_NUM_TASKS."
        )
    return int(text)


def _address(found: Mapping[str, str], hint: str) -> str:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not found.get(name):
            raise LaunchError(
                f"{name} is missing, so the processes of this job cannot connect. {hint}"
            )
    port = _number(found, "MASTER_PORT")
    if not 0 < port < 2**16:
        raise LaunchError(f"MASTER_PORT must be from 1 to {2**16 - 1}, got {port}. {hint}")
    return f"{found['MASTER_ADDR']}:{port}"


def _tasks_of_node(text: str, node: int) -> int:
    """Parse SLURM's `4(x2),1`: four tasks on each of two nodes, one on the third."""
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
    launch: Launch,
    timeout_seconds: float,
    *,
    start_seconds: float = START_SECONDS,
    on_cpu: bool = False,
) -> Iterator[Heartbeat]:
    """Initialise the process group of the job for the block.

    timeout_seconds: limit of a collective.
    start_seconds: limit of waiting for all processes at the start.
    on_cpu: leave GPUs alone.

    The backend is gloo on CPUs, and NCCL besides with GPUs, each process on the GPU of its local
    rank. Raises LaunchError if not all processes start, and LostRankError, which names the lost
    ranks, if a collective fails in the block.
    """
    backend = "gloo" if on_cpu else _choose_backend(launch)
    rank, world_size = launch.rank, launch.world_size
    connect_seconds = min(start_seconds, AGENT_SECONDS) if launch.store_is_up else start_seconds
    store = open_store(launch.address, rank, world_size, connect_seconds)
    store, restarted = rendezvous(store, rank, world_size, launch.restarts, start_seconds)
    heartbeat = Heartbeat(
        store, rank, world_size, local_rank=launch.local_rank, node=launch.node, restarted=restarted
    )
    with heartbeat.report_lost_ranks():
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("default", store),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )
        yield heartbeat
        dist.barrier()  # the process that hosts the store exits last
    # Not after a failure: destroying the group would wait for the lost rank again.
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


def open_store(address: str, rank: int, world_size: int, seconds: float) -> dist.Store:
    """Connect to the store of the job; rank 0, or torchrun's agent, hosts it.

    address: MASTER_ADDR:MASTER_PORT, which torch reads by itself.

    Raises LaunchError if that fails for `seconds`.
    """
    try:
        found = dist.rendezvous("env://", rank, world_size, timeout=timedelta(seconds=seconds))
        store: dist.Store = next(found)[0]
    except dist.DistError as error:
        raise LaunchError(
            f"Rank {rank} of {world_size} did not reach the store of the job at {address} in "
            f"{seconds:g} s. Look whether torchrun, or rank 0, still runs on that host, no other "
            f"program uses the port, and firewalls allow it. ({_first_line(error)})"
        ) from error
    return store


def rendezvous(
    store: dist.Store, rank: int, world_size: int, restarts: int, seconds: float
) -> tuple[dist.Store, bool]:
    """Wait for all processes; return a store with a prefix of this start of the job.

    restarts: of this process, as its agent counts them.

    Also returns whether the job was started before, as any of the processes found; it is the same
    on all. Raises LaunchError, which names the ranks that did not start within `seconds`.
    """
    until = time.monotonic() + seconds
    if rank == 0:
        start = int(store.add("starts", 1))
    else:
        start = _request_start(store, rank, world_size, seconds)
    own = dist.PrefixStore(f"start_{start}", store)
    own.add("restarts", restarts)
    own.set(f"here/{rank}", "")
    if rank == 0:
        _answer_requests(store, own, start, world_size, until, seconds)
        own.set("all", "")
    else:
        _wait(own, "all", rank, world_size, max(until - time.monotonic(), 1), seconds)
    return own, start > 1 or own.add("restarts", 0) > 0


def _request_start(store: dist.Store, rank: int, world_size: int, seconds: float) -> int:
    """Request the number of this start from rank 0, under a unique name."""
    name = uuid.uuid4().hex
    store.set(f"request/{rank}", name)
    _wait(store, f"answer/{name}", rank, world_size, seconds, seconds)
    return int(store.get(f"answer/{name}"))


def _wait(
    store: dist.Store, key: str, rank: int, world_size: int, left: float, seconds: float
) -> None:
    try:
        store.wait([key], timedelta(seconds=left))
    except dist.DistError as error:
        raise LaunchError(
            f"Rank {rank} waited {seconds:g} s for all {world_size} processes of the job to start. "
            f"The message of rank 0 names those missing; if it has none, rank 0 is missing. "
            f"({_first_line(error)})"
        ) from error


def _answer_requests(
    store: dist.Store, own: dist.Store, start: int, world_size: int, until: float, seconds: float
) -> None:
    """Answer requests with the number of this start, until all processes have written `here`.

    An answer to a dead process's request has no effect.
    """
    missing = list(range(1, world_size))
    while missing:
        for rank in missing:
            if store.check([f"request/{rank}"]):
                name = store.get(f"request/{rank}").decode()
                store.set(f"answer/{name}", str(start))
        missing = [rank for rank in missing if not own.check([f"here/{rank}"])]
        if missing and time.monotonic() > until:
            raise LaunchError(
                f"{ranks(missing).capitalize()} of {world_size} did not start within {seconds:g} "
                f"s. Look at the log of those hosts, and whether {world_size} processes were "
                "started."
            )
        time.sleep(POLL_SECONDS if missing else 0)


def ranks(numbers: list[int]) -> str:
    """Return `rank 3`, or `ranks 3, 5`; at most eight of them."""
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]
