"""What keeps a bad batch from harming a run: steps that are skipped, spikes that are noticed."""

import math
from collections import deque
from statistics import median
from typing import Any

import torch
from torch import Tensor

from switchlm.model.local import local
from switchlm.parallel.mesh import ALONE, AnyMesh

LARGE = 2**20  # elements; PyTorch takes the norm of a tensor in main memory on one thread


def global_norm(gradients: list[Tensor], mesh: AnyMesh = ALONE) -> Tensor:
    """Return the Euclidean norm of all gradients together, a float32 scalar, without a sync.

    Where several processes hold the same part of a gradient, each counts its share of it, so that
    one sum over all processes is enough.
    """
    norms = torch._foreach_norm([_short(local(gradient)) for gradient in gradients])
    parts = [
        norm.float() / math.sqrt(mesh.copies(gradient))
        for norm, gradient in zip(norms, gradients, strict=True)
    ]
    return mesh.length(torch.linalg.vector_norm(torch.stack(parts)))


def _short(gradient: Tensor) -> Tensor:
    """Return the norms of the rows, which have the same norm, where one thread would be slow."""
    if gradient.device.type == "cpu" and gradient.dim() > 1 and gradient.numel() > LARGE:
        return torch.linalg.vector_norm(gradient, dim=-1)
    return gradient


def keep_where(skip: Tensor, old: Tensor, new: Tensor) -> None:
    """Overwrite `old` with `new` in place unless the bool scalar `skip`.

    A choice, not a product: zero times infinity would be NaN.
    """
    old.copy_(torch.where(skip, old, new))


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
