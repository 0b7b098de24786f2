"""Heartbeats: every rank writes its step to the store, so that an error can name a lost rank.

Gloo reports "connection closed by peer [10.0.0.7]:4711" or "timed out waiting 600000 ms". The error
raised here names the rank, its host and process, and its last step.

The store has for each rank `who` (host and process), `beat` (step and time), `pulse` and, after a
failure, `end` (the error of that rank). A running rank writes `end` as soon as its own collective
fails, which for some is long after the others': they wait for ranks that still run. Meanwhile a
thread of theirs counts `pulse` up. A rank without `end` whose pulse stands still was killed or
stopped. The first to find that writes the `verdict`, which all others read and repeat.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from switchlm import _torch
from switchlm.errors import LostRankError

BEAT_SECONDS = 1.0
PULSE_SECONDS = 0.25
# Time for all ranks to write `end` after a collective failed, and to read that of the others.
ANSWER_SECONDS = 4.0
READ_SECONDS = 2.0
ALIVE = "the connection to the others failed"

T = TypeVar("T")


class RankStatus(NamedTuple):
    """The entries of a rank in the store, as text.

    who: host and process.
    last_beat: its step, and the seconds since.
    end: its error; None if it wrote none.
    pulse: a count that goes up while the process runs.
    """

    rank: int
    who: str
    last_beat: str
    end: str | None
    pulse: str | None


class Heartbeat:
    """Writes the heartbeat of one rank, and reads those of all ranks after a failure.

    restarted: whether the job was started before, and failed or was requeued.
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
        self._pulse_store = _torch.second_connection(self._store)
        self._verdict: str | None = None  # who failed or is lost, as the first to ask found
        self._last_write = 0.0
        self._step: int | None = None
        who = f"host {socket.gethostname()}, process {os.getpid()}"
        self._store.set(f"who/{rank}", json.dumps({"who": who, "at": time.time()}))

    def beat(self, step: int) -> None:
        """Record that `step` steps are done, at most once per second."""
        self._step = step
        now = time.monotonic()
        if now - self._last_write >= BEAT_SECONDS:
            self._last_write = now
            self._write_beat()

    def _write_beat(self) -> None:
        beat = {"step": self._step, "at": time.time()}
        self._store.set(f"beat/{self.rank}", json.dumps(beat))

    @contextmanager
    def local_rank_zero_first(self, what: str) -> Iterator[None]:
        """Run the block in local rank 0 of each node first, then in the other ranks.

        what: a name for the work, used once per run.

        If it fails in local rank 0, the others raise LostRankError with its error.
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
        """Raise the failure of a collective in the block as LostRankError; others unchanged."""
        self._verdict, over = None, threading.Event()
        threading.Thread(target=self._pulse, args=(over,), daemon=True).start()
        try:
            yield
        except Exception as error:
            if not is_collective_error(error):
                message = _one_line(error, 300)
                run_with_timeout(ANSWER_SECONDS, lambda: self._answer(message))
                raise
            raise LostRankError(self._explain(error)) from error
        finally:
            over.set()

    def _pulse(self, over: threading.Event) -> None:
        count = 0
        with suppress(dist.DistError):  # the store is gone, and the job with it
            while not over.wait(PULSE_SECONDS):
                count += 1
                self._pulse_store.set(f"pulse/{self.rank}", str(count))
                if self._verdict is None and self._pulse_store.check(["verdict"]):
                    self._verdict = self._pulse_store.get("verdict").decode()
                    self._pulse_store.set(f"read/{self.rank}", "")

    def _answer(self, end: str) -> None:
        if self._step is not None:
            self._write_beat()
        self._store.set(f"end/{self.rank}", end)

    def _explain(self, error: Exception) -> str:
        reason = f"({' '.join(str(error).split())[:200]})"
        if self._verdict is not None:
            run_with_timeout(READ_SECONDS, lambda: self._answer(ALIVE))
        else:
            run_with_timeout(ANSWER_SECONDS + READ_SECONDS, self._find_causes)
        if self._verdict is None:
            return (
                f"A collective failed on rank {self.rank}, and the store of the job does not "
                "answer either: rank 0, or the host it runs on, is gone, stopped or cut off. "
                f"{reason}"
            )
        return f"A collective failed on rank {self.rank}. {self._verdict} {reason}"

    def _find_causes(self) -> None:
        """Write `end`, wait for that of the others, and write the verdict."""
        self._answer(ALIVE)
        pulses = [self._read(f"pulse/{rank}") for rank in range(self.world_size)]
        self._await("end", range(self.world_size), ANSWER_SECONDS)
        if self._verdict is not None:
            return
        statuses = [self._status(rank) for rank in range(self.world_size)]
        failed = [m for m in statuses if m.end not in (None, ALIVE)]
        silent = [m for m in statuses if m.end is None]
        # Silent ranks whose pulse goes on run, and wait for the others, if there are any.
        lost = [m for m in silent if m.pulse == pulses[m.rank]] or silent
        causes = [f"{m.who} failed: {m.end}." for m in failed] or [
            f"{m.who} was last heard of {m.last_beat}; it was killed, or it hangs." for m in lost
        ]
        running = [m.rank for m in statuses if m not in lost and m not in failed]
        if not causes:
            causes = ["All ranks still answer: look at the network between the hosts."]
        elif not failed:
            names = ", ".join(map(str, running[:8])) + (", ..." if len(running) > 8 else "")
            causes.append(f"Waiting for it: {names}.")
        self._verdict = " ".join(causes)
        self._store.set("verdict", self._verdict)
        self._store.set(f"read/{self.rank}", "")
        if self.rank == 0:  # it may host the store, so it waits until the others have read
            self._await("read", running, READ_SECONDS / 2)

    def _await(self, key: str, ranks: Iterable[int], seconds: float) -> None:
        """Wait, at most `seconds`, for all these ranks to write that key, or one the verdict."""
        keys, known = [f"{key}/{rank}" for rank in ranks], self._verdict
        until = time.monotonic() + seconds
        while not self._store.check(keys) and time.monotonic() < until and self._verdict is known:
            time.sleep(0.1)

    def _status(self, rank: int) -> RankStatus:
        start: dict[str, Any] = json.loads(
            self._read(f"who/{rank}") or json.dumps({"who": "unknown", "at": time.time()})
        )
        beat: dict[str, Any] = json.loads(
            self._read(f"beat/{rank}") or json.dumps({"step": None, "at": start["at"]})
        )
        where = "before its first step" if beat["step"] is None else f"at step {beat['step']}"
        return RankStatus(
            rank=rank,
            who=f"rank {rank} ({start['who']})",
            last_beat=f"{where}, {max(time.time() - beat['at'], 0):.0f} s ago",
            end=self._read(f"end/{rank}"),
            pulse=self._read(f"pulse/{rank}"),
        )

    def _read(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None


def _one_line(error: BaseException, limit: int) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:limit]}"


def is_collective_error(error: Exception) -> bool:
    """Whether torch.distributed, gloo or NCCL raised this; gloo raises bare RuntimeErrors."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error).split("\n")[0]


def run_with_timeout(seconds: float, work: Callable[[], T]) -> T | None:
    """Return the result of `work`, None if it fails or takes longer; it runs in a daemon thread.

    Needed because clients of a store whose host is stopped wait for ever.
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
