"""The metrics of a run: averaged on the device, written to metrics.jsonl, TensorBoard or wandb.

Steps with a bad gradient are skipped, counted, and left out of the means over the steps since the
last line. Spikes of the loss are counted.
"""

import json
import math
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from switchlm import _torch
from switchlm.errors import require
from switchlm.files import replace_file
from switchlm.model.layers import local
from switchlm.parallel.mesh import ALONE, Mesh
from switchlm.training.config import TrainingConfig
from switchlm.training.run_folder import RunFolder

LARGE = 2**20  # elements; PyTorch takes the norm of a tensor in main memory on one thread


def global_norm(
    gradients: list[Tensor], mesh: Mesh = ALONE, counts: Sequence[float] = ()
) -> tuple[Tensor, Tensor]:
    """Return the Euclidean norm of all gradients together, and sums, by one all-reduce at most.

    Where several processes hold the same part of a gradient, each counts its share of it, so that
    one sum over all processes is enough. The host does not wait for the device.

    counts: what is summed over all processes.

    Returns the norm, a float32 scalar, and the sums, float64 [len(counts)], on the same device.
    """
    norms = _torch.norms([_short(local(gradient)) for gradient in gradients])
    parts = [
        norm.float() / math.sqrt(mesh.num_replicas(gradient))
        for norm, gradient in zip(norms, gradients, strict=True)
    ]
    norm = torch.linalg.vector_norm(torch.stack(parts))
    # Filled in, not copied from main memory, for which a GPU would make the host wait.
    sums = [torch.full((), count, dtype=torch.float64, device=norm.device) for count in counts]
    totals = mesh.all_ranks_sum(torch.stack([norm.double().square(), *sums]))
    return norm if not mesh.is_distributed else totals[0].sqrt().float(), totals[1:]


def _short(gradient: Tensor) -> Tensor:
    """Return the norms of the rows, which have the same norm, where one thread would be slow."""
    if gradient.device.type == "cpu" and gradient.dim() > 1 and gradient.numel() > LARGE:
        return torch.linalg.vector_norm(gradient, dim=-1)
    return gradient


