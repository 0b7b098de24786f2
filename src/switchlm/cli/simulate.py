"""switchlm simulate: the real training step of one process of thousands, on fake tensors."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from switchlm.cli.options import Json
from switchlm.cli.shapes import BatchTokens, Set, batch_config, traffic_mapping


def simulate(
    config: Annotated[Path | None, typer.Argument(help="YAML configuration.")] = None,
    preset: Annotated[str | None, typer.Option(help="A model by name.")] = None,
    ranks: Annotated[int, typer.Option(help="Processes of the job.")] = 8,
    batch_tokens: BatchTokens = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Run the step of one process of thousands without them, and measure it."""
    from switchlm.planning.estimate import footprint
    from switchlm.planning.simulate import simulate as recipe

    run = batch_config(config, preset, set_, batch_tokens)
    console = Console(stderr=as_json)
    with console.status(f"Simulating {ranks} processes"):
        found = recipe(run, ranks)
        sizes = run.mesh.shape(ranks)
        planned = footprint(run, dataclasses.replace(run.mesh, data=sizes[1]))
    peak, traffic = found.step.peak, Counter(found.step.collectives)
    rows = traffic_mapping(traffic)
    if as_json:
        figures = {
            "ranks": ranks,
            "parameters": found.parameters,
            "rows": found.rows,
            "memory": {**dataclasses.asdict(peak), "total": peak.total},
            "traffic": rows,
            "planned_memory": {**dataclasses.asdict(planned.peak), "total": planned.peak.total},
            "planned_traffic": traffic_mapping(planned.traffic),
            "seconds": found.seconds,
        }
        typer.echo(json.dumps(figures))
        return
    axes = dict(zip(("replicas", "data", "expert", "tensor"), sizes, strict=True))
    mesh = " x ".join(f"{axis} {size}" for axis, size in axes.items())
    console.print(
        f"{found.parameters:,} parameters on {ranks} processes ({mesh}), {found.rows} rows each, "
        f"simulated in {found.seconds:.1f} s.",
        highlight=False,
    )
    memory = Table(box=None, pad_edge=False, header_style="dim")
    memory.add_column("GB at the fullest moment")
    for name in ("weights", "gradients", "optimizer", "activations", "buffers", "total"):
        memory.add_column(name, justify="right")
    for label, one in (("the step", peak), ("the plan", planned.peak)):
        sizes_of = (*dataclasses.astuple(one), one.total)
        memory.add_row(label, *(f"{size / 1e9:.3f}" for size in sizes_of))
    console.print(memory)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("collective", "axes", "dtype"):
        table.add_column(column)
    for column in ("processes", "calls", "payload GB", "sent GB"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["kind"],
            row["axes"],
            row["dtype"],
            f"{row['size']}",
            f"{row['calls']}",
            f"{row['payload'] / 1e9:.6f}",
            f"{row['sent'] / 1e9:.6f}",
        )
    console.print(table)
    if traffic == planned.traffic:
        console.print("The plan gives the same collectives, each of the same size.")
