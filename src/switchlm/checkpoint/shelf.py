"""The folders of checkpoints on the disk, and the order of steps in which they come and go.

A save goes through these steps; the process, or the power, may fail after any of them:
1. The files are written and synced in `.step-00001000.partial-PID`, the manifest last, then the
   folder is synced. A crash leaves a hidden folder that the next save deletes.
2. A checkpoint of the same step is renamed to `.step-00001000.replaced-PID`. While its place is
   empty, readers take it from there, and the next save puts it back.
3. The partial folder is renamed to `step-00001000`, and the parent synced: the save has happened.
4. What is no longer kept is renamed to `.step-00000500.deleted-PID`, the parent synced, and only
   then deleted: no visible checkpoint is ever half deleted.
"""

import os
import re
from pathlib import Path

from switchlm.checkpoint import files

VISIBLE = re.compile(r"step-(\d{8,})")
HIDDEN = re.compile(r"\.step-(\d{8,})\.(partial|replaced|deleted)-(\d+)")


class Shelf:
    """The checkpoints in one folder, which one process of a run changes: rank 0.

    All methods raise OSError where the disk does.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def finished(self) -> dict[int, Path]:
        """Return every checkpoint by step; a displaced one counts while its place is empty."""
        if not self.folder.is_dir():
            return {}
        visible, displaced = {}, {}
        for path in self.folder.iterdir():
            if match := VISIBLE.fullmatch(path.name):
                visible[int(match[1])] = path
            elif (match := HIDDEN.fullmatch(path.name)) and match[2] == "replaced":
                displaced[int(match[1])] = path
        return displaced | visible

    def begin(self, step: int) -> Path:
        """Clean up after dead saves, and make the partial folder of a new one."""
        files.make_folder(self.folder)
        self._sweep()
        partial = self._hidden(step, "partial")
        partial.mkdir()
        return partial

    def put_in_place(self, partial: Path, step: int) -> None:
        """Make a synced partial folder the checkpoint of `step`."""
        place, replaced = self._visible(step), self._hidden(step, "replaced")
        if place.exists():
            place.rename(replaced)
        partial.rename(place)
        files.sync_folder(self.folder)
        files.remove_folder(replaced)

    def discard(self, steps: list[int]) -> None:
        """Delete the checkpoints of these steps."""
        if not steps:
            return
        hidden = [self._hidden(step, "deleted") for step in steps]
        for step, target in zip(steps, hidden, strict=True):
            self.finished()[step].rename(target)
        files.sync_folder(self.folder)
        for target in hidden:
            files.remove_folder(target)

    def _sweep(self) -> None:
        """Put back what a dead save displaced, and delete the rest that it left."""
        for path in list(self.folder.iterdir()):
            match = HIDDEN.fullmatch(path.name)
            if match is None:
                continue
            step, kind, pid = int(match[1]), match[2], int(match[3])
            if pid != os.getpid() and files.process_lives(pid):
                continue
            if kind == "replaced" and not self._visible(step).exists():
                path.rename(self._visible(step))
            else:
                files.remove_folder(path)
        files.sync_folder(self.folder)

    def _visible(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _hidden(self, step: int, kind: str) -> Path:
        return self.folder / f".step-{step:08d}.{kind}-{os.getpid()}"
