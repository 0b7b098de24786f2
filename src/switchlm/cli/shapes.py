"""What `plan` and `simulate` share: the batch they judge, and how they show what travels."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from switchlm.config import read_yaml

if TYPE_CHECKING:
    from switchlm.planning.recorder import Collective
    from switchlm.recipes.config import RunConfig

PAPER_BATCH = 2**20  # tokens, of inputs

BatchTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Input tokens a micro-batch of all processes; else 2^20, or as set."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a setting: training.precision=selective."),
]


def batch_config(
    config: Path | None, preset: str | None, overrides: list[str] | None, batch_tokens: int | None
) -> "RunConfig":
    """Resolve a configuration; data.batch_size is that of the tokens, unless it is set.

    Without either, a batch has 2^20 input tokens, as in the paper.
    """
    from switchlm.recipes.config import run_config

    values = {} if config is None else read_yaml(config)
    stated = list(overrides or ())
    run = run_config(preset=preset, values=values, overrides=stated)
    is_set = "batch_size" in (values.get("data") or {}) or any(
        one.startswith("data.batch_size=") for one in stated
    )
    if batch_tokens is None and is_set:
        return run
    rows = max((batch_tokens or PAPER_BATCH) // run.data.input_length, 1)
    return run_config(preset=preset, values=values, overrides=[*stated, f"data.batch_size={rows}"])


def traffic_mapping(traffic: "Mapping[Collective, int]") -> list[dict[str, Any]]:
    """Return a row for each kind, axes and dtype: calls, and bytes of payload and sent in all."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for one, calls in traffic.items():
        key = (one.kind, one.axes, str(one.dtype).removeprefix("torch."))
        row = rows.setdefault(
            key,
            dict(zip(("kind", "axes", "dtype"), key, strict=True))
            | {"size": one.size, "calls": 0, "payload": 0, "sent": 0.0},
        )
        row["calls"] += calls
        row["payload"] += calls * one.payload
        row["sent"] += calls * one.sent
    return sorted(rows.values(), key=lambda row: -row["sent"])
