"""Means over the steps since the last line, kept on the device until they are wanted."""

from typing import Any

import torch
from torch import Tensor

from switchlm.training.guard import SpikeDetector

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
        self.detector = SpikeDetector()

    def add(self, figures: Tensor) -> None:
        """Take the figures of one step, float32 [5]."""
        self.pending.append(figures)

    def fold(self) -> None:
        """Turn what is pending into numbers."""
        if not self.pending:
            return
        for *values, skipped in torch.stack(self.pending).tolist():
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

    def state(self) -> dict[str, Any]:
        """Return everything as numbers, for a checkpoint."""
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
