"""Write report.html: metrics and results go in as JSON, the page's scripts draw them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from switchlm.files import replace_file
from switchlm.report.sections import layers_data, rounded, routing_data, short_name, thin


@dataclass(frozen=True, kw_only=True)
class ReportRun:
    """One run of the report: a name, the lines of its metrics.jsonl, and its routing.json."""

    name: str
    metrics: Sequence[Mapping[str, Any]]
    routing: Sequence[Mapping[str, Any]] = ()


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
    sources: for each source of the text how two runs compare, as of `recipes.speedup`.
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
    # "</" would end the script element that holds the data.
    text = json.dumps(data, allow_nan=False).replace("</", "<\\/")
    replace_file(path, _page().replace("__DATA__", text).encode("utf-8"))


def _page() -> str:
    """Return the page with its style and scripts in it: one file that needs no other."""
    parts = files("switchlm.report").joinpath("page")
    page = parts.joinpath("page.html").read_text(encoding="utf-8")
    for name in ("style.css", "charts.js", "layers.js", "routing.js", "page.js"):
        page = page.replace(f"__{name}__", parts.joinpath(name).read_text(encoding="utf-8"))
    return page


def _series(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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


def _pick(line: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: rounded(line[key]) for key in keys if key in line}
