"""Checkpoints of training: atomic, verified, written in the background, independent of the mesh.

    RUN/checkpoints/step-00001000/
        model-00001-of-00001.safetensors   parts of the tensors by name, bit-exact (tensors.py)
        state.json                         the structure around them, and all numbers (format.py)
        manifest.json                      size and SHA-256 of each, written last (format.py)

Every rank copies and writes its own parts into one folder; rank 0 makes the folder, and renames it
once all have written. The files say where each part lies in its tensor, so that any other mesh, or
one process, reads what it needs of them (read.py).

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
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from torch import Tensor
from torch.distributed import ProcessGroup

from switchlm import files
from switchlm.checkpoint import format, layout
from switchlm.checkpoint.collective import Ranks
from switchlm.checkpoint.format import damaged, describe, split
from switchlm.checkpoint.layout import Place, Planner, Stored, part_of
from switchlm.checkpoint.read import STATE, check_parts, read_verified
from switchlm.checkpoint.staging import Parts, Staging
from switchlm.errors import CheckpointError
from switchlm.files import Report


class Found(NamedTuple):
    """The newest checkpoint that is whole.

    damaged: one sentence for each newer checkpoint that is not, newest first.
    """

    step: int
    folder: Path
    damaged: tuple[str, ...]


class CheckpointStore:
    """The checkpoints of one run: of the processes that write it, and any number that read.

    folder: `RUN/checkpoints`, the same for all ranks, on a file system they share; made at the
        first save.
    keep: how many of the newest checkpoints stay; None keeps all.
    report: called with one sentence, from any thread, when a save has failed or a damaged
        checkpoint is passed over; the default is a warning in the log. On rank 0 only.
    group: a gloo group of all processes of the run, which nothing else may use; None for a single
        process. Every rank calls every method, with the same arguments, and they all get the same
        answer or the same error, which names the rank where something failed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int | None = None,
        report: Report | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        if keep is not None and keep < 1:
            raise CheckpointError(f"A run must keep at least one checkpoint, not {keep}.")
        self.folder = Path(folder)
        self.keep = keep
        self._shelf = CheckpointDirectory(self.folder)
        self._ranks = Ranks(group)
        self._planner = Planner(self._ranks)
        self._staging = Staging()
        self._report = report or logging.getLogger(__name__).warning
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, state: Mapping[str, Any], *, wait: bool = False) -> None:
        """Copy the tensors of `state` now, and write the checkpoint in the background.

        state: nested dicts, lists and tuples of tensors, numbers and strings, see format.py; it may
            change as soon as this returns. Of DTensors each part is saved once; all else must be
            the same on all ranks, and is rank 0's. A checkpoint of the same step is replaced. At
            most one save is under way: this waits for the one before, and raises its error if it
            failed. The memory of the copy is kept for the next save.

        Raises CheckpointError, also if a checkpoint of a later step is there, for then `newest`
        would go on from that one; see `discard_after`.
        """
        self.wait()
        self._ranks.on_rank_zero(lambda: self._refuse_later(step))
        named, structure = split(state)
        places, parts = self._share(named)
        land = self._staging.copy(parts)
        self._pending = self._writer.submit(self._write, step, places, land, structure)
        if wait:
            self.wait()

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Get the memory for copies of such a state in the background.

        Without it the first save gets it, and pauses for a few times as long as those after it.
        """
        self.wait()
        _, parts = self._share(split(state)[0])
        self._pending = self._writer.submit(self._staging.reserve, parts)

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
        if self._ranks.size > 1 and self._pending is not None:
            wait_for([self._pending])  # the ranks talk about one thing at a time
        return self._ranks.on_rank_zero(self._steps)

    def newest(self) -> Found | None:
        """Return the newest checkpoint whose files all match its manifest; None if there is none.

        Every byte is read, by one rank or another. Raises CheckpointError if there are checkpoints,
        but all are damaged.
        """
        self.wait()
        damaged = []
        for step, folder in sorted(self._finished().items(), reverse=True):
            try:
                self._verify(step, folder)
            except CheckpointError as error:
                if self._ranks.on_rank_zero(folder.exists):  # else the writer has just retired it
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

        into: tensors to fill in place, see `read.load_folder`; they are untouched if this raises
            CheckpointError, which names the newest checkpoint that can be used instead.
        """
        self.wait()
        if step is None:
            found = self.newest()
            if found is None:
                raise CheckpointError(f"There is no checkpoint in {str(self.folder)!r}.")
            for problem in found.damaged:
                self._tell(f"{problem} Going on from step {found.step} instead.")
            return read_verified(found.folder, into, self._ranks)
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
        return read_verified(finished[step], into, self._ranks)

    def discard_after(self, step: int) -> None:
        """Delete the checkpoints after `step`: the run goes on from there in another way.

        Call it when resuming, with the step resumed from.
        """
        self.wait()
        with _explain(f"Cannot delete the checkpoints after step {step}"):
            self._ranks.on_rank_zero(
                lambda: self._shelf.discard([known for known in self._steps() if known > step])
            )

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except (CheckpointError, RuntimeError):
            if kind is None:  # else that error matters more, and this one has been reported
                raise
        finally:
            self._writer.shutdown()

    def _write(
        self, step: int, places: dict[str, Place], land: Callable[[], Parts], structure: Any
    ) -> None:
        ranks = self._ranks
        try:
            with _explain(f"Cannot save the checkpoint of step {step} in {str(self.folder)!r}"):
                partial = self.folder / ranks.on_rank_zero(lambda: self._shelf.begin(step).name)
                try:
                    written = ranks.on_all_ranks(lambda: self._write_part(partial, places, land()))
                    ranks.on_rank_zero(lambda: self._commit(partial, step, written, structure))
                finally:
                    if ranks.is_first:
                        files.remove_folder(partial)
            if self.keep is not None:
                keep = self.keep
                with _explain(f"The checkpoint of step {step} is saved, but older ones must go"):
                    ranks.on_rank_zero(lambda: self._shelf.discard(self._steps()[:-keep]))
        except CheckpointError as error:
            self._tell(str(error))
            raise

    def _write_part(
        self, partial: Path, places: dict[str, Place], parts: Parts
    ) -> dict[str, dict[str, Any]]:
        """Write the files of this rank; return size and SHA-256 of each."""
        if not partial.is_dir():
            raise CheckpointError(
                f"The folder {str(partial)!r}, just made by rank 0, is not there. All processes "
                "must see one file system: put the run where every host reads and writes."
            )
        written = layout.save(partial, places, parts)
        if not self._ranks.is_first:
            files.sync(partial)  # its entries may be another host's to sync
        return written

    def _commit(
        self, partial: Path, step: int, written: list[dict[str, Any]], structure: Any
    ) -> None:
        """Make the files that all ranks have written the checkpoint of `step`."""
        stored: dict[str, list[Stored]] = {}
        for name, part in layout.index(sorted(partial.glob("*.safetensors"))):
            stored.setdefault(name, []).append(part)
        described = {name: (dtype, shape) for name, dtype, shape in describe(structure)}
        check_parts(f"What was written of step {step}", described, stored)
        (partial / STATE).write_text(json.dumps(structure), encoding="utf-8")
        files.sync(partial / STATE)
        known = {file: found for files_of_rank in written for file, found in files_of_rank.items()}
        format.write(partial, step, known)
        files.sync(partial)
        self._shelf.put_in_place(partial, step)

    def _share(self, named: dict[str, Tensor]) -> tuple[dict[str, Place], Parts]:
        """Return what this rank writes: where each part goes, and the parts."""
        held_by = self._planner.layout(named)
        file_of = layout.assign_files(held_by, {name: t.itemsize for name, t in named.items()})
        places = {
            name: (tuple(start for start, _ in held.box), file_of[name, held.rank])
            for name, holders in held_by.items()
            for held in holders
            if held.rank == self._ranks.rank and (name, held.rank) in file_of
        }
        return places, {name: part_of(named[name]) for name in places}

    def _refuse_later(self, step: int) -> None:
        later = [known for known in self._steps() if known > step]
        if later:
            raise CheckpointError(
                f"Cannot save step {step} in {str(self.folder)!r}: the later step {later[-1]} is "
                "there. Resume from that one, or discard what comes after the step resumed from."
            )

    def _steps(self) -> list[int]:
        return sorted(self._shelf.finished())

    def _finished(self) -> dict[int, Path]:
        """Return the checkpoints by step, as rank 0 sees them."""
        found = self._ranks.on_rank_zero(self._shelf.finished)
        return {step: self.folder / path.name for step, path in found.items()}

    def _verify(self, step: int, folder: Path) -> None:
        found = format.verify(folder, self._ranks)
        if found != step:
            raise damaged(folder, f"its manifest is of step {found}")

    def _tell(self, message: str) -> None:
        if self._ranks.is_first:
            self._report(message)


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


VISIBLE = re.compile(r"step-(\d{8,})")
HIDDEN = re.compile(r"\.step-(\d{8,})\.(partial|replaced|deleted)-(\d+)")


class CheckpointDirectory:
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
        files.sync(self.folder)
        files.remove_folder(replaced)

    def discard(self, steps: list[int]) -> None:
        """Delete the checkpoints of these steps."""
        if not steps:
            return
        hidden = [self._hidden(step, "deleted") for step in steps]
        for step, target in zip(steps, hidden, strict=True):
            self.finished()[step].rename(target)
        files.sync(self.folder)
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
        files.sync(self.folder)

    def _visible(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _hidden(self, step: int, kind: str) -> Path:
        return self.folder / f".step-{step:08d}.{kind}-{os.getpid()}"
