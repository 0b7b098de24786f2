"""How much earlier one run reached another's final loss, in steps and in time (section 3.1)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """Where a run first reached a loss: the step and the seconds of training until then."""

    step: float
    seconds: float


def crossing(evaluations: Sequence[Mapping[str, Any]], target: float) -> Crossing | None:
    """Return where the held-out loss first came down to `target`, or None if it never did.

    evaluations: lines with `step`, `seconds` and `evaluation_loss`, in order. Between two of them
    the loss is taken as a straight line.
    """
    before: Mapping[str, Any] | None = None
    for line in evaluations:
        if line["evaluation_loss"] <= target:
            if before is None:
                return Crossing(step=line["step"], seconds=line["seconds"])
            drop = before["evaluation_loss"] - line["evaluation_loss"]
            part = (before["evaluation_loss"] - target) / drop
            return Crossing(
                step=before["step"] + part * (line["step"] - before["step"]),
                seconds=before["seconds"] + part * (line["seconds"] - before["seconds"]),
            )
        before = line
    return None
