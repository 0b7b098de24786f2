"""The metrics of a run: means over steps, written to metrics.jsonl, TensorBoard or wandb."""

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
from switchlm.files import finite, replace_file, to_json
from switchlm.model.layers import local
from switchlm.parallel.mesh import ALONE, Mesh
from switchlm.training.config import TrainingConfig
from switchlm.training.divergence import FailedSteps
from switchlm.training.run_folder import RunFolder

LARGE = 2**20  # elements; PyTorch takes the norm of a tensor in main memory on one thread
DIGIT = 2**12  # of counts that are summed in float32


def global_norm(
    gradients: list[Tensor], mesh: Mesh = ALONE, counts: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Return the Euclidean norm of all gradients together, and sums, by one all-reduce at most.

    If n processes hold the same part of a gradient, each adds 1 / n of its square. The host does
    not wait for the device.

    counts: numbers of this process, to be summed over all processes; sums below 2^36 are exact.

    Returns the norm, a float32 scalar, and the sums, int64 [len(counts)], on the same device.
    """
    norms = _torch.norms([_short(local(gradient)) for gradient in gradients])
    parts = [
        norm.float() / math.sqrt(mesh.num_replicas(gradient))
        for norm, gradient in zip(norms, gradients, strict=True)
    ]
    norm = torch.linalg.vector_norm(torch.stack(parts))
    # Float32, as the norm, holds whole numbers up to 2^24: high and low digits are summed apart.
    digits = [digit for count in counts for digit in divmod(count, DIGIT)]
    # torch.full, since a copy from main memory would make the host wait for the GPU.
    filled = [torch.full((), digit, dtype=torch.float32, device=norm.device) for digit in digits]
    totals = mesh.all_ranks_sum(torch.stack([norm.square(), *filled]))
    high_C, low_C = totals[1:].long().view(len(counts), 2).unbind(-1)
    return norm if not mesh.is_distributed else totals[0].sqrt(), high_C * DIGIT + low_C


def _short(gradient: Tensor) -> Tensor:
    """Return the norms of the rows, which have the same norm, if one thread would be slow."""
    if gradient.device.type == "cpu" and gradient.dim() > 1 and gradient.numel() > LARGE:
        return torch.linalg.vector_norm(gradient, dim=-1)
    return gradient


class SpikeDetector:
    """Detects losses far above the running median.

    A loss is a spike if it exceeds `factor` times the median of the last `window` ordinary losses,
    once there are `minimum`. Spikes and non-finite losses do not enter the window; after `window`
    spikes in a row the window starts again.
    """

    def __init__(self, window: int = 100, factor: float = 1.5, minimum: int = 10) -> None:
        self.window, self.factor, self.minimum = window, factor, minimum
        self.losses: deque[float] = deque(maxlen=window)
        self.spikes_in_a_row = 0

    def is_spike(self, loss: float) -> bool:
        """Return whether `loss` is a spike, and add it to the window if it is not."""
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
        """Return the state for a checkpoint."""
        return {"losses": list(self.losses), "spikes_in_a_row": self.spikes_in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        """Load what `state` returned."""
        self.losses = deque(state["losses"], maxlen=self.window)
        self.spikes_in_a_row = state["spikes_in_a_row"]


METRICS = ("loss", "balance_loss", "z_loss", "gradient_norm")


class Averages:
    """Sums the metrics of steps; skipped steps are counted, and left out of the means.

    Metrics stay tensors on the device (see StepRecord) until `fold` transfers them, all at once.

    failed: counts every step, too.
    """

    def __init__(self, failed: FailedSteps) -> None:
        self.failed = failed
        self.pending: list[tuple[Tensor, Tensor]] = []
        self.sums = [0.0] * len(METRICS)
        self.counted = 0
        self.skipped = 0
        self.spikes = 0
        self.tokens = 0
        self.detector = SpikeDetector()

    def add(self, metrics: Tensor, tokens: Tensor) -> None:
        """Add the metrics of one step, float32 [5], and its number of tokens, an int64 scalar."""
        self.pending.append((metrics, tokens))

    def fold(self) -> None:
        """Add the pending metrics to the sums."""
        if not self.pending:
            return
        metrics, tokens = zip(*self.pending, strict=True)
        self.tokens += sum(torch.stack(tokens).tolist())
        for *values, skipped in torch.stack(metrics).tolist():
            self.failed.add(values[0], bool(skipped))
            if skipped:
                self.skipped += 1
                continue
            self.counted += 1
            self.spikes += self.detector.is_spike(values[0])
            self.sums = [total + value for total, value in zip(self.sums, values, strict=True)]
        self.pending.clear()

    def line(self) -> dict[str, Any]:
        """Return means (None if every step was skipped) and counts, and reset them."""
        self.fold()
        means = [total / self.counted if self.counted else None for total in self.sums]
        result = dict(zip(METRICS, means, strict=True))
        result |= {"skipped": self.skipped, "spikes": self.spikes}
        self.sums = [0.0] * len(METRICS)
        self.counted = self.skipped = self.spikes = 0
        return result

    def take_tokens(self) -> int:
        """Return the tokens since the last call."""
        self.fold()
        tokens, self.tokens = self.tokens, 0
        return tokens

    def state(self) -> dict[str, Any]:
        """Return all but the tokens, for a checkpoint."""
        self.fold()
        return {
            "sums": self.sums,
            "counted": self.counted,
            "skipped": self.skipped,
            "spikes": self.spikes,
            "detector": self.detector.state(),
            "failed": self.failed.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Load what `state` returned."""
        self.pending.clear()
        self.sums, self.counted = list(state["sums"]), state["counted"]
        self.skipped, self.spikes = state["skipped"], state["spikes"]
        self.detector.restore(state["detector"])
        self.failed.restore(state.get("failed", {}))


class HostCopy:
    """A tensor that is copied to main memory; `item` does not wait for later work of the device."""

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
    """Yield a function that writes a line everywhere, and returns it; None is for NaN.

    run: None writes nothing.
    resumed_at: the step of the checkpoint of a resumed run. In TensorBoard new lines replace those
        after it; at Weights & Biases the same run is continued.
    """
    writers: list[Callable[[Line], object]] = []
    with ExitStack() as opened:
        if run is not None:
            run.create()
            # Unbuffered: every line is one write.
            file = opened.enter_context(run.metrics.open("ab", buffering=0))
            writers.append(lambda line: file.write((to_json(line) + "\n").encode()))
        if run is not None and config.tensorboard:
            writers.append(opened.enter_context(_tensorboard(run.tensorboard, resumed_at)))
        if run is not None and config.wandb is not None:
            writers.append(opened.enter_context(_wandb(run, config.wandb)))

        def write(line: Line) -> Line:
            line = finite(line)
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
    """Return the single numbers of a line, without the step."""
    return {
        name: value
        for name, value in line.items()
        if isinstance(value, (int, float)) and name != "step"
    }


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl, without a last line that a crash cut short."""
    lines = []
    for text in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        if text.endswith(b"\n"):
            lines.append(json.loads(text))
    return lines
