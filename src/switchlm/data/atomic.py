"""Work that several processes share: one prepares it, behind a lock, and the others wait."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

Report = Callable[[str], None]


@contextmanager
def locked(path: Path, report: Report) -> Iterator[None]:
    """Hold an exclusive lock on `path`; the system lets go of it if the process dies."""
    import fcntl

    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("Waiting for another process that prepares the same text.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def flush(file: IO[Any]) -> None:
    """Put what was written onto the disk."""
    file.flush()
    os.fsync(file.fileno())
