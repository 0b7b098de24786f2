"""One process at a time in a folder: a lock that the system frees when its process dies."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from switchlm.errors import ConfigError
from switchlm.files import NO_LOCKS, make_folder

LOCK = ".lock"


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it does not exist.

    Afterwards the lock, and folders that were made and are empty, are deleted. On a file system
    without locks there is none. Raises ConfigError at once if another process holds it, with the
    number of that process, and for a folder that cannot be written to.
    """
    path = folder / LOCK
    try:
        made = make_folder(folder)
        descriptor = _acquire(path)
    except OSError as error:
        raise ConfigError(
            f"Cannot write to the folder {str(folder)!r}: {error.strerror}. Choose another --out."
        ) from None
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        for one in reversed(made):
            if one.is_dir() and not any(one.iterdir()):
                one.rmdir()


def _acquire(path: Path) -> int:
    """Return the descriptor of the locked file."""
    import fcntl  # not on every system

    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                return descriptor
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise _refused(path) from None
            raise
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
        os.close(descriptor)  # its holder has just deleted it


def _refused(path: Path) -> ConfigError:
    """Return the error that names the holder, which writes its number just after it locks."""
    pid, host = "?", "?"
    for _ in range(20):
        try:
            pid, host = path.read_text(encoding="utf-8").split()
            break
        except (OSError, ValueError):
            time.sleep(0.05)
    where = "" if host == socket.gethostname() else f" on the host {host}"
    return ConfigError(
        f"Process {pid}{where} is writing to {str(path.parent)!r}, and one process at a time may. "
        "Wait until it ends, or stop it (Ctrl-C, or kill with its number), or choose another --out."
    )
