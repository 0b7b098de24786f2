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


def speed_by_source(
    dense: Sequence[Mapping[str, Any]], sparse: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, float | None]]:
    """Return how the two runs compare on each source of the text (section 4.3).

    dense, sparse: lines as of `crossing` that also have `evaluation_loss_by_source`. For each
    source: `dense_loss` and `sparse_loss` at the end, and `step_ratio` and `time_ratio`, the share
    of the dense run after which the sparse one had reached the dense run's last loss; None if it
    never did.
    """
    last = {"dense": dense[-1], "sparse": sparse[-1]}
    result: dict[str, dict[str, float | None]] = {}
    for name, target in last["dense"]["evaluation_loss_by_source"].items():
        lines = [
            {**line, "evaluation_loss": line["evaluation_loss_by_source"][name]} for line in sparse
        ]
        reached = crossing(lines, target)
        result[name] = {
            "dense_loss": target,
            "sparse_loss": last["sparse"]["evaluation_loss_by_source"][name],
            "step_ratio": None if reached is None else reached.step / last["dense"]["step"],
            "time_ratio": None if reached is None else reached.seconds / last["dense"]["seconds"],
        }
    return result
