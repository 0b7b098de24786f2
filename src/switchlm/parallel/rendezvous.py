"""How the processes of a job find one another, and agree which start of the job this is.

torchrun's agents keep one store over all restarts, and each agent counts the restarts of its own
processes only. So neither the store nor that count tells a process of now from a dead one: rank 0
counts the starts in the store, and tells every process that comes which one it belongs to.
"""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from switchlm.errors import LaunchError

POLL_SECONDS = 0.05


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
            f"{seconds:g} s. Look whether torchrun, or rank 0, still runs on that host, the port "
            f"is its own, and firewalls let it through. ({_first_line(error)})"
        ) from error
    return store


def rendezvous(
    store: dist.Store, rank: int, world_size: int, restarts: int, seconds: float
) -> tuple[dist.Store, bool]:
    """Wait for all processes; return the part of the store that is theirs alone.

    restarts: how often this process's agent started it anew. Also returns whether the job was
        started before, by what any of the processes knows; all get the same answer.

    Raises LaunchError, which names who did not come within `seconds`.
    """
    until = time.monotonic() + seconds
    start = _count_start(store) if rank == 0 else _ask_start(store, rank, world_size, seconds)
    own = dist.PrefixStore(f"start_{start}", store)
    own.add("restarts", restarts)
    own.set(f"here/{rank}", "")
    if rank == 0:
        _answer_all(store, own, start, world_size, until, seconds)
        own.set("all", "")
    else:
        _wait(own, "all", rank, world_size, max(until - time.monotonic(), 1), seconds)
    return own, start > 1 or own.add("restarts", 0) > 0


def _count_start(store: dist.Store) -> int:
    return int(store.add("starts", 1))


def _ask_start(store: dist.Store, rank: int, world_size: int, seconds: float) -> int:
    """Ask rank 0 under a name that no earlier process had."""
    name = uuid.uuid4().hex
    store.set(f"asks/{rank}", name)
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
            f"The message of rank 0 says who is missing; if it has none, rank 0 is. "
            f"({_first_line(error)})"
        ) from error


def _answer_all(
    store: dist.Store, own: dist.Store, start: int, world_size: int, until: float, seconds: float
) -> None:
    """Tell every process the start, until all are here; a dead one's question does no harm."""
    missing = list(range(1, world_size))
    while missing:
        for rank in missing:
            if store.check([f"asks/{rank}"]):
                name = store.get(f"asks/{rank}").decode()
                store.set(f"answer/{name}", str(start))
        missing = [rank for rank in missing if not own.check([f"here/{rank}"])]
        if missing and time.monotonic() > until:
            raise LaunchError(
                f"{ranks(missing).capitalize()} of {world_size} did not start within {seconds:g} "
                "s. Look into the log of those hosts, and whether as many processes were started "
                "as the job has."
            )
        time.sleep(POLL_SECONDS if missing else 0)


def ranks(numbers: list[int]) -> str:
    """Return `rank 3`, or `ranks 3, 5`; of many only the first."""
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]