class SpikeDetector:
    """Notices losses far above the running median.

    A loss is a spike if it exceeds `factor` times the median of the last `window` ordinary losses,
    once `minimum` are known. Neither spikes nor non-finite losses enter the window; after `window`
    spikes in a row the level is taken as the new normal.
    """

    def __init__(self, window: int = 100, factor: float = 1.5, minimum: int = 10) -> None:
        self.window, self.factor, self.minimum = window, factor, minimum
        self.losses: deque[float] = deque(maxlen=window)
        self.spikes_in_a_row = 0

    def is_spike(self, loss: float) -> bool:
        """Return whether `loss` is a spike, and remember it if it is not."""
        if not math.isfinite(loss):
            return False
        if len(self.losses) >= self.minimum and loss > self.factor * median(self.losses):
            self.spikes_in_a_row += 1
            if self.spikes_in_a_row < self.window:
                return True
            self.losses.clear()
        self.spikes_in_a_row = 0
        self.losses.append(loss)
        return False

    def state(self) -> dict[str, Any]:
        """Return all it knows, for a checkpoint."""
        return {"losses": list(self.losses), "spikes_in_a_row": self.spikes_in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        self.losses = deque(state["losses"], maxlen=self.window)
        self.spikes_in_a_row = state["spikes_in_a_row"]


FIGURES = ("loss", "balance_loss", "z_loss", "gradient_norm")


class Averages:
    """Sums the figures of steps; skipped steps are counted and stay out of every mean.

    Figures arrive as tensors (see StepRecord) and are turned into numbers only by `fold`, one
    transfer for all steps since the last.
    """

    def __init__(self) -> None:
        self.pending: list[Tensor] = []
        self.sums = [0.0] * len(FIGURES)
        self.counted = 0
        self.skipped = 0
        self.spikes = 0
        self.tokens = 0
        self.detector = SpikeDetector()

    def add(self, figures: Tensor) -> None:
        """Take the figures of one step, float64 [6]."""
        self.pending.append(figures)

    def fold(self) -> None:
        """Turn what is pending into numbers."""
        if not self.pending:
            return
        for *values, skipped, tokens in torch.stack(self.pending).tolist():
            self.tokens += round(tokens)
            if skipped:
                self.skipped += 1
                continue
            self.counted += 1
            self.spikes += self.detector.is_spike(values[0])
            self.sums = [total + value for total, value in zip(self.sums, values, strict=True)]
        self.pending.clear()

    def line(self) -> dict[str, Any]:
        """Return the means (None if every step was skipped) and counts, and begin anew."""
        self.fold()
        means = [total / self.counted if self.counted else None for total in self.sums]
        result = dict(zip(FIGURES, means, strict=True))
        result |= {"skipped": self.skipped, "spikes": self.spikes}
        self.sums = [0.0] * len(FIGURES)
        self.counted = self.skipped = self.spikes = 0
        return result

    def take_tokens(self) -> int:
        """Return the tokens of the steps since this was asked last."""
        self.fold()
        tokens, self.tokens = self.tokens, 0
        return tokens

    def state(self) -> dict[str, Any]:
        """Return everything but tokens as numbers, for a checkpoint."""
        self.fold()
        return {
            "sums": self.sums,
            "counted": self.counted,
            "skipped": self.skipped,
            "spikes": self.spikes,
            "detector": self.detector.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        self.pending.clear()
        self.sums, self.counted = list(state["sums"]), state["counted"]
        self.skipped, self.spikes = state["skipped"], state["spikes"]
        self.detector.restore(state["detector"])


class HostCopy:
    """A tensor on its way to main memory: reading it waits for the work before it, not after."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._tensor = tensor
        if tensor.is_cuda:
            self._tensor = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def item(self) -> float:
        """Return the number in it."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._tensor)


Line = dict[str, Any]


@contextmanager
def open_monitor(
    run: RunFolder | None, config: TrainingConfig, resumed_at: int | None = None
) -> Iterator[Callable[[Line], Line]]:
    """Yield a function that writes a line everywhere, and returns it.

    run: without a folder lines go nowhere.
    resumed_at: the step that a resumed run goes on from. In TensorBoard its lines replace those
        that came after it; at Weights & Biases it is the same run as before.
    """
    writers: list[Callable[[Line], object]] = []
    with ExitStack() as opened:
        if run is not None:
            run.create()
            # Every line is handed to the operating system at once, whole.
            file = opened.enter_context(run.metrics.open("ab", buffering=0))
            writers.append(
                lambda line: file.write((json.dumps(line, allow_nan=False) + "\n").encode())
            )
        if run is not None and config.tensorboard:
            writers.append(opened.enter_context(_tensorboard(run.tensorboard, resumed_at)))
        if run is not None and config.wandb is not None:
            writers.append(opened.enter_context(_wandb(run, config.wandb)))

        def write(line: Line) -> Line:
            for writer in writers:
                writer(line)
            return line

        yield write


@contextmanager
def _tensorboard(folder: Path, resumed_at: int | None) -> Iterator[Callable[[Line], None]]:
    require("tensorboard", "tensorboard", "training.tensorboard=true")
    from torch.utils.tensorboard import SummaryWriter

    def write(line: Line) -> None:
        for name, value in scalars(line).items():
            writer.add_scalar(name, value, line["step"])

    first = None if resumed_at is None else resumed_at + 1
    with SummaryWriter(str(folder), purge_step=first) as writer:
        yield write


@contextmanager
def _wandb(run: RunFolder, project: str) -> Iterator[Callable[[Line], None]]:
    wandb = require("wandb", "wandb", f"training.wandb={project}")
    if not run.wandb_id.exists():
        replace_file(run.wandb_id, secrets.token_hex(4).encode())
    tracked = wandb.init(
        project=project,
        name=run.root.name,
        dir=str(run.root),
        id=run.wandb_id.read_text(),
        resume="allow",
    )
    try:
        yield lambda line: tracked.log(scalars(line), step=line["step"])
    finally:
        tracked.finish()


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
