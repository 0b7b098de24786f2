"""Run a program with a time limit, after which it and its descendants are killed."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import pytest

Done = subprocess.CompletedProcess[str]


def run(
    command: Sequence[str],
    *,
    seconds: float = 240,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Done:
    """Return status and output; on a timeout fail with the stacks of all processes.

    Output goes to files, since children may outlive a hanging program and keep its pipes open.
    env: instead of this process's environment.
    """
    environment = {**(os.environ if env is None else env), "PYTHONFAULTHANDLER": "1"}
    with text_file() as out, text_file() as error:
        process = subprocess.Popen(command, stdout=out, stderr=error, cwd=cwd, env=environment)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            _end(process)
            error.seek(0)
            pytest.fail(f"{command} hung for {seconds} s. {error.read()[-20_000:]}")
        out.seek(0)
        error.seek(0)
        return Done(process.args, process.returncode, out.read(), error.read())


def text_file() -> IO[str]:
    return tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its descendants; Python prints its stacks on SIGABRT."""
    processes = [process.pid, *descendants(process.pid)]
    for number in (signal.SIGABRT, signal.SIGKILL):
        for pid in reversed(processes):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        time.sleep(2)
    process.wait(20)


def descendants(pid: int) -> Iterator[int]:
    """Yield the processes that a process and its descendants started (on Linux)."""
    for children in Path("/proc", str(pid), "task").glob("*/children"):
        try:
            found = [int(child) for child in children.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
        for child in found:
            yield child
            yield from descendants(child)
