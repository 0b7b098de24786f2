"""Write report.html: metrics and results as JSON, which the page's scripts draw.

The data is limited in size and digits, and finite. Experts and sources are ordered so that
neighbours are similar, which shows clusters in a heat map. Curves have at most as many points as a
page shows.

Shapes: E experts shown, M sources (or classes), L layers.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from switchlm.files import replace_file, to_json

Floats = NDArray[np.float64]
Line = Mapping[str, Any]  # of metrics.jsonl
Record = Mapping[str, Any]  # one layer, as `evaluation.routing.LayerRouting`

MOST_CELLS = 200_000  # of all heat maps of a run together
MOST_EXPERTS = 128  # shown of a layer, the busiest
LEAST_EXPERTS = 16
MOST_SOURCES = 256
MOST_LISTED = 32  # experts with a description
DEAD = 0.05  # of an even load: an expert with less counts as dead
PARTS = 10_000  # shares are integers in units of 1 / PARTS
MAX_POINTS = 400  # of a curve: more than the page has pixels for
MOST_NUMBERS = 100_000  # of all curves of a run together
LAYER_METRICS = ("gate", "kept_expert", "router_entropy", "load_entropy", "dead_experts")


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

    headline: the result as one sentence.
    table: one mapping of column to text per row.
    sources: comparison of two runs on each source of the text, see `speed_by_source`.
    target_loss: a held-out loss drawn as a line (the dense twin's last).
    crossing: `step` and `seconds` at which the sparse model reached it.
    example: label to text, shown as code.
    configuration: shown as it is.
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
    # No "<" of the data may end or extend the script element that contains it.
    text = to_json(data).replace("<", "\\u003c")
    replace_file(path, _page().replace("__DATA__", text).encode("utf-8"))


def _page() -> str:
    """Return the page with its style and scripts inlined."""
    parts = files("switchlm.report").joinpath("page")
    page = parts.joinpath("page.html").read_text(encoding="utf-8")
    for name in ("style.css", "charts.js", "layers.js", "routing.js", "page.js"):
        page = page.replace(f"__{name}__", parts.joinpath(name).read_text(encoding="utf-8"))
    return page


def _series(metrics: Sequence[Line]) -> dict[str, Any]:
    """Return training and evaluation points of metric lines, thinned evenly, without NaN."""
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
    """Return the numbers 0 to N-1 in an order in which similar rows are neighbours.

    Hierarchical clustering with average linkage; of the ways to concatenate two clusters, the one
    whose touching ends are closest is taken.
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
    """Return the page's data of a run's Switch layers; None without any.

    Sources have one order for all layers, experts one per layer; similar ones are neighbours.
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
    """Return [M, E]: the share of the tokens of each name that chose each expert."""
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
    # An expert is characterised by its tokens relative to those of all experts.
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
    """Return an expert's share of all tokens, and its most frequent kinds of tokens.

    `classes`: up to three of the largest shares of its own tokens, as (name, share).
    `sources`: up to four of which it takes most, relative to its share of all tokens, as (name,
    ratio).
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
        "sources": [(name, round(ratio, 2)) for name, ratio in lifts[:4] if ratio >= 1.2],
        "tokens": [text for text, _ in layer["top_tokens"][expert]][:8],
    }


def dead_experts(load_E: Sequence[int]) -> list[int]:
    """Return the experts with less than a twentieth of an even load."""
    even = sum(load_E) / len(load_E)
    return [expert for expert, load in enumerate(load_E) if load < DEAD * even]


def short_name(name: str) -> str:
    """Return `encoder 3` for `encoder.blocks.3.feedforward` or its `attention`."""
    return name.replace(".blocks.", " ").removesuffix(".feedforward").removesuffix(".attention")


def _parts(shares: Floats) -> Any:
    return np.rint(np.asarray(shares) * PARTS).astype(int).tolist()


def layers_data(metrics: Sequence[Line]) -> dict[str, Any] | None:
    """Return the curves of a run's lines of evaluation; None if no line measured the layers.

    `step`: of every point.
    `stacks`: the layers of each stack, with a name and `near`, a curve per head.
    `switches`: for each Switch layer its name, number of experts, and a curve per metric (see
    `training.loop.train`).
    """
    lines = [line for line in metrics if "attention_near" in line]
    if not lines:
        return None
    last = lines[-1]
    loads = next((line["load"] for line in metrics if line.get("load")), None)
    numbers = sum(map(len, last["attention_near"].values()))
    names: Sequence[str] = last.get("layers", ())
    numbers += len(LAYER_METRICS) * len(names)
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
                **{key: rounded([line[key][i] for line in lines], 4) for key in LAYER_METRICS},
            }
            for i, name in enumerate(names)
        ],
    }


def rounded(value: Any, digits: int = 6) -> Any:
    """Return numbers rounded to significant digits, and None for those that are not finite."""
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if abs(value) < float("inf") else None
    return value


def thin(lines: Sequence[Any], most: int = MAX_POINTS) -> Sequence[Any]:
    """Return at most `most` (2 or more) of the lines, evenly, with the first and the last."""
    if len(lines) <= most:
        return lines
    last = len(lines) - 1
    return [lines[round(i * last / (most - 1))] for i in range(most)]
