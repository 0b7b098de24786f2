"""What the layers did at each evaluation, for the page: one list of numbers per curve.

Curves have no more points than a page shows, in few digits, none of them infinite.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from switchlm.report.routing import short_name

MAX_POINTS = 400  # of a curve: more than the page has pixels for
MOST_NUMBERS = 100_000  # of all curves of a run together
FIGURES = ("gate", "kept_expert", "router_entropy", "load_entropy", "dead_experts")

Line = Mapping[str, Any]


def layers_data(metrics: Sequence[Line]) -> dict[str, Any] | None:
    """Return the curves of a run's lines of evaluation; None where no line measured the layers.

    `step`: of every point. `stacks`: for each stack its layers, a layer having a name and `near`, a
    curve per head. `switches`: for each Switch layer its name, number of experts, and a curve for
    each of its figures (see `training.loop.train`).
    """
    lines = [line for line in metrics if "attention_near" in line]
    if not lines:
        return None
    last = lines[-1]
    numbers = sum(map(len, last["attention_near"].values()))
    names: Sequence[str] = last.get("layers", ())
    numbers += len(FIGURES) * len(names)
    lines = list(thin(lines, max(min(MAX_POINTS, MOST_NUMBERS // numbers), 2)))
    stacks: dict[str, list[dict[str, Any]]] = {}
    for name, heads in last["attention_near"].items():
        near = [
            [line["attention_near"][name][head] for line in lines] for head in range(len(heads))
        ]
        layer = {"name": short_name(name), "near": rounded(near, 4)}
        stacks.setdefault(name.split(".")[0], []).append(layer)
    return {
        "step": [line["step"] for line in lines],
        "stacks": [{"name": name, "layers": layers} for name, layers in stacks.items()],
        "switches": [
            {
                "name": short_name(name),
                "experts": experts,
                **{key: rounded([line[key][i] for line in lines], 4) for key in FIGURES},
            }
            for i, (name, experts) in enumerate(zip(names, _experts(metrics, names), strict=True))
        ],
    }


def _experts(metrics: Sequence[Line], names: Sequence[str]) -> list[int | None]:
    """Return the number of experts of each Switch layer, which lines of training tell, or None."""
    for line in metrics:
        if line.get("load"):
            return [len(load_E) for load_E in line["load"]]
    return [None] * len(names)


def rounded(value: Any, digits: int = 6) -> Any:
    """Return numbers in so many significant digits; what is not finite has no place on paper."""
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if abs(value) < float("inf") else None
    return value


def thin(lines: Sequence[Any], most: int = MAX_POINTS) -> Sequence[Any]:
    """Return at most so many (2 or more) of the lines, evenly, the first and the last included."""
    if len(lines) <= most:
        return lines
    last = len(lines) - 1
    return [lines[round(i * last / (most - 1))] for i in range(most)]
