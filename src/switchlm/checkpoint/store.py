"""Checkpoints of training: atomic, verified, written in the background, independent of the mesh.

    RUN/checkpoints/step-00001000/
        model-00001-of-00001.safetensors   parts of the tensors by name, bit-exact (layout.py)
        state.json                         the structure around them, and all numbers (format.py)
        manifest.json                      size and SHA-256 of each, written last (format.py)

Every rank copies and writes its own parts into one folder; rank 0 creates the folder, and renames
it after all have written. The files have the offsets of each part in its tensor, so any other mesh,
or one process, can read them (read.py).

A save has these steps; the process, or the power, may fail after any of them:
1. The files are written and synced in `.step-00001000.partial-PID`, the manifest last, then the
   folder is synced. A crash leaves a hidden folder that the next save deletes.
2. A checkpoint of the same step is renamed to `.step-00001000.replaced-PID`. Until step 3 readers
   read it there; after a crash the next save renames it back.
3. The partial folder is renamed to `step-00001000`, and the parent synced: the save is complete.
4. Checkpoints beyond `keep` are renamed to `.step-00000500.deleted-PID`, the parent synced, and
   only then deleted: a visible checkpoint is never partly deleted.
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
from switchlm.checkpoint.format import damaged, flatten_state, tensor_specs
from switchlm.checkpoint.layout import FileRegion, Place, Planner, part_of
from switchlm.checkpoint.read import STATE, check_parts, read_verified
from switchlm.checkpoint.staging import Parts, Staging
from switchlm.errors import CheckpointError
from switchlm.files import Report


class NewestCheckpoint(NamedTuple):
    """The newest valid checkpoint.

    damaged: a sentence for each newer checkpoint, all of which are damaged, newest first.
    """

    step: int
    folder: Path
    damaged: tuple[str, ...]


class CheckpointStore:
    """The checkpoints of one run, written by its processes and read by any number of others.

    folder: `RUN/checkpoints`, the same for all ranks, on a shared file system; created at the first
        save.
    keep: number of newest checkpoints to keep; None keeps all.
    report: called on rank 0 with one sentence, from any thread, when a save has failed or a damaged
        checkpoint is skipped; the default is a warning in the log.
    group: a gloo group of all processes of the run for this store alone; None for a single process.

    Every rank calls every method with the same arguments, and all get the same result or error.
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
        self._directory = CheckpointDirectory(self.folder)
        self._ranks = Ranks(group)
        self._planner = Planner(self._ranks)
        self._staging = Staging()
        self._report = report or logging.getLogger(__name__).warning
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, state: Mapping[str, Any], *, wait: bool = False) -> None:
        """Copy the tensors of `state` now, and write the checkpoint in the background.

        state: nested dicts, lists and tuples of tensors, numbers and strings, see format.py; it may
            change as soon as this returns. Everything but DTensors must be the same on all ranks.
        wait: return after the checkpoint is written.

        A checkpoint of the same step is replaced. Waits for the save before, if it is running.
        Raises CheckpointError if that failed, or if there is a checkpoint of a later step, which
        `newest` would return; see `discard_after`.
        """
        self.wait()
        self._ranks.on_rank_zero(lambda: self._refuse_later(step))
        named, structure = flatten_state(state)
        places, parts = self._own_parts(named)
        finish_copy = self._staging.copy(parts)
        self._pending = self._writer.submit(self._write, step, places, finish_copy, structure)
        if wait:
            self.wait()

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Allocate the buffers for copies of such a state in the background.

        Otherwise the first save allocates them, and takes a few times as long as later ones.
        """
        self.wait()
        _, parts = self._own_parts(flatten_state(state)[0])
        self._pending = self._writer.submit(self._staging.reserve, parts)

    def wait(self) -> None:
        """Return when the last save is on the disk; raise CheckpointError if it failed.

        After a KeyboardInterrupt the writing continues, and the interpreter waits for it at exit.
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
            wait_for([self._pending])  # the group supports one collective at a time
        return self._ranks.on_rank_zero(self._steps)

    def newest(self) -> NewestCheckpoint | None:
        """Return the newest checkpoint whose files all match its manifest; None if there is none.

        Reads every byte, on one of the ranks. Raises CheckpointError if all checkpoints are
        damaged.
        """
        self.wait()
        damaged = []
        for step, folder in sorted(self._finished().items(), reverse=True):
            try:
                self._verify(step, folder)
            except CheckpointError as error:
                if self._ranks.on_rank_zero(folder.exists):  # else the writer has just deleted it
                    damaged.append(str(error))
                continue
            return NewestCheckpoint(step=step, folder=folder, damaged=tuple(damaged))
        if damaged:
            raise CheckpointError(
                f"No checkpoint in {str(self.folder)!r} can be used. {' '.join(damaged)} "
                "Restore one from a copy, or start a new run."
            )
        return None

    def load(
        self, step: int | None = None, into: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the state of `step`, or of the newest valid checkpoint.

        into: tensors to fill in place, see `read.load_folder`; unchanged if this raises
            CheckpointError, which names the newest valid checkpoint.
        """
        self.wait()
        if step is None:
            found = self.newest()
            if found is None:
                raise CheckpointError(f"There is no checkpoint in {str(self.folder)!r}.")
            for problem in found.damaged:
                self._report_once(f"{problem} Continuing from step {found.step} instead.")
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
            raise CheckpointError(f"{error} Use step {found.step}, the newest valid one.") from None
        return read_verified(finished[step], into, self._ranks)

    def discard_after(self, step: int) -> None:
        """Delete the checkpoints after `step`; call it with the step that the run resumes from."""
        self.wait()
        with _explain(f"Cannot delete the checkpoints after step {step}"):
            self._ranks.on_rank_zero(
                lambda: self._directory.discard([known for known in self._steps() if known > step])
            )

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except (CheckpointError, RuntimeError):
            if kind is None:  # else the error of the block is raised; this one has been reported
                raise
        finally:
            self._writer.shutdown()

    def _write(
        self, step: int, places: dict[str, Place], finish_copy: Callable[[], Parts], structure: Any
    ) -> None:
        ranks = self._ranks
        try:
            with _explain(f"Cannot save the checkpoint of step {step} in {str(self.folder)!r}"):
                partial = self.folder / ranks.on_rank_zero(lambda: self._directory.begin(step).name)
                try:
                    written = ranks.on_all_ranks(
                        lambda: self._write_part(partial, places, finish_copy())
                    )
                    ranks.on_rank_zero(lambda: self._commit(partial, step, written, structure))
                finally:
                    if ranks.is_first:
                        files.remove_folder(partial)
            if self.keep is not None:
                keep = self.keep
                with _explain(f"Cannot delete the checkpoints before step {step}, which is saved"):
                    ranks.on_rank_zero(lambda: self._directory.discard(self._steps()[:-keep]))
        except CheckpointError as error:
            self._report_once(str(error))
            raise

    def _write_part(
        self, partial: Path, places: dict[str, Place], parts: Parts
    ) -> dict[str, dict[str, Any]]:
        """Write the files of this rank; return size and SHA-256 of each."""
        if not partial.is_dir():
            raise CheckpointError(
                f"There is no folder {str(partial)!r} on this host, which rank 0 has just created. "
                "Put the run on a file system that all hosts share."
            )
        written = layout.save(partial, places, parts)
        if not self._ranks.is_first:
            files.sync(partial)  # rank 0 syncs it too, but perhaps on another host
        return written

    def _commit(
        self, partial: Path, step: int, written: list[dict[str, Any]], structure: Any
    ) -> None:
        """Check the files of all ranks, write state and manifest, and rename the folder."""
        stored: dict[str, list[FileRegion]] = {}
        for name, part in layout.index(sorted(partial.glob("*.safetensors"))):
            stored.setdefault(name, []).append(part)
        check_parts(f"The new checkpoint of step {step}", tensor_specs(structure), stored)
        (partial / STATE).write_text(json.dumps(structure), encoding="utf-8")
        files.sync(partial / STATE)
        known = {file: found for files_of_rank in written for file, found in files_of_rank.items()}
        format.write(partial, step, known)
        files.sync(partial)
        self._directory.put_in_place(partial, step)

    def _own_parts(self, named: dict[str, Tensor]) -> tuple[dict[str, Place], Parts]:
        """Return the places and the parts that this rank writes."""
        plan = self._planner.layout(named)
        file_of = layout.assign_files(plan, {name: t.itemsize for name, t in named.items()})
        places = {
            name: (tuple(start for start, _ in stored.region), file_of[name, stored.rank])
            for name, regions in plan.items()
            for stored in regions
            if stored.rank == self._ranks.rank and (name, stored.rank) in file_of
        }
        return places, {name: part_of(named[name]) for name in places}

    def _refuse_later(self, step: int) -> None:
        later = [known for known in self._steps() if known > step]
        if later:
            raise CheckpointError(
                f"Cannot save step {step} in {str(self.folder)!r}: there is a checkpoint of the "
                f"later step {later[-1]}. Resume from it, or discard the later checkpoints first."
            )

    def _steps(self) -> list[int]:
        return sorted(self._directory.finished())

    def _finished(self) -> dict[int, Path]:
        """Return the checkpoints by step, as rank 0 sees them."""
        found = self._ranks.on_rank_zero(self._directory.finished)
        return {step: self.folder / path.name for step, path in found.items()}

    def _verify(self, step: int, folder: Path) -> None:
        found = format.verify(folder, self._ranks)
        if found != step:
            raise damaged(folder, f"its manifest is of step {found}")

    def _report_once(self, message: str) -> None:
        if self._ranks.is_first:
            self._report(message)


@contextmanager
def _explain(what: str) -> Iterator[None]:
    """Raise errors of writing as CheckpointError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{what}: {error}. Earlier checkpoints are unchanged. Free some space, or repair the "
            "disk or the permissions, and resume."
        ) from error


VISIBLE = re.compile(r"step-(\d{8,})")
HIDDEN = re.compile(r"\.step-(\d{8,})\.(partial|replaced|deleted)-(\d+)")


class CheckpointDirectory:
    """The checkpoints in one folder, which only rank 0 changes; methods may raise OSError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def finished(self) -> dict[int, Path]:
        """Return every checkpoint by step; a replaced one counts if there is no new one."""
        if not self.folder.is_dir():
            return {}
        visible, replaced = {}, {}
        for path in self.folder.iterdir():
            if match := VISIBLE.fullmatch(path.name):
                visible[int(match[1])] = path
            elif (match := HIDDEN.fullmatch(path.name)) and match[2] == "replaced":
                replaced[int(match[1])] = path
        return replaced | visible

    def begin(self, step: int) -> Path:
        """Clean up after crashed saves, and create the partial folder of a new one."""
        files.make_folder(self.folder)
        self._sweep()
        partial = self._hidden(step, "partial")
        partial.mkdir()
        return partial

    def put_in_place(self, partial: Path, step: int) -> None:
        """Rename a synced partial folder to the checkpoint of `step`."""
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
        """Restore a checkpoint that a crashed save replaced, and delete its other folders."""
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
