"""Where the figures of a run go: metrics.jsonl, and TensorBoard or wandb if asked for."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from switchlm.checkpoint.run_folder import RunFolder
from switchlm.errors import MissingExtraError
from switchlm.training.config import TrainingConfig

Line = Mapping[str, Any]


class Sink(Protocol):
    """Takes metrics lines."""

    def write(self, line: Line) -> None: ...

    def close(self) -> None: ...


class MetricsFile:
    """metrics.jsonl: every line is handed to the operating system at once, whole."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("ab", buffering=0)

    def write(self, line: Line) -> None:
        self.file.write((json.dumps(line, allow_nan=False) + "\n").encode())

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """Scalars for TensorBoard: everything in a line that is one number."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingExtraError(
                "tensorboard", "tensorboard", "training.tensorboard=true"
            ) from None
        self.writer = SummaryWriter(str(folder))

    def write(self, line: Line) -> None:
        for name, value in scalars(line).items():
            self.writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """The same scalars for Weights & Biases."""

    def __init__(self, project: str, folder: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise MissingExtraError("wandb", "wandb", f"training.wandb={project}") from None
        self.run = wandb.init(project=project, name=folder.name, dir=str(folder), resume="allow")

    def write(self, line: Line) -> None:
        self.run.log(scalars(line), step=line["step"])

    def close(self) -> None:
        self.run.finish()


class Monitor:
    """Hands every line to all sinks; closes them at the end of a `with` block."""

    def __init__(self, *sinks: Sink) -> None:
        self.sinks = sinks

    def write(self, line: dict[str, Any]) -> dict[str, Any]:
        """Write the line everywhere, and return it."""
        for sink in self.sinks:
            sink.write(line)
        return line

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for sink in self.sinks:
            sink.close()


def open_monitor(run: RunFolder | None, config: TrainingConfig) -> Monitor:
    """Return the monitor of a run; without a folder lines go nowhere."""
    if run is None:
        return Monitor()
    sinks: list[Sink] = [MetricsFile(run.metrics)]
    if config.tensorboard:
        sinks.append(TensorBoard(run.tensorboard))
    if config.wandb is not None:
        sinks.append(Wandb(config.wandb, run.root))
    return Monitor(*sinks)


def scalars(line: Line) -> dict[str, float]:
    """Return what is a single number in a line, the step left out."""
    return {
        name: value
        for name, value in line.items()
        if isinstance(value, (int, float)) and name != "step"
    }


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all whole lines of a metrics.jsonl; a last line that a crash cut short is left out."""
    lines = []
    for text in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        if text.endswith(b"\n"):
            lines.append(json.loads(text))
    return lines
