"""Where things are in a run, and how its metrics go back in time with a resumed run."""

import json
from dataclasses import dataclass
from pathlib import Path

from switchlm.checkpoint.store import CheckpointDirectory
from switchlm.files import make_folder, replace_file


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run."""

    root: Path

    def exists(self) -> bool:
        """Whether a run has been started here."""
        return self.config.exists() or self.metrics.exists() or self.checkpoints.exists()

    def has_checkpoint(self) -> bool:
        """Whether a resumed run would go on from a checkpoint, not from the start."""
        return bool(CheckpointDirectory(self.checkpoints).finished())

    def create(self) -> None:
        """Make the folder, durably; one that exists is fine."""
        make_folder(self.root)

    @property
    def config(self) -> Path:
        """The configuration as resolved."""
        return self.root / "config.yaml"

    @property
    def kernels(self) -> Path:
        """How Switch layers run since the run was last started: which kernel, and why."""
        return self.root / "kernels.json"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer that the run trains with, so that it resumes with the same."""
        return self.root / "tokenizer"

    @property
    def metrics(self) -> Path:
        """One JSON object a line; every line has its `step`."""
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of a `CheckpointStore`."""
        return self.root / "checkpoints"

    @property
    def model(self) -> Path:
        """The trained model in Hugging Face layout."""
        return self.root / "model"

    @property
    def adapters(self) -> Path:
        """The best low-rank adapters alone, where a run trains some."""
        return self.root / "adapters"

    @property
    def base(self) -> Path:
        """The fingerprint of what a run that trains a part of a model leaves as it is."""
        return self.root / "base.json"

    @property
    def tensorboard(self) -> Path:
        """Event files of TensorBoard."""
        return self.root / "tensorboard"

    @property
    def routing(self) -> Path:
        """Who goes to which expert, measured at the end of the run."""
        return self.root / "routing.json"

    @property
    def report(self) -> Path:
        """The report, one file that opens offline."""
        return self.root / "report.html"


def truncate_metrics(path: Path, step: int) -> int:
    """Drop the lines of `path` that come after `step`, and return how many went.

    A run resumed from the checkpoint of `step` writes them again. A line that a crash cut short
    goes too. The file is replaced in one step; a missing file has no lines.
    """
    if not path.is_file():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _is_up_to(line, step)]
    if len(kept) < len(lines):
        replace_file(path, b"".join(kept))
    return len(lines) - len(kept)


def _is_up_to(line: bytes, step: int) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        values = json.loads(line)
    except ValueError:
        return False
    return isinstance(values, dict) and values.get("step", 0) <= step
