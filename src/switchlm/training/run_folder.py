"""The files of a run, and truncation of its metrics when it is resumed."""

import json
from pathlib import Path

from switchlm.checkpoint.store import CheckpointDirectory
from switchlm.files import make_folder, replace_file


class RunFolder:
    """The paths of a run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"  # as resolved
        self.tokenizer = root / "tokenizer"  # of the run, also when it is resumed
        self.metrics = root / "metrics.jsonl"  # one JSON object per line, each with its `step`
        self.checkpoints = root / "checkpoints"  # of a `CheckpointStore`
        self.model = root / "model"  # the trained model in Hugging Face layout
        self.adapters = root / "adapters"  # the best adapters, if the run trains adapters
        self.base = root / "base.json"  # fingerprint of the frozen parameters
        self.tensorboard = root / "tensorboard"  # event files
        self.wandb_id = root / "wandb-id.txt"  # of the run at Weights & Biases
        self.kernels = root / "kernels.json"  # the kernel of Switch layers, and why
        self.routing = root / "routing.json"  # tokens of each expert at the end of the run
        self.report = root / "report.html"  # one file that opens offline

    def exists(self) -> bool:
        """Whether a run has been started here."""
        return self.config.exists() or self.metrics.exists() or self.checkpoints.exists()

    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to resume from."""
        return bool(CheckpointDirectory(self.checkpoints).finished())

    def create(self) -> None:
        """Create the folder, if there is none, and sync it."""
        make_folder(self.root)


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
    except ValueError:
        return False
    return isinstance(values, dict) and values.get("step", 0) <= step
