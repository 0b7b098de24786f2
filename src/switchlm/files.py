"""Atomic, durable files and folders: readers see the old content or the new, after a crash too.

A file survives a loss of power once its content and its folder are synced, a rename once the folder
is; these functions return after that. What is unfinished has a hidden name with the number of its
process, and is deleted by the next write to the same place. A symbolic link is followed: what it
points to is replaced.

A folder is replaced only if this package wrote everything in it: `.switchlm.json` lists its files.

`building` adds a lock for files that several processes need, such as a token cache: one process
builds it, the others wait.
"""

import ctypes
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from switchlm.errors import CheckpointError, DataError

Report = Callable[[str], None]

MANIFEST = ".switchlm.json"
_HASHED = 2**20  # bytes; of larger files the manifest has the size only
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # on some network file systems
_NO_EXCHANGE = (errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_all(path: Path) -> None:
    """Flush a file, or a folder and all in it, to disk."""
    if path.is_symlink():
        return
    for inside in path.iterdir() if path.is_dir() else ():
        _sync_all(inside)
    sync(path)


def make_folder(path: Path) -> list[Path]:
    """Make a folder and its parents durably; return those that did not exist, the outer first."""
    missing: list[Path] = []
    while not path.is_dir():
        missing.insert(0, path)
        path = path.parent
    for folder in missing:
        folder.mkdir(exist_ok=True)
        sync(folder.parent)
    return missing


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
    with new_file(path) as file:
        file.write(content)


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a hidden file, which replaces `path` if the body raises no error.

    A device or a pipe, such as /dev/stdout, is written to directly.
    """
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    path = _target(path)
    sweep(path)
    partial = _hidden(path, "partial")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def new_folder(folder: Path, kind: str) -> Iterator[Path]:
    """Yield an empty hidden folder, which replaces `folder` if the body raises no error.

    kind: see `check_replaceable`, which the caller calls first.
    """
    partial = hidden_folder(folder)
    try:
        yield partial
        replace_folder(partial, folder, kind)
    finally:
        remove_folder(partial)


@contextmanager
def changed_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden copy of a folder, which replaces it if the body raises no error.

    Files of the copy are links to the same content, so the body replaces them, and changes none in
    place.
    """
    partial = hidden_folder(folder)
    try:
        if folder.exists():
            shutil.copytree(folder, partial, symlinks=True, copy_function=_link, dirs_exist_ok=True)
        yield partial
        _sync_all(partial)
        exchange(partial, folder)
    finally:
        remove_folder(partial)


def _link(source: str, target: str) -> None:
    """Link a file to a second name, or copy it where the file system has no links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def hidden_folder(folder: Path) -> Path:
    """Make an empty hidden folder beside `folder`, for `replace_folder`, and return it."""
    folder = _target(folder)
    make_folder(folder.parent)
    sweep(folder)
    partial = _hidden(folder, "partial")
    partial.mkdir()
    return partial


def replace_folder(partial: Path, folder: Path, kind: str) -> None:
    """List the files of a folder in its manifest, sync them, and replace another folder by it."""
    written = {path.name: _describe(path) for path in sorted(partial.iterdir())}
    text = json.dumps({"kind": kind, "files": written}, indent=1) + "\n"
    (partial / MANIFEST).write_text(text, encoding="utf-8")
    _sync_all(partial)
    exchange(partial, folder)


def exchange(partial: Path, folder: Path) -> None:
    """Replace a folder by a hidden one beside it, which is synced already, and delete the old."""
    folder = _target(folder)
    if not folder.exists():
        os.rename(partial, folder)
        sync(folder.parent)
        return
    inside = Path.cwd() == folder
    try:
        _swap(partial, folder)
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
        # A crash between these two leaves no folder; the next write renames the old one back.
        old = _hidden(folder, "old")
        os.rename(folder, old)
        os.rename(partial, folder)
        partial = old
    if inside:  # else the process would be in the old folder, which is deleted now
        os.chdir(folder)
    sync(folder.parent)
    remove_folder(partial)


def _swap(one: Path, other: Path) -> None:
    """Exchange two names in one step; OSError where the system or the file system cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    here, swap = -100, 2  # AT_FDCWD; RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
    if hasattr(library, "renameat2"):
        failed = library.renameat2(here, names[0], here, names[1], swap)
    elif hasattr(library, "renamex_np"):
        failed = library.renamex_np(*names, swap)
    else:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if failed:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(other))


def check_replaceable(folder: Path, kind: str, earlier: Callable[[Path], bool]) -> None:
    """Raise CheckpointError unless `folder` is missing, empty, or as this package wrote it.

    kind: what it must have been written as, such as `model`.
    earlier: whether a folder without a manifest was written by an earlier version.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{str(folder)!r} is a file, and a folder is to be written there.")
    found = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
    if not found or (not (folder / MANIFEST).exists() and earlier(folder)):
        return
    listed = _read_manifest(folder, kind)
    for name in found:
        if name not in listed:
            what = f"it holds {name!r}, which switchlm has not written as part of the {kind}"
        elif listed[name] != _describe(folder / name):
            what = f"{name!r} has been changed since switchlm wrote it"
        else:
            continue
        raise CheckpointError(
            f"Will not replace the {kind} {str(folder)!r}: {what}. Choose another folder, or "
            "empty this one."
        )


def _read_manifest(folder: Path, kind: str) -> dict[str, object]:
    """Return the files that this package wrote as this kind of folder; none in another folder."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return dict(content["files"]) if content["kind"] == kind else {}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}


def _describe(path: Path) -> dict[str, object] | None:
    """Return what the manifest has of a file; None for what is no file."""
    if path.is_symlink() or not path.is_file():
        return None
    size = path.stat().st_size
    if size > _HASHED:
        return {"size": size}
    return {"size": size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _target(path: Path) -> Path:
    """Return the absolute path of what a path, or the link there, names."""
    return Path(os.path.realpath(path))


def _hidden(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}")


def sweep(path: Path) -> None:
    """Delete what processes that died have left of their writes to `path`.

    If it was being replaced by two renames, the old one is put back.
    """
    if not path.parent.is_dir():
        return
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(partial|old)-(\d+)")
    for left in list(path.parent.iterdir()):
        match = pattern.fullmatch(left.name)
        if match is None or (int(match[2]) != os.getpid() and process_lives(int(match[2]))):
            continue
        if match[1] == "old" and not path.exists():
            os.rename(left, path)
        else:
            remove(left)


def remove_folder(path: Path) -> None:
    """Delete a folder with its content, if it exists; of a symbolic link, the link alone."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def remove(path: Path) -> None:
    """Delete a file, or a folder with its content, if it exists."""
    if path.is_dir():
        remove_folder(path)
    else:
        path.unlink(missing_ok=True)


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
                unfinished = re.compile(rf"{re.escape(final.name)}\.part-[0-9a-f]{{8}}")
                for leftover in list(final.parent.iterdir()):
                    if unfinished.fullmatch(leftover.name):
                        remove(leftover)
            part = final.parent / f"{final.name}.part-{secrets.token_hex(4)}"
            try:
                yield part
                if part.exists():
                    _sync_all(part)
                    _rename(part, final)
                    sync(final.parent)
            finally:
                remove(part)
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
        if error.errno in NO_LOCKS:
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
