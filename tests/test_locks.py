"""One process at a time in a folder, and none waits for a dead one."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from switchlm.errors import ConfigError
from switchlm.locks import LOCK, exclusive

HOLD = """
import sys, time
from pathlib import Path
from switchlm.locks import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_is_refused_and_told_who_the_first_is(tmp_path):
    with (
        exclusive(tmp_path / "run"),
        pytest.raises(ConfigError, match=f"^Process {os.getpid()} is writing to .*one process at"),
        exclusive(tmp_path / "run"),
    ):
        pass
    assert not (tmp_path / "run").exists()


def test_a_lock_is_freed_when_its_process_is_killed(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"Process {process.pid} "), exclusive(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / LOCK).exists()
    with exclusive(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_folder_stays(tmp_path):
    with exclusive(tmp_path / "a" / "run"):
        (tmp_path / "a" / "run" / "file").touch()
    assert [path.name for path in (tmp_path / "a" / "run").iterdir()] == ["file"]


def test_a_lock_that_its_holder_has_just_deleted_is_none(tmp_path, monkeypatch):
    """Between opening and locking the file."""
    real, calls = fcntl.flock, []

    def delayed(descriptor: int, operation: int) -> None:
        if not calls:
            (tmp_path / LOCK).unlink()
        calls.append(operation)
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", delayed)
    with exclusive(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith(f"{os.getpid()} ")
    assert len(calls) == 2


def test_without_locks_nobody_is_refused(tmp_path, monkeypatch):
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with exclusive(tmp_path), exclusive(tmp_path):
        pass


def test_a_lock_of_another_host_is_named_with_it(tmp_path):
    with exclusive(tmp_path):
        Path(tmp_path / LOCK).write_text("7 elsewhere\n")
        with pytest.raises(ConfigError, match="Process 7 on the host elsewhere"):
            exclusive(tmp_path).__enter__()


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "run").symlink_to("nowhere/at/all")
    with pytest.raises(ConfigError, match=r"Cannot write to the folder .*run'"):
        exclusive(tmp_path / "run").__enter__()
