"""The figures that docs/ shows: held-out loss by experts, by step, by time, and by language."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.table import Result, Runs

DARK, DENSE, SPARSE = "#1c2330", "#1d5fd1", "#c2570c"


def by_experts(seeds: Sequence[Runs], path: Path) -> None:
    """Draw figures 1 and 4: the last quality by the number of experts, and the curves."""
    figure, (left, right) = sheet()
    names = list(seeds[0])
    places = range(len(names))
    for runs in seeds:
        left.plot(places, [runs[name].quality for name in names], "o", color=SPARSE, alpha=0.45)
    means = [statistics.mean(runs[name].quality for runs in seeds) for name in names]
    left.plot(places, means, color=DARK, linewidth=1.2)
    left.set_xticks(places, ["dense", *(name.split()[0] for name in names[1:])])
    left.set_xlabel("experts per layer")
    left.set_title("Quality by experts, equal steps and FLOPs", loc="left", fontweight="bold")
    for place, name in enumerate(names):
        shade = place / max(len(names) - 1, 1)
        orange = (0.95 - 0.35 * shade, 0.72 - 0.5 * shade, 0.35 - 0.3 * shade)
        color = DENSE if name == "dense" else orange
        curve(right, [runs[name] for runs in seeds], "step", color, name)
    right.set_xlabel("step")
    right.set_title("Quality by step, mean of the seeds", loc="left", fontweight="bold")
    finish(figure, (left, right), path, legend=right)


def in_time(seeds: Sequence[Runs], path: Path) -> None:
    """Draw figures 5 and 6: quality by time and by step, with a wider dense model."""
    figure, axes = sheet()
    colors = {"dense": DENSE, "wider dense": "#7a4fbf", "Switch": SPARSE}
    for axis, unit in zip(axes, ("seconds", "step"), strict=True):
        for name, color in colors.items():
            curve(axis, [runs[name] for runs in seeds], unit, color, name)
        axis.set_xlabel("seconds of training, one thread" if unit == "seconds" else "step")
        what = "time" if unit == "seconds" else "step"
        axis.set_title(f"Quality by {what}, mean of the seeds", loc="left", fontweight="bold")
    finish(figure, axes, path, legend=axes[1])


def by_language(seeds: Sequence[Runs], path: Path) -> None:
    """Draw figures 7 and 8: quality and speed-up by language, means over the seeds."""
    from matplotlib.figure import Figure

    from switchlm.recipes.compare import speed_by_source

    found = [
        speed_by_source(runs["dense"].evaluations, runs["Switch"].evaluations) for runs in seeds
    ]

    def mean(name: str, model: str) -> float:
        return statistics.mean(-float(one[name][f"{model}_loss"] or 0) for one in found)

    def speed(name: str) -> float:
        return statistics.mean(1 / (one[name]["step_ratio"] or float("inf")) for one in found)

    names = sorted(found[0], key=lambda name: mean(name, "dense") - mean(name, "sparse"))
    figure = Figure(figsize=(17, 10.5), layout="constrained", dpi=90)
    upper, lower = figure.subplots(2, 1, height_ratios=[1.5, 1])
    places = range(len(names))
    dense, sparse = ([mean(name, model) for name in names] for model in ("dense", "sparse"))
    upper.vlines(places, dense, sparse, color="#b8c0cc", linewidth=1.6, zorder=1)
    upper.scatter(places, sparse, s=20, color=SPARSE, label="Switch", zorder=2)
    upper.scatter(places, dense, s=20, color=DENSE, label="dense", zorder=2)
    upper.set_xticks(places, names, rotation=90, fontsize=7.5)
    upper.set_xlim(-1, len(names))
    upper.set_ylabel("negative log perplexity")
    upper.set_title("Quality by language, largest gain first", loc="left", fontweight="bold")
    upper.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    speeds = [speed(name) for name in names]
    lower.hist(speeds, bins=40, color=SPARSE, rwidth=0.92)
    lower.axvline(1, color="#667085", linewidth=1, linestyle="--")
    lower.axvline(statistics.mean(speeds), color=DARK, linewidth=1.2)
    lower.set_xlabel("speed-up in steps to the dense model's quality (0: never reached)")
    lower.set_ylabel("languages")
    title = f"Speed-up by language, mean {statistics.mean(speeds):.2f}"
    lower.set_title(title, loc="left", fontweight="bold")
    for axis in (upper, lower):
        axis.grid(axis="y", alpha=0.3)
    figure.savefig(path)


def sheet() -> tuple[Any, Any]:
    """Return a figure and its two places side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained", dpi=100)
    return figure, figure.subplots(1, 2)


def curve(axis: Any, runs: Sequence[Result], unit: str, color: Any, name: str) -> None:
    """Draw the quality of a row: evaluations that all its runs have, x and y as means."""
    rows = [run.evaluations for run in runs if not run.diverged]
    points = list(zip(*rows, strict=False))
    x = [statistics.mean(line[unit] for line in lines) for lines in points]
    y = [-statistics.mean(line["evaluation_loss"] for line in lines) for lines in points]
    axis.plot(x, y, color=color, label=name, linewidth=1.6)


def finish(figure: Any, axes: Any, path: Path, legend: Any) -> None:
    """Label the places, leave the first steps out, and save."""
    for axis in axes:
        axis.set_ylabel("negative log perplexity")
        axis.grid(alpha=0.3)
        lines = [line.get_ydata() for line in axis.get_lines() if len(line.get_ydata()) > 1]
        values = [float(value) for line in lines for value in line[min(2, len(line) - 1) :]]
        if values and axis.get_xlabel() != "experts per layer":
            margin = 0.04 * (max(values) - min(values)) or 0.01
            axis.set_ylim(min(values) - margin, max(values) + margin)
    legend.legend(loc="lower right", frameon=False, fontsize=9)
    figure.savefig(path)
