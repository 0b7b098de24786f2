"""Atomic, durable files and folders: readers see the old content or the new, after a crash too.

A file survives a loss of power once its content and its folder are synced, a rename once the folder
is; these functions return after that. `building` adds a lock for files that several processes
need, such as a token cache: one process builds it, the others wait.
"""

import errno
import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from switchlm.errors import DataError

Report = Callable[[str], None]

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # on some network file systems


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_all(path: Path) -> None:
    """Flush a file, or a folder and the files in it, to disk."""
    for inside in path.iterdir() if path.is_dir() else ():
        sync(inside)
    sync(path)


def make_folder(path: Path) -> None:
    """Make a folder and its parents durably, if they do not exist."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def to_json(value: Any, **options: Any) -> str:
    """Return JSON, with null for NaN and infinities, which JSON lacks; options: of json.dumps."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(finite(value), allow_nan=False, **options)


def finite(value: Any) -> Any:
    """Return JSON values with None for NaN and infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return value


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically and durably."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(content)
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty hidden folder, which replaces `folder` if the body raises no error."""
    partial = hidden_folder(folder)
    try:
        yield partial
        replace_folder(partial, folder)
    finally:
        remove_folder(partial)


def hidden_folder(folder: Path) -> Path:
    """Make an empty hidden folder beside `folder`, for `replace_folder`, and return it."""
    make_folder(folder.absolute().parent)
    return Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.absolute().parent))


def replace_folder(partial: Path, folder: Path) -> None:
    """Sync a folder with all its files, and replace another by it."""
    partial.chmod(0o755)
    _sync_all(partial)
    old = None
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
        os.replace(folder, old)
    os.replace(partial, folder)
    sync(folder.parent)
    if old is not None:
        shutil.rmtree(old)


def remove_folder(path: Path) -> None:
    """Delete a folder with its content, if it exists."""
    if path.exists():
        shutil.rmtree(path)


def process_lives(pid: int) -> bool:
    """Whether a process with this id runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


@contextmanager
def building(final: Path, report: Report) -> Iterator[Path]:
    """Yield a path to write a file or folder to, which is renamed to `final` if the body succeeds.

    The body must first check whether another process has built `final`, and then write nothing. A
    lock makes other processes wait; on a file system without locks the first rename wins. Raises
    DataError if the folder cannot be written to.
    """
    try:
        make_folder(final.parent)
        with (final.parent / f"{final.name}.lock").open("w") as lock:
            locked = _lock(lock, report)
            if locked:  # then unfinished files are those of a process that died
                for leftover in final.parent.glob(f"{final.name}.part-*"):
                    _remove(leftover)
            part = final.parent / f"{final.name}.part-{secrets.token_hex(4)}"
            try:
                yield part
                if part.exists():
                    _sync_all(part)
                    _rename(part, final)
                    sync(final.parent)
            finally:
                _remove(part)
    except OSError as error:
        raise DataError(
            f"Cannot write the cache in {str(final.parent)!r}: {error}. Give a folder with free "
            "space that you may write to, by --cache or SWITCHLM_CACHE."
        ) from None


def _lock(file: IO[str], report: Report) -> bool:
    """Wait for the lock, which is freed if its process dies; False if there are no locks."""
    import fcntl  # not on every system that can read the built files

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
    """Rename `part` to `final`, unless another process has already built that folder."""
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
