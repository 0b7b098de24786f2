"""Write report.html: metrics and results go in as JSON, the page's scripts draw them.

What goes in is bounded, ordered, in few digits, and all finite. Experts and classes are put in an
order in which neighbours are similar, so that families show in a heat map. Curves have no more
points than a page shows.

Shapes: E experts shown, M sources (or classes), L layers.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from switchlm.files import replace_file

Floats = NDArray[np.float64]
Line = Mapping[str, Any]  # of metrics.jsonl
Record = Mapping[str, Any]  # one layer, as `evaluation.routing.LayerRouting`

MOST_CELLS = 200_000  # of all heat maps of a run together
MOST_EXPERTS = 128  # shown of a layer, the busiest
LEAST_EXPERTS = 16
MOST_SOURCES = 256
MOST_LISTED = 32  # experts described in words
DEAD = 0.05  # of an even share of the tokens: an expert with less serves next to nothing
PARTS = 10_000  # shares are whole numbers of so many parts
MAX_POINTS = 400  # of a curve: more than the page has pixels for
MOST_NUMBERS = 100_000  # of all curves of a run together
FIGURES = ("gate", "kept_expert", "router_entropy", "load_entropy", "dead_experts")


@dataclass(frozen=True, kw_only=True)
class ReportRun:
    """One run of the report: a name, the lines of its metrics.jsonl, and its routing.json."""

    name: str
    metrics: Sequence[Line]
    routing: Sequence[Record] = ()


def write_report(
    path: Path,
    *,
    title: str,
    headline: str,
    runs: Sequence[ReportRun],
    table: Sequence[Mapping[str, Any]] = (),
    sources: Mapping[str, Mapping[str, Any]] | None = None,
    target_loss: float | None = None,
    crossing: Mapping[str, float] | None = None,
    example: Mapping[str, str] | None = None,
    configuration: Mapping[str, Any] | None = None,
) -> None:
    """Write the report.

    headline: the result in a sentence.
    table: one mapping of column to text a row.
    sources: how two runs compare on each source of the text, see `speed_by_source`.
    target_loss: a held-out loss drawn as a line (the dense twin's last).
    crossing: where the sparse model reached it, `step` and `seconds`.
    example: label to text, shown as code.
    configuration: shown as is.
    """
    data = {
        "title": title,
        "headline": headline,
        "runs": [
            {
                "name": run.name,
                **_series(run.metrics),
                "inside": layers_data(run.metrics),
                "routing": routing_data(run.routing),
            }
            for run in runs
        ],
        "sources": [{"name": name, **_pick(one, one)} for name, one in (sources or {}).items()],
        "table": [dict(row) for row in table],
        "target_loss": target_loss,
        "crossing": crossing,
        "example": example,
        "configuration": configuration,
    }
    # No tag, nor "<!--", may end or stretch the script element that holds the data.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    replace_file(path, _page().replace("__DATA__", text).encode("utf-8"))


def _page() -> str:
    """Return the page with its style and scripts in it: one file that needs no other."""
    parts = files("switchlm.report").joinpath("page")
    page = parts.joinpath("page.html").read_text(encoding="utf-8")
    for name in ("style.css", "charts.js", "layers.js", "routing.js", "page.js"):
        page = page.replace(f"__{name}__", parts.joinpath(name).read_text(encoding="utf-8"))
    return page


def _series(metrics: Sequence[Line]) -> dict[str, Any]:
    """Split metric lines into training and evaluation points, thinned evenly, NaN left out."""
    training = [line for line in metrics if "loss" in line]
    evaluation = [line for line in metrics if "evaluation_loss" in line]
    keys = ("step", "seconds", "loss", "tokens_per_second", "dropped_by_layer", "gate", "load")
    return {
        "layers": next(
            (list(map(short_name, line["layers"])) for line in training if line.get("layers")), []
        ),
        "training": [_pick(line, keys) for line in thin(training)],
        "evaluation": [
            _pick(line, ("step", "seconds", "evaluation_loss")) for line in thin(evaluation)
        ],
    }


def _pick(line: Line, keys: Iterable[str]) -> dict[str, Any]:
    return {key: rounded(line[key]) for key in keys if key in line}


def similarity_order(vectors_NF: Floats) -> list[int]:
    """Return the numbers 0 to N-1 so that similar rows stand beside each other.

    The two closest groups are joined again and again, by the mean distance of their members; of
    the ways to lay two groups end to end, the one whose ends are closest is taken.
    """
    square_N = (vectors_NF**2).sum(1)
    squared_NN = square_N[:, None] + square_N[None] - 2 * vectors_NF @ vectors_NF.T
    between_NN = np.sqrt(np.maximum(squared_NN, 0))
    distance_NN = between_NN.copy()
    np.fill_diagonal(distance_NN, np.inf)
    groups: list[list[int]] = [[row] for row in range(len(vectors_NF))]
    for _ in range(len(groups) - 1):
        place, other = divmod(int(distance_NN.argmin()), len(groups))
        left, right = groups[place], groups[other]
        ways = [(first, second) for first in (left, left[::-1]) for second in (right, right[::-1])]
        first, second = min(ways, key=lambda way: between_NN[way[0][-1], way[1][0]])
        groups[place], groups[other] = first + second, []
        sizes = len(left), len(right)
        joined_N = (sizes[0] * distance_NN[place] + sizes[1] * distance_NN[other]) / sum(sizes)
        distance_NN[place], distance_NN[:, place] = joined_N, joined_N
        distance_NN[place, place] = np.inf
        distance_NN[other], distance_NN[:, other] = np.inf, np.inf
    return max(groups, key=len, default=[])


def routing_data(layers: Sequence[Record]) -> dict[str, Any] | None:
    """Return what the page draws of a run's Switch layers; None without any.

    Sources stand in one order for all layers, experts in one of each layer's own, so that those
    which serve alike are neighbours.
    """
    if not layers:
        return None
    loads = layers[0]["source_load"]
    sources = sorted(loads, key=lambda name: -sum(loads[name]))[:MOST_SOURCES]
    cells = MOST_CELLS // (len(layers) * max(len(sources), 1))
    most = min(max(cells, LEAST_EXPERTS), MOST_EXPERTS)
    shares = [_shares(layer["source_load"], sources, len(layer["load_E"])) for layer in layers]
    order = similarity_order(np.concatenate([np.sqrt(part) for part in shares], axis=1))
    sources = [sources[place] for place in order]
    return {
        "sources": sources,
        "layers": [_layer(layer, sources, most) for layer in layers],
    }


def _shares(loads: Mapping[str, Sequence[int]], names: Sequence[str], num_experts: int) -> Floats:
    """Return [M, E]: of the tokens of each name, the share that wanted each expert."""
    if not names:
        return np.zeros((0, num_experts))
    counts_ME = np.array([loads[name] for name in names], dtype=np.float64)
    return counts_ME / np.maximum(counts_ME.sum(1, keepdims=True), 1)


def _layer(layer: Record, sources: Sequence[str], most: int) -> dict[str, Any]:
    load_E = np.array(layer["load_E"], dtype=np.float64)
    share_E = load_E / max(load_E.sum(), 1)
    shown = np.sort(np.argsort(-share_E, kind="stable")[:most])
    by_source_ME = _shares(layer["source_load"], sources, len(load_E))
    by_class_CE = _shares(layer["class_load"], list(layer["class_load"]), len(load_E))
    # What an expert is for is what it serves more than the others do.
    profile_ME = np.concatenate([by_source_ME, by_class_CE])[:, shown]
    profile_ME = np.sqrt(profile_ME / np.maximum(share_E[shown], 1e-9))
    experts = shown[similarity_order(profile_ME.T)]
    counts = {name: np.array(load, dtype=float) for name, load in layer["class_load"].items()}
    return {
        "name": short_name(layer["name"]),
        "experts": experts.tolist(),
        "share": _parts(share_E[experts]),
        "total": len(load_E),
        "dead": dead_experts(layer["load_E"]),
        "by_source": _parts(by_source_ME[:, experts]),
        "classes": [
            {
                "name": name,
                "share": _parts(count_E[experts] / count_E.sum()),
                "size": _parts(count_E.sum() / max(load_E.sum(), 1)),
            }
            for name, count_E in sorted(counts.items(), key=lambda item: -item[1].sum())
        ],
        "listed": [
            describe_expert(layer, int(expert), sources)
            for expert in np.argsort(-share_E, kind="stable")[:MOST_LISTED]
            if load_E[expert]
        ],
        "dropped": float(f"{layer['dropped']:.4g}"),
        "dropped_by_place": [float(f"{share:.3g}") for share in layer["dropped_by_place"]],
        "gate": float(f"{layer['gate']:.3g}"),
    }


def describe_expert(layer: Record, expert: int, sources: Sequence[str]) -> dict[str, Any]:
    """Return an expert's share of the tokens, and what it serves most.

    `classes`: up to three of the largest shares of its own tokens, as (name, share). `sources`: up
    to four of those it serves most beyond its share of all tokens, as (name, times).
    """
    load = layer["load_E"][expert]
    total = sum(layer["load_E"])
    classes = sorted(
        ((name, loads[expert] / load) for name, loads in layer["class_load"].items()),
        key=lambda item: -item[1],
    )
    lifts = []
    for name in sources:
        loads = layer["source_load"][name]
        lifts.append((name, loads[expert] / max(sum(loads), 1) * total / load))
    lifts.sort(key=lambda item: -item[1])
    return {
        "expert": expert,
        "share": round(load / total, 4),
        "classes": [(name, round(share, 3)) for name, share in classes[:3] if share >= 0.05],
        "sources": [(name, round(times, 2)) for name, times in lifts[:4] if times >= 1.2],
        "tokens": [text for text, _ in layer["top_tokens"][expert]][:8],
    }


def dead_experts(load_E: Sequence[int]) -> list[int]:
    """Return the experts that serve less than a twentieth of an even share."""
    even = sum(load_E) / len(load_E)
    return [expert for expert, load in enumerate(load_E) if load < DEAD * even]


def short_name(name: str) -> str:
    """`encoder.blocks.3.feedforward` is `encoder 3` to a reader, as is its `attention`."""
    return name.replace(".blocks.", " ").removesuffix(".feedforward").removesuffix(".attention")


def _parts(shares: Floats) -> Any:
    return np.rint(np.asarray(shares) * PARTS).astype(int).tolist()


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
    loads = next((line["load"] for line in metrics if line.get("load")), None)
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
                "experts": None if loads is None else len(loads[i]),
                **{key: rounded([line[key][i] for line in lines], 4) for key in FIGURES},
            }
            for i, name in enumerate(names)
        ],
    }


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
