"""Files that several processes share: one prepares them, and the others see all or nothing."""

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from switchlm.errors import DataError

Report = Callable[[str], None]

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # what some network file systems answer


@contextmanager
def building(final: Path, report: Report) -> Iterator[Path]:
    """Yield a path to write a file or folder to; when the body ends well, it becomes `final`.

    The body first looks whether another process has made `final` meanwhile, and then writes
    nothing. A lock keeps others waiting rather than doing the same work; where the file system has
    none, whoever renames first wins. Raises DataError where the disk does not let it.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with (final.parent / f"{final.name}.lock").open("w") as lock:
            alone = _lock(lock, report)
            if alone:  # then what is unfinished was left by a process that died
                for leftover in final.parent.glob(f"{final.name}.part-*"):
                    _remove(leftover)
            part = final.parent / f"{final.name}.part-{secrets.token_hex(4)}"
            try:
                yield part
                if part.exists():
                    _rename(part, final)
            finally:
                _remove(part)
    except OSError as error:
        raise DataError(
            f"Cannot write the cache in {str(final.parent)!r}: {error}. Point the cache at a "
            "folder with room that you may write to."
        ) from None


def flush(file: IO[Any]) -> None:
    """Put what was written onto the disk."""
    file.flush()
    os.fsync(file.fileno())


def _lock(file: IO[str], report: Report) -> bool:
    """Wait for the lock, which the system frees if its holder dies; False if there are no locks."""
    import fcntl  # not on every system that can still read what was built

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        report("Waiting for another process that prepares the same text.")
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def _rename(part: Path, final: Path) -> None:
    """Put `part` in the place of `final`; a folder already there was made by another process."""
    try:
        os.replace(part, final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
