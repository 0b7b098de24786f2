"""A disk that stops the process before any chosen step, for crash_driver.py."""

import builtins
import hashlib
import io
import os
import shutil
import signal
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from switchlm import files

OPERATIONS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


class Disk:
    """Counts the writes, syncs, renames and deletions of this process, and ends it before one.

    With `copies` it exits and leaves three states of the disk in that folder: `stop` as it is,
    `torn` with half of the write that was next, `power` without all that was not synced (content of
    files, entries of folders). Without, it kills itself.
    """

    def __init__(self, root: Path, stop_at: int, copies: Path | None = None) -> None:
        self.root, self.stop_at, self.copies = root, stop_at, copies
        self.steps = 0
        self.dirty: dict[int, int] = {}  # inode of a file: its bytes when last synced
        # Inode of a folder, a new name in it, and how its entries become those of before.
        self.entries: list[tuple[int, str, Callable[[Path], None]]] = []

    def install(self) -> None:
        self.originals = {name: getattr(os, name) for name in OPERATIONS}
        self.open = io.open
        io.open = builtins.open = self._open
        os.fsync, self.swap = self._fsync, files._swap
        files._swap = self._swapped
        os.rename, os.replace = self._moving(os.rename), self._moving(os.replace)
        for name in ("mkdir", "unlink", "rmdir"):
            setattr(os, name, self._counted(getattr(os, name)))

    def count(self, torn: Callable[[], None] | None = None) -> None:
        if self.steps == self.stop_at:
            if self.copies is None:
                os.kill(os.getpid(), signal.SIGKILL)
            self.leave(torn)
            os._exit(9)
        self.steps += 1

    def uninstall(self) -> None:
        io.open = builtins.open = self.open
        files._swap = self.swap
        for name, original in self.originals.items():
            setattr(os, name, original)

    def leave(self, torn: Callable[[], None] | None = None) -> None:
        """Leave the states of the disk as of now."""
        self.uninstall()
        shutil.copytree(self.root, self.copies / "stop")
        if torn is not None:
            torn()
            shutil.copytree(self.root, self.copies / "torn")
        self._lose_power(self.root, {})
        shutil.copytree(self.root, self.copies / "power")

    def settle(self, descriptor: int, known: int) -> int:
        """Note that a file now has more bytes on the disk than `known`."""
        status = os.fstat(descriptor)
        if status.st_size != known:
            self.dirty.setdefault(status.st_ino, known)
        return status.st_size

    def _open(self, path: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
        if not str(path).startswith(str(self.root)) or mode[0] not in "wax":
            return self.open(path, mode, *args, **more)
        self.count()
        if not Path(path).exists():
            self._note(Path(path), _delete)
        return _Stream(self.open(path, mode, *args, **more), self)

    def _fsync(self, descriptor: int) -> None:
        self.count()
        self.originals["fsync"](descriptor)
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            self.entries = [entry for entry in self.entries if entry[0] != status.st_ino]
        self.dirty.pop(status.st_ino, None)

    def _note(self, path: Path, undo: Callable[[Path], None]) -> None:
        self.entries.append((os.stat(path.parent).st_ino, path.name, undo))

    def _moving(self, function: Callable[..., None]) -> Callable[..., None]:
        def moved(old: Any, new: Any, **more: Any) -> None:
            self.count()
            place, kept = Path(new), None
            if self.copies is not None and place.is_file():
                kept = self.copies.with_name(f"replaced-{uuid.uuid4().hex}")
                os.link(place, kept)
            function(old, new, **more)

            def undo(path: Path) -> None:
                self.originals["rename"](path, path.with_name(Path(old).name))
                if kept is not None:
                    shutil.copyfile(kept, path)

            self._note(place, undo)

        return moved

    def _swapped(self, one: Path, other: Path) -> None:
        self.count()
        self.swap(one, other)
        self._note(other, lambda path: self.swap(path.with_name(one.name), path))

    def _counted(self, function: Callable[..., None]) -> Callable[..., None]:
        def wrapped(*args: Any, **more: Any) -> None:
            self.count()
            function(*args, **more)
            if function.__name__ == "mkdir":
                self._note(Path(args[0]), _delete)

        return wrapped

    def _lose_power(self, root: Path, copied: dict[int, int]) -> None:
        """Undo what was not synced, in a folder; copied: its inodes by those of this disk."""
        dirty = {copied.get(inode, inode): size for inode, size in self.dirty.items()}
        for folder, _, names in os.walk(root):
            for name in names:
                path = os.path.join(folder, name)
                inode = os.stat(path).st_ino
                if inode in dirty:
                    os.truncate(path, dirty[inode])
        for inode, name, undo in reversed(self.entries):
            folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
            wanted = copied.get(inode, inode)
            found = next((path for path in folders if path.stat().st_ino == wanted), None)
            if found is not None and (found / name).exists():
                undo(found / name)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


class Recorder(Disk):
    """Copies the disk before every step instead, as it is and without what was not synced.

    So one process gives all states that one may leave which dies. The copies are `stop-N` and
    `power-N`; a copy equal to one before is deleted.
    """

    def __init__(self, root: Path, copies: Path) -> None:
        super().__init__(root, -1, copies)
        self.seen: set[bytes] = set()
        self.busy = False

    def count(self, torn: Callable[[], None] | None = None) -> None:
        if not self.busy:
            self.busy = True
            self.record()
            self.steps += 1
            self.busy = False

    def record(self) -> None:
        inodes = {path.stat().st_ino for path in _visible(self.root)}
        unsynced = [entry[:2] for entry in self.entries if entry[0] in inodes]
        dirty = sorted(item for item in self.dirty.items() if item[0] in inodes)
        if self._known(_content(self.root) + repr((unsynced, dirty)).encode()):
            return
        for kind in ("stop", "power"):
            assert self.copies is not None
            copy = self.copies / f"{kind}-{self.steps:03}"
            shutil.copytree(self.root, copy)
            if kind == "power":
                self._lose_power(copy, dict(self._inodes(copy)))
            if self._known(_content(copy)):
                shutil.rmtree(copy)

    def _known(self, state: bytes) -> bool:
        known = state in self.seen
        self.seen.add(state)
        return known

    def _inodes(self, copy: Path) -> Iterator[tuple[int, int]]:
        for path in (self.root, *self.root.rglob("*")):
            yield path.stat().st_ino, (copy / path.relative_to(self.root)).stat().st_ino

    def _note(self, path: Path, undo: Callable[[Path], None]) -> None:
        if not self.busy:
            super()._note(path, undo)


def _visible(root: Path) -> Iterator[Path]:
    """Yield a folder and all in it, but for what is in hidden folders, in order."""
    yield root
    for path in sorted(root.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            yield from _visible(path)
        else:
            yield path


def _content(root: Path) -> bytes:
    """Return a hash of all visible names and files."""
    state = hashlib.sha256()
    for path in _visible(root):
        state.update(str(path.relative_to(root)).encode())
        state.update(path.read_bytes() if path.is_file() else b"/")
    return state.digest()


class _Stream:
    """A file open for writing whose writes are counted."""

    def __init__(self, stream: Any, disk: Disk) -> None:
        self.stream, self.disk, self.size = stream, disk, 0
        self.pending = False  # text waits for a flush: only that reaches the disk

    def write(self, content: Any) -> int:
        def torn() -> None:
            self.stream.write(content[: len(content) // 2])
            self.stream.flush()

        if isinstance(content, str):
            self.pending = True
        else:
            self.disk.count(torn)
        written: int = self.stream.write(content)
        self.size = self.disk.settle(self.stream.fileno(), self.size)
        return written

    def flush(self) -> None:
        if self.pending:
            self.disk.count()
            self.pending = False
        self.stream.flush()
        self.size = self.disk.settle(self.stream.fileno(), self.size)

    def close(self) -> None:
        if not self.stream.closed:
            self.flush()
            self.stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
