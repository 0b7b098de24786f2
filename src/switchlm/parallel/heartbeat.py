"""Who is alive: every rank leaves word in the store, so that the survivors can name the lost.

Gloo says "connection closed by peer [10.0.0.7]:4711" or "timed out waiting 600000 ms"; which rank
that was, where it ran and how far it came, is said here.

Of each rank the store holds `who` (host and process), `beat` (step and time) and, after a failure,
`end`: what went wrong there. A rank that still runs answers so as soon as its own collective fails;
those who do not answer are the lost ones.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from switchlm.errors import LostRankError

BEAT_SECONDS = 1.0
# How long the others have to answer once a collective failed, and to read the answers.
ANSWER_SECONDS = 4.0
READ_SECONDS = 2.0
ALIVE = "the connection to the others failed"

T = TypeVar("T")


class Member(NamedTuple):
    """What the store knows of a rank: who it is, when it last left word, and how it ended."""

    rank: int
    who: str
    heard: str
    end: str | None


class Heartbeat:
    """One rank's view of all ranks, by way of the store.

    restarted: whether the job was started before, and failed or was put back.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        *,
        local_rank: int = 0,
        node: int = 0,
        restarted: bool = False,
    ) -> None:
        self.rank, self.world_size, self.local_rank, self.node = rank, world_size, local_rank, node
        self.restarted = restarted
        self._store = dist.PrefixStore("heartbeat", store)
        self._beaten = 0.0
        self._step: int | None = None
        who = f"host {socket.gethostname()}, process {os.getpid()}"
        self._store.set(f"who/{rank}", json.dumps({"who": who, "at": time.time()}))

    def beat(self, step: int) -> None:
        """Leave word that `step` steps are done; cheap enough for every step."""
        self._step = step
        now = time.monotonic()
        if now - self._beaten >= BEAT_SECONDS:
            self._beaten = now
            self._write_beat()

    def _write_beat(self) -> None:
        beat = {"step": self._step, "at": time.time()}
        self._store.set(f"beat/{self.rank}", json.dumps(beat))

    @contextmanager
    def local_rank_zero_first(self, what: str) -> Iterator[None]:
        """Run the block in local rank 0 of each node first, and in the others after it.

        what: a name for this piece of work, used once per run.

        Where it fails in the first one, the others do not begin: LostRankError says why.
        """
        key = f"first/{what}/{self.node}"
        if self.local_rank > 0:
            self._store.wait([key], timedelta(days=7))
            if failure := self._store.get(key).decode():
                raise LostRankError(
                    f"Rank {self.rank} waited for the first process of its host ({what}), which "
                    f"failed: {failure}."
                )
            yield
            return
        try:
            yield
        except BaseException as error:
            self._store.set(key, _one_line(error, 300))
            raise
        self._store.set(key, "")

    @contextmanager
    def report_lost_ranks(self) -> Iterator[None]:
        """Turn the failure of a collective in the block into LostRankError; leave others alone."""
        try:
            yield
        except Exception as error:
            if not of_a_collective(error):
                message = _one_line(error, 300)
                within(ANSWER_SECONDS, lambda: self._answer(message))
                raise
            raise LostRankError(self._explain(error)) from error

    def _answer(self, end: str) -> None:
        if self._step is not None:
            self._write_beat()
        self._store.set(f"end/{self.rank}", end)

    def _explain(self, error: Exception) -> str:
        reason = f"({' '.join(str(error).split())[:200]})"
        members = within(ANSWER_SECONDS + READ_SECONDS, self._roll_call)
        if members is None:
            return (
                f"A collective failed on rank {self.rank}, and the store of the job does not "
                "answer either: rank 0, or the host it runs on, is gone, stopped or cut off. "
                f"{reason}"
            )
        failed = [m for m in members if m.end not in (None, ALIVE)]
        silent = [m for m in members if m.end is None]
        told = [f"{m.who} failed: {m.end}." for m in failed]
        told += [
            f"{m.who} was last heard of {m.heard}; it was killed, or it hangs."
            for m in ([] if failed else silent)
        ]
        if not told:
            told = ["All ranks still answer: look at the network between the hosts."]
        return f"A collective failed on rank {self.rank}. {' '.join(told)} {reason}"

    def _roll_call(self) -> list[Member]:
        """Answer, wait for the answers of the others, and return what is known of all."""
        self._answer(ALIVE)
        self._await("end", range(self.world_size), ANSWER_SECONDS)
        members = [self._member(rank) for rank in range(self.world_size)]
        self._store.set(f"read/{self.rank}", "")
        if self.rank == 0:  # it may be the store's host: the others must have read, too
            answered = [member.rank for member in members if member.end == ALIVE]
            self._await("read", answered, READ_SECONDS / 2)
        return members

    def _await(self, key: str, ranks: Iterable[int], seconds: float) -> None:
        """Wait until all the ranks have left that word, or so long."""
        keys = [f"{key}/{rank}" for rank in ranks]
        until = time.monotonic() + seconds
        while not self._store.check(keys) and time.monotonic() < until:
            time.sleep(0.1)

    def _member(self, rank: int) -> Member:
        who = self._read(f"who/{rank}")
        beat = self._read(f"beat/{rank}")
        said: dict[str, Any] = json.loads(who) if who else {"who": "unknown", "at": time.time()}
        done: dict[str, Any] = json.loads(beat) if beat else {"step": None, "at": said["at"]}
        where = "before its first step" if done["step"] is None else f"at step {done['step']}"
        return Member(
            rank=rank,
            who=f"rank {rank} ({said['who']})",
            heard=f"{where}, {max(time.time() - done['at'], 0):.0f} s ago",
            end=self._read(f"end/{rank}"),
        )

    def _read(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None


def _one_line(error: BaseException, limit: int) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:limit]}"


def of_a_collective(error: Exception) -> bool:
    """Whether torch.distributed, gloo or NCCL raised this; gloo raises bare RuntimeErrors."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error).split("\n")[0]


def within(seconds: float, work: Callable[[], T]) -> T | None:
    """Return what `work` returns, None if it fails or takes longer; it goes on in a daemon thread.

    A store whose host is stopped lets its clients wait for ever.
    """
    found: list[T] = []

    def run() -> None:
        try:
            found.append(work())
        except dist.DistError as error:
            logging.getLogger(__name__).debug("The store does not answer: %s", error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None
