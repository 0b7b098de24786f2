"""The files of a run, and truncation of its metrics when it is resumed."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from switchlm.checkpoint.read import STATE
from switchlm.checkpoint.store import CheckpointDirectory
from switchlm.files import make_folder, remove, replace_file
from switchlm.locks import LOCK

_UNFINISHED = re.compile(r"\.(.+)\.(partial|old)-\d+")


class RunFolder:
    """The paths of a run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.start = root / "start.json"  # what the run began with, see recipes/start.py
        self.config = root / "config.yaml"  # as resolved
        self.distillation = root / "distillation.yaml"  # its settings, if the run distils
        self.tokenizer = root / "tokenizer"  # of the run, also when it is resumed
        self.metrics = root / "metrics.jsonl"  # one JSON object per line, each with its `step`
        self.checkpoints = root / "checkpoints"  # of a `CheckpointStore`
        self.model = root / "model"  # the trained model in Hugging Face layout
        self.adapters = root / "adapters"  # the best adapters, if the run trains adapters
        self.base = root / "base.json"  # fingerprint of the frozen parameters
        self.tensorboard = root / "tensorboard"  # event files
        self.wandb_id = root / "wandb-id.txt"  # of the run at Weights & Biases
        self.wandb = root / "wandb"  # files of its client
        self.kernels = root / "kernels.json"  # the kernel of Switch layers, and why
        self.routing = root / "routing.json"  # tokens of each expert at the end of the run
        self.result = root / "distill.json"  # the result, if the run distils
        self.report = root / "report.html"  # one file that opens offline

    def paths(self) -> Iterator[Path]:
        """Yield the paths of a run that exist."""
        yield from (path for name, path in vars(self).items() if name != "root" and path.exists())

    def others(self) -> list[Path]:
        """Return what is in the folder and is not of a run."""
        if not self.root.is_dir():
            return []
        own = {*(path.name for name, path in vars(self).items() if name != "root"), LOCK}
        return [
            path
            for path in sorted(self.root.iterdir())
            if path.name not in own and not _UNFINISHED.fullmatch(path.name)
        ]

    def exists(self) -> bool:
        """Whether a run has been started here."""
        return self.config.exists() or self.metrics.exists() or self.checkpoints.exists()

    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to resume from."""
        return bool(CheckpointDirectory(self.checkpoints).finished())

    def progress(self) -> tuple[int, int, bool]:
        """Return the size of the metrics, the newest step, and whether there is a model.

        All are zero if the run has only begun.
        """
        size = self.metrics.stat().st_size if self.metrics.is_file() else 0
        steps = CheckpointDirectory(self.checkpoints).finished()
        return size, max(steps, default=0), self.model.exists()

    def done(self) -> dict[str, Any]:
        """Return the progress in the newest checkpoint: step, seconds, whether it stopped itself.

        Nothing if there is no checkpoint, or if that is damaged.
        """
        try:
            steps = CheckpointDirectory(self.checkpoints).finished()
            state = json.loads((steps[max(steps)] / STATE).read_bytes())
            done = state["progress"]["done"]
            return {name: done[name] for name in ("step", "seconds", "stopped")}
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return {}

    def settings(self) -> tuple[Path, Path]:
        """Return the files with the settings of a run; a run need not have the second."""
        return self.config, self.distillation

    def create(self) -> None:
        """Create the folder, if there is none, and sync it."""
        make_folder(self.root)

    def beginning(self) -> tuple[Path, ...]:
        """Return what a start writes before config.yaml, in that order."""
        return self.start, self.tokenizer, self.base, self.distillation

    def clear(self) -> None:
        """Delete every file of the run, the settings last."""
        for path in sorted(self.paths(), key=lambda path: path == self.start):
            remove(path)
        self.sweep()

    def sweep(self) -> None:
        """Delete unfinished files of processes that died; the caller holds the folder's lock.

        A folder that was being replaced by two renames is put back.
        """
        if not self.root.is_dir():
            return
        for left in list(self.root.iterdir()):
            match = _UNFINISHED.fullmatch(left.name)
            if match is None:
                continue
            place = self.root / match[1]
            if match[2] == "old" and not place.exists():
                left.rename(place)
            else:
                remove(left)


def truncate_metrics(path: Path, step: int) -> None:
    """Delete the lines of `path` after `step`, which a resumed run writes again.

    A line that a crash cut short is deleted too. The file is replaced atomically, and may be
    missing.
    """
    if not path.is_file():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _is_up_to(line, step)]
    if len(kept) < len(lines):
        replace_file(path, b"".join(kept))


def _is_up_to(line: bytes, step: int) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(values, dict) and values.get("step", 0) <= step
