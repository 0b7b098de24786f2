"""A disk that stops the process before any chosen step, for crash_driver.py."""

import builtins
import io
import os
import shutil
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

OPERATIONS = ("fsync", "rename", "mkdir", "unlink", "rmdir")


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
        self.entries: list[tuple[int, str, str | None]] = []  # folder's inode, new name, old name

    def install(self) -> None:
        self.originals = {name: getattr(os, name) for name in OPERATIONS}
        self.open = io.open
        io.open = builtins.open = self._open
        os.fsync, os.rename = self._fsync, self._rename
        for name in ("mkdir", "unlink", "rmdir"):
            setattr(os, name, self._counted(getattr(os, name)))

    def count(self, torn: Callable[[], None] | None = None) -> None:
        if self.steps == self.stop_at:
            if self.copies is None:
                os.kill(os.getpid(), signal.SIGKILL)
            self.leave(torn)
            os._exit(9)
        self.steps += 1

    def leave(self, torn: Callable[[], None] | None = None) -> None:
        """Leave the states of the disk as of now."""
        io.open = builtins.open = self.open
        for name, original in self.originals.items():
            setattr(os, name, original)
        shutil.copytree(self.root, self.copies / "stop")
        if torn is not None:
            torn()
            shutil.copytree(self.root, self.copies / "torn")
        self._lose_power()
        shutil.copytree(self.root, self.copies / "power")

    def settle(self, descriptor: int, known: int) -> int:
        """Note that a file now has more bytes on the disk than `known`."""
        status = os.fstat(descriptor)
        if status.st_size != known:
            self.dirty.setdefault(status.st_ino, known)
        return status.st_size

    def _open(self, path: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
        if not str(path).startswith(str(self.root)) or mode[0] not in "wa":
            return self.open(path, mode, *args, **more)
        self.count()
        self.entries.append((os.stat(Path(path).parent).st_ino, Path(path).name, None))
        return _Stream(self.open(path, mode, *args, **more), self)

    def _fsync(self, descriptor: int) -> None:
        self.count()
        self.originals["fsync"](descriptor)
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            self.entries = [entry for entry in self.entries if entry[0] != status.st_ino]
        self.dirty.pop(status.st_ino, None)

    def _rename(self, old: Any, new: Any, **more: Any) -> None:
        self.count()
        self.originals["rename"](old, new, **more)
        self.entries.append((os.stat(Path(new).parent).st_ino, Path(new).name, Path(old).name))

    def _counted(self, function: Callable[..., None]) -> Callable[..., None]:
        def wrapped(*args: Any, **more: Any) -> None:
            self.count()
            function(*args, **more)
            if function.__name__ == "mkdir":
                path = Path(args[0])
                self.entries.append((os.stat(path.parent).st_ino, path.name, None))

        return wrapped

    def _lose_power(self) -> None:
        for folder, _, names in os.walk(self.root):
            for name in names:
                path = os.path.join(folder, name)
                inode = os.stat(path).st_ino
                if inode in self.dirty:
                    os.truncate(path, self.dirty[inode])
        for inode, new, old in reversed(self.entries):
            folders = [self.root, *(path for path in self.root.rglob("*") if path.is_dir())]
            folder = next((path for path in folders if path.stat().st_ino == inode), None)
            if folder is None or not (folder / new).exists():
                continue
            if old is not None:
                os.rename(folder / new, folder / old)
            elif (folder / new).is_dir():
                shutil.rmtree(folder / new)
            else:
                os.remove(folder / new)


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
