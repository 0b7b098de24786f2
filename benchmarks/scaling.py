"""How Switch-Base, -XXL and -C scale from 8 to 2,048 GPUs, estimated: docs/scaling.md and .png.

    python benchmarks/scaling.py [--no-simulation]

Weak scaling: the rows of a GPU stay the same, so the batch grows with the cluster. Every point is
the fastest layout that `switchlm plan` finds; its memory and traffic are checked against a
simulated step of it. Times are estimates: nothing here ran on a GPU.
"""

import argparse
import dataclasses
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
from switchlm.parallel.mesh import MeshConfig
from switchlm.planning.cluster import GPUS, Cluster
from switchlm.planning.layouts import Layout, candidates, describe_mesh, plan
from switchlm.planning.simulate import simulate
from switchlm.recipes.config import RunConfig, run_config

DOCS = Path(__file__).parents[1] / "docs"
GPU = "h200"
SIZES = [8, 16, 32, 64, 128, 256, 512, 1024, 2048]
# Rows of 512 inputs and 114 targets per GPU: enough to utilise it, and they fit.
MODELS = {"switch-base-128": 32, "switch-xxl-128": 8, "switch-c-2048": 8}


def main() -> None:
    """Plan every point, simulate the chosen layout, and write record, page and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-simulation", action="store_true", help="on paper only")
    arguments = parser.parse_args()
    points = []
    for name, rows in MODELS.items():
        for size in SIZES:
            point = best_layout(name, rows, size, not arguments.no_simulation)
            print({key: point[key] for key in ("model", "gpus", "layout", "seconds_to_plan")})
            points.append(point)
    text = page(points)
    record = {"environment": harness.environment(seed=0), "points": points}
    (harness.RESULTS / "scaling.json").write_text(json.dumps(record, indent=1) + "\n")
    (DOCS / "scaling.md").write_text(text, encoding="utf-8")
    plot(points, DOCS / "scaling.png")


def best_layout(name: str, rows: int, size: int, simulates: bool) -> dict[str, Any]:
    """Return the metrics of the fastest layout of a model on `size` GPUs."""
    started = time.perf_counter()
    cluster = Cluster(gpu=GPUS[GPU], nodes=size // 8, gpus_per_node=8)
    config = run_config(
        preset=name,
        overrides=[
            f"data.batch_size={rows * size}",
            "training.precision=selective",
            f"training.activation_checkpointing={'xxl' in name}",
        ],
    )
    found = plan(config, cluster, meshes(cluster))
    point: dict[str, Any] = {"model": name, "gpus": size, "rows": rows, "layout": None}
    point["reason"] = found.reason
    if found.layouts:
        point |= metrics(found.layouts[0])
        if simulates:
            point |= simulated(config, found.layouts[0], size)
    point["seconds_to_plan"] = round(time.perf_counter() - started, 1)
    return point


def meshes(cluster: Cluster) -> Iterator[MeshConfig]:
    """Yield the meshes that are compared: one replica, expert x tensor of at least 8."""
    for mesh in candidates(cluster):
        if mesh.replicas == 1 and mesh.tensor <= 2 and mesh.expert >= 8 // mesh.tensor:
            yield mesh


def metrics(best: Layout) -> dict[str, Any]:
    """Return the reported metrics of a layout."""
    return {
        "layout": describe_mesh(best.mesh),
        "memory": best.estimate.peak.total,
        "sent": sum(calls * one.sent for one, calls in best.estimate.traffic.items()),
        "flops": best.flops,
        "seconds": best.times.step,
        "parts": best.times.parts,
        "tokens_per_second": best.tokens_per_second,
    }


def simulated(config: RunConfig, best: Layout, size: int) -> dict[str, Any]:
    """Return how a simulated step of the layout compares with the plan."""
    step = simulate(dataclasses.replace(config, mesh=best.mesh), size)
    return {
        "simulated_memory": step.peak.total,
        "same_traffic": Counter(step.collectives) == best.estimate.traffic,
    }


def page(points: list[dict[str, Any]]) -> str:
    """Return the page: assumptions, and one table per model."""
    gpu = GPUS[GPU]
    lines = [
        "# How the models scale, on paper",
        "",
        "Weak scaling from 8 to 2,048 GPUs: the rows of a GPU stay the same, the batch grows. Each",
        "row of a table is the fastest layout that `switchlm plan` finds, and was then simulated",
        "with the real code (`switchlm simulate`). **No step of these ran on a GPU**: memory and",
        "bytes are those of the code, times are estimates. Written by `benchmarks/scaling.py`.",
        "",
        "![Tokens per second per GPU, by model and number of GPUs](scaling.png)",
        "",
        f"Assumptions: {GPU} with {gpu.memory / 1e9:.0f} GB of which 92% may be filled,",
        f"{gpu.tensor_flops / 1e12:.0f} TFLOP/s in bfloat16 at 50% utilisation "
        "(a hope: one H100 reached 9% and 6% so far),",
        f"{gpu.memory_bandwidth / 1e12} TB/s of memory, {gpu.link / 1e9:.0f} GB/s within a node",
        "of 8, 50 GB/s per GPU between nodes, 10 us per round of a collective and 0.2 us per peer",
        "of an all-to-all; no congestion, no stragglers, balanced experts. Gathering weights and",
        "reducing gradients overlap with compute; all-to-alls and sums over",
        "the tensor axis do not. Selective precision, AdamW in float32, rows of 512",
        "inputs and 114 targets; activation checkpointing for XXL. Meshes with one replica, expert",
        "x tensor of at least 8 and tensor of at most 2 are compared. `efficiency` is tokens per",
        "second per GPU against the first size that fits.",
        "",
    ]
    for name in MODELS:
        mine = [point for point in points if point["model"] == name]
        lines += [f"## {name}, {mine[0]['rows']} rows per GPU", ""]
        lines += [
            "| GPUs | layout | GB per GPU | simulated | GB sent | same collectives | ms per step |"
            " tokens/s | efficiency | bound by |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        first = next((point for point in mine if point["layout"]), None)
        for point in mine:
            if point["layout"] is None or first is None:
                lines.append(f"| {point['gpus']} | nothing fits | | | | | | | | |")
                continue
            alone = first["tokens_per_second"] / first["gpus"]
            here = point["tokens_per_second"] / point["gpus"]
            bound = max(point["parts"], key=lambda part: point["parts"][part])
            again = point.get("simulated_memory")
            cells = [
                f"{point['gpus']:,}",
                point["layout"],
                f"{point['memory'] / 1e9:.1f}",
                "" if again is None else f"{again / 1e9:.1f}",
                f"{point['sent'] / 1e9:.2f}",
                {True: "yes", False: "no"}.get(point.get("same_traffic"), ""),
                f"{1e3 * point['seconds']:.0f}",
                f"{point['tokens_per_second']:,.0f}",
                f"{here / alone:.0%}",
                bound,
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def plot(points: list[dict[str, Any]], path: Path) -> None:
    """Draw tokens per second per GPU over the number of GPUs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in MODELS:
        mine = [point for point in points if point["model"] == name and point["layout"]]
        axes.plot(
            [point["gpus"] for point in mine],
            [point["tokens_per_second"] / point["gpus"] for point in mine],
            marker="o",
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(SIZES, [f"{size:,}" for size in SIZES])
    axes.set_xlabel(f"GPUs ({GPU}, 8 a node)")
    axes.set_ylabel("tokens per second per GPU, estimated")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
