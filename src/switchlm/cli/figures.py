"""What `evaluate` shows: figures with their intervals of one model, or of several side by side."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Figure = dict[str, Any]  # `value`, and `interval`: the two ends of 95%
Figures = dict[tuple[str, str], Figure]  # by what was measured on, and the metric


def summarise(models: Sequence[Figures]) -> dict[str, dict[str, Figure]]:
    """Return mean and standard deviation (of a sample) over models of every figure."""
    found: dict[str, dict[str, Figure]] = {}
    for on, metric in models[0]:
        values = [figures[on, metric]["value"] for figures in models]
        found.setdefault(on, {})[metric] = {
            "mean": statistics.fmean(values),
            "std": statistics.stdev(values),
            "values": values,
        }
    return found


def show_one(figures: Figures, notes: Mapping[str, str]) -> None:
    """Print the figures of one model; notes: a last column, by what was measured on."""
    table = Table()
    for column in ("", "metric", "value", "95% interval"):
        table.add_column(
            column, justify="left" if column in ("", "metric") else "right", no_wrap=True
        )
    table.add_column("of")
    for (on, metric), figure in figures.items():
        value = _number(metric, figure["value"])
        table.add_row(on, metric, value, _interval(metric, figure), notes.get(on, ""))
    Console().print(table)


def show_several(names: Sequence[str], models: Sequence[Figures]) -> None:
    """Print one row a model, and under them the mean and the standard deviation."""
    table = Table()
    table.add_column("model")
    for on, metric in models[0]:
        table.add_column(f"{on}\n{metric}", justify="right")
    for place, (name, figures) in enumerate(zip(names, models, strict=True), start=1):
        cells = [
            f"{_number(metric, figure['value'])}\n{_interval(metric, figure)}"
            for (_, metric), figure in figures.items()
        ]
        table.add_row(name, *cells, end_section=place == len(names))
    summary = summarise(models)
    for title, key in (("mean", "mean"), ("standard deviation", "std")):
        cells = [_number(metric, summary[on][metric][key]) for on, metric in models[0]]
        table.add_row(title, *cells)
    Console().print(table)


def _number(metric: str, value: float) -> str:
    """Losses differ in the third place, per cent in the first."""
    return f"{value:.4f}" if metric.startswith("loss") else f"{value:.2f}"


def _interval(metric: str, figure: Figure) -> str:
    return " to ".join(_number(metric, end) for end in figure.get("interval", ()))
