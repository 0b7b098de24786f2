"""Routing records made ready for the page: bounded, ordered, in few digits.

Shapes: E experts shown, M sources (or classes), L layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from switchlm.report.order import similarity_order

MOST_CELLS = 200_000  # of all heat maps of a run together
MOST_EXPERTS = 128  # shown of a layer, the busiest
LEAST_EXPERTS = 16
MOST_SOURCES = 256
MOST_LISTED = 32  # experts described in words
DEAD = 0.05  # of an even share of the tokens: an expert with less serves next to nothing
PARTS = 10_000  # shares are whole numbers of so many parts

Record = Mapping[str, Any]  # one layer, as `evaluation.routing.LayerRouting`
Floats = NDArray[np.float64]


def routing_data(layers: Sequence[Record]) -> dict[str, Any] | None:
    """Return what the page draws of a run's Switch layers; None without any.

    Sources stand in one order for all layers, experts in one of each layer's own, so that those
    which serve alike are neighbours.
    """
    if not layers:
        return None
    sources = _largest_sources(layers)
    cells = MOST_CELLS // (len(layers) * max(len(sources), 1))
    most = min(max(cells, LEAST_EXPERTS), MOST_EXPERTS)
    shares = [_shares(layer["source_load"], sources, len(layer["load_E"])) for layer in layers]
    order = similarity_order(np.concatenate([np.sqrt(part) for part in shares], axis=1))
    sources = [sources[place] for place in order]
    return {
        "sources": sources,
        "layers": [_layer(layer, sources, most) for layer in layers],
    }


def _largest_sources(layers: Sequence[Record]) -> list[str]:
    loads = layers[0]["source_load"]
    return sorted(loads, key=lambda name: -sum(loads[name]))[:MOST_SOURCES]


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
