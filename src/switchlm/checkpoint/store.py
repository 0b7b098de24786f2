"""Checkpoints of training: atomic, verified, written in the background.

    RUN/checkpoints/step-00001000/
        model-00001-of-00001.safetensors   all tensors of the state by name, bit-exact (tensors.py)
        model.safetensors.index.json       which file holds which; written by DCP, not read
        state.json                         the structure around them, and all numbers (state.py)
        manifest.json                      size and SHA-256 of each, written last (manifest.py)

A save goes through these steps; the process, or the power, may fail after any of them:
1. The files are written and synced in `.step-00001000.partial-PID`, the manifest last, then the
   folder is synced. A crash leaves a hidden folder that the next save deletes.
2. A checkpoint of the same step is renamed to `.step-00001000.replaced-PID`. While its place is
   empty, readers take it from there, and the next save puts it back.
3. The partial folder is renamed to `step-00001000`, and the parent synced: the save has happened.
4. What is no longer kept is renamed to `.step-00000500.deleted-PID`, the parent synced, and only
   then deleted: no visible checkpoint is ever half deleted.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from switchlm.checkpoint import files, manifest, tensors
from switchlm.checkpoint.reading import STATE, read_verified
from switchlm.checkpoint.state import split
from switchlm.errors import CheckpointError

VISIBLE = re.compile(r"step-(\d{8,})")
HIDDEN = re.compile(r"\.step-(\d{8,})\.(partial|replaced|deleted)-(\d+)")


@dataclass(frozen=True, kw_only=True)
class Found:
    """The newest checkpoint that is whole.

    damaged: one sentence for each newer checkpoint that is not, newest first.
    """

    step: int
    folder: Path
    damaged: tuple[str, ...] = ()


class CheckpointStore:
    """The checkpoints of one run, of one process that writes and any number that read.

    folder: `RUN/checkpoints`; made at the first save.
    keep: how many of the newest checkpoints stay; None keeps all.
    report: called with one sentence, from any thread, when a save has failed or a damaged
        checkpoint is passed over; the default is a warning in the log.
    """

    def __init__(
        self, folder: Path, *, keep: int | None = None, report: Callable[[str], None] | None = None
    ) -> None:
        if keep is not None and keep < 1:
            raise CheckpointError(f"A run must keep at least one checkpoint, not {keep}.")
        self.folder = Path(folder)
        self.keep = keep
        self._report = report or logging.getLogger(__name__).warning
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, state: Mapping[str, Any], *, wait: bool = False) -> None:
        """Copy the tensors of `state` to the CPU now, and write the checkpoint in the background.

        state: nested dicts, lists and tuples of tensors, numbers and strings, see state.py. It may
        change as soon as this returns. A checkpoint of the same step is replaced. At most one save
        is under way: this waits for the one before, and raises its error if it failed.

        Raises CheckpointError, also if a checkpoint of a later step is there, for then `newest`
        would go on from that one; see `discard_after`.
        """
        self.wait()
        later = [known for known in self.steps() if known > step]
        if later:
            raise CheckpointError(
                f"Cannot save step {step} in {str(self.folder)!r}: the later step {later[-1]} is "
                "there. Resume from that one, or discard what comes after the step resumed from."
            )
        named, structure = split(state)
        staged = tensors.stage(named)
        self._pending = self._writer.submit(self._write, step, staged, structure)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Return when the last save is safe on the disk; raise CheckpointError if it failed.

        Interrupted (KeyboardInterrupt), the writing goes on, and the interpreter waits for it
        before it exits.
        """
        if self._pending is None:
            return
        try:
            self._pending.result()
        finally:
            if self._pending.done():
                self._pending = None

    def steps(self) -> list[int]:
        """The steps with a finished checkpoint, ascending; not verified."""
        return sorted(self._finished())

    def newest(self) -> Found | None:
        """Return the newest checkpoint whose files all match its manifest; None if there is none.

        Every byte is read. Raises CheckpointError if there are checkpoints, but all are damaged.
        """
        self.wait()
        damaged = []
        for step, folder in sorted(self._finished().items(), reverse=True):
            try:
                self._verify(step, folder)
            except CheckpointError as error:
                if folder.exists():  # else the writing process has just retired it
                    damaged.append(str(error))
                continue
            return Found(step=step, folder=folder, damaged=tuple(damaged))
        if damaged:
            raise CheckpointError(
                f"No checkpoint in {str(self.folder)!r} can be used. {' '.join(damaged)} "
                "Restore one from a copy, or start a new run."
            )
        return None

    def load(
        self, step: int | None = None, into: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the state of `step`, or of the newest checkpoint that is whole.

        into: tensors to fill in place, see `reading.load_folder`; they are untouched if this
        raises CheckpointError, which names the newest checkpoint that can be used instead.
        """
        self.wait()
        if step is None:
            found = self.newest()
            if found is None:
                raise CheckpointError(f"There is no checkpoint in {str(self.folder)!r}.")
            for problem in found.damaged:
                self._report(f"{problem} Going on from step {found.step} instead.")
            return read_verified(found.folder, into)
        finished = self._finished()
        if step not in finished:
            known = ", ".join(map(str, sorted(finished))) or "none"
            raise CheckpointError(
                f"There is no checkpoint of step {step} in {str(self.folder)!r}; it has {known}."
            )
        try:
            self._verify(step, finished[step])
        except CheckpointError as error:
            found = self.newest()
            assert found is not None, "a damaged checkpoint was there a moment ago"
            raise CheckpointError(f"{error} The newest that is whole: step {found.step}.") from None
        return read_verified(finished[step], into)

    def discard_after(self, step: int) -> None:
        """Delete the checkpoints after `step`: the run goes on from there in another way.

        Call it when resuming, with the step resumed from.
        """
        self.wait()
        with _explain(f"Cannot delete the checkpoints after step {step}"):
            self._discard([known for known in self.steps() if known > step])

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except CheckpointError:
            if error is None:  # else that one matters more, and this one has been reported
                raise
        finally:
            self._writer.shutdown()

    def _write(self, step: int, named: dict[str, Tensor], structure: Any) -> None:
        try:
            with _explain(f"Cannot save the checkpoint of step {step} in {str(self.folder)!r}"):
                self._write_and_commit(step, named, structure)
            if self.keep is not None:
                with _explain(f"The checkpoint of step {step} is saved, but older ones must go"):
                    self._discard(self.steps()[: -self.keep])
        except CheckpointError as error:
            self._report(str(error))
            raise

    def _write_and_commit(self, step: int, named: dict[str, Tensor], structure: Any) -> None:
        files.make_folder(self.folder)
        self._sweep()
        partial = self._hidden(step, "partial")
        try:
            partial.mkdir()
            tensors.save(partial, named)
            (partial / STATE).write_text(json.dumps(structure), encoding="utf-8")
            for path in partial.iterdir():
                files.sync_file(path)
            manifest.write(partial, step)
            files.sync_folder(partial)
            self._put_in_place(partial, step)
        finally:
            files.remove_folder(partial)

    def _put_in_place(self, partial: Path, step: int) -> None:
        place, replaced = self._visible(step), self._hidden(step, "replaced")
        if place.exists():
            place.rename(replaced)
        partial.rename(place)
        files.sync_folder(self.folder)
        files.remove_folder(replaced)

    def _discard(self, steps: list[int]) -> None:
        if not steps:
            return
        hidden = [self._hidden(step, "deleted") for step in steps]
        for step, target in zip(steps, hidden, strict=True):
            self._finished()[step].rename(target)
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

    def _finished(self) -> dict[int, Path]:
        """Every checkpoint by step; a displaced one counts while its place is empty."""
        if not self.folder.is_dir():
            return {}
        visible, displaced = {}, {}
        for path in self.folder.iterdir():
            if match := VISIBLE.fullmatch(path.name):
                visible[int(match[1])] = path
            elif (match := HIDDEN.fullmatch(path.name)) and match[2] == "replaced":
                displaced[int(match[1])] = path
        return displaced | visible

    def _verify(self, step: int, folder: Path) -> None:
        found = manifest.verify(folder)
        if found != step:
            raise CheckpointError(
                f"The checkpoint {str(folder)!r} is damaged: its manifest is of step {found}."
            )

    def _visible(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _hidden(self, step: int, kind: str) -> Path:
        return self.folder / f".step-{step:08d}.{kind}-{os.getpid()}"


@contextmanager
def _explain(what: str) -> Iterator[None]:
    """Turn what a disk does to a save into the project's own error."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{what}: {error}. Earlier checkpoints are as they were. Free some space, or mend the "
            "disk or the permissions, and resume."
        ) from error
