"""Where things are in a run, and how its metrics go back in time with a resumed run."""

import json
from pathlib import Path

from switchlm.checkpoint.store import CheckpointDirectory
from switchlm.files import make_folder, replace_file


class RunFolder:
    """The paths of a run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"  # as resolved
        self.tokenizer = root / "tokenizer"  # that the run trains with, so that it resumes with it
        self.metrics = root / "metrics.jsonl"  # one JSON object a line; each has its `step`
        self.checkpoints = root / "checkpoints"  # of a `CheckpointStore`
        self.model = root / "model"  # the trained model in Hugging Face layout
        self.adapters = root / "adapters"  # the best ones alone, where a run trains some
        # The fingerprint of what a run that trains a part of a model leaves as it is.
        self.base = root / "base.json"
        self.tensorboard = root / "tensorboard"  # its event files
        self.wandb_id = root / "wandb-id.txt"  # of the run at Weights & Biases
        self.kernels = root / "kernels.json"  # how Switch layers run: which kernel, and why
        self.routing = root / "routing.json"  # which expert takes which token at the end of the run
        self.report = root / "report.html"  # one file that opens offline

    def exists(self) -> bool:
        """Whether a run has been started here."""
        return self.config.exists() or self.metrics.exists() or self.checkpoints.exists()

    def has_checkpoint(self) -> bool:
        """Whether a resumed run would go on from a checkpoint, not from the start."""
        return bool(CheckpointDirectory(self.checkpoints).finished())

    def create(self) -> None:
        """Make the folder, durably; one that exists is fine."""
        make_folder(self.root)


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the lines of `path` that come after `step`.

    A run resumed from the checkpoint of `step` writes them again. A line that a crash cut short
    goes too. The file is replaced in one step; a missing file has no lines.
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
    except ValueError:
        return False
    return isinstance(values, dict) and values.get("step", 0) <= step
