"""Start torchrun, find its processes, and leave none behind."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

WORKER = Path(__file__).with_name("elastic_worker.py")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Job:
    """A process and its children; what they print goes to one file.

    command: as of a shell. Leaving the block kills what is still alive of them.
    """

    def __init__(self, log: Path, command: list[str], **environment: str) -> None:
        self.log = log
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TORCH"))}
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**inherited, "OMP_NUM_THREADS": "1", **environment},
                start_new_session=True,
            )
        self.seen: set[int] = set()

    def __enter__(self) -> "Job":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pid in [*self.workers().values(), self.process.pid]:
            if alive(pid) and (pid != self.process.pid or self.process.poll() is None):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(20)

    @property
    def text(self) -> str:
        return self.log.read_text("utf-8", errors="replace")

    def workers(self) -> dict[int, int]:
        """Return the process of each rank that runs now."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        found = {}
        try:
            for pid in map(int, children.read_text().split()):
                rank = re.search(
                    rb"(?:^|\0)RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes()
                )
                if rank is not None:
                    found[int(rank[1])] = pid
        except (FileNotFoundError, ProcessLookupError):
            return {}  # one ended meanwhile; ask again
        self.seen |= set(found.values())
        return found

    def send(self, rank: int, number: signal.Signals) -> None:
        until = time.monotonic() + 10
        while rank not in (found := self.workers()):
            assert time.monotonic() < until, f"no rank {rank}: {self.text}"
        os.kill(found[rank], number)

    def wait_for(self, pattern: str, seconds: float = 60) -> float:
        """Wait until a line matches; return for how long."""
        start = time.monotonic()
        while not re.search(pattern, self.text):
            self.workers()
            assert self.process.poll() is None, f"ended without {pattern!r}: {self.text}"
            assert time.monotonic() - start < seconds, f"no {pattern!r}: {self.text}"
            time.sleep(0.05)
        return time.monotonic() - start

    def finish(self, seconds: float = 90) -> int:
        """Wait for the end; return the status, after a look that nothing is left running."""
        status = self.process.wait(seconds)
        left = [pid for pid in self.seen if alive(pid)]
        assert not left, f"processes {left} outlived their torchrun: {self.text}"
        return status


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def torchrun(
    *command: str,
    processes: int = 2,
    nodes: int = 1,
    node: int = 0,
    rendezvous: str = "c10d",
    port: int | None = None,
    address: str = "127.0.0.1",
    restarts: int = 0,
    prefix: tuple[str, ...] = (),
) -> list[str]:
    """Return the command of one agent; two of them with one `port` are two hosts."""
    port = port or free_port()
    place = (
        ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{address}:{port}", "--rdzv-id", "job"]
        if rendezvous == "c10d"
        else ["--master-addr", address, "--master-port", str(port), "--node-rank", str(node)]
    )
    # The address that an agent gives out of itself: a host name may not resolve to this machine.
    here = [] if rendezvous != "c10d" else ["--local-addr", address]
    return [
        *prefix, sys.executable, "-m", "torch.distributed.run", *place, *here,
        "--nnodes", str(nodes), "--nproc-per-node", str(processes),
        "--max-restarts", str(restarts), *command,
    ]  # fmt: skip


def toy(folder: Path, *, steps: int = 25, seconds: float = 0.1, timeout: float = 20) -> list[str]:
    """Return the arguments of the toy training, saved every fifth step."""
    return [str(WORKER), str(folder), str(steps), str(seconds), str(timeout)]
