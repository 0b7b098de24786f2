"""switchlm plan: every layout of a model on a cluster that fits, the fastest first, and why."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from switchlm.cli.options import Json
from switchlm.cli.shapes import BatchTokens, Set, batch_config, traffic_mapping

if TYPE_CHECKING:
    from switchlm.planning.hardware import Cluster
    from switchlm.planning.layouts import Layout, Plan
    from switchlm.recipes.config import RunConfig


def plan(
    config: Annotated[Path | None, typer.Argument(help="YAML configuration.")] = None,
    preset: Annotated[str | None, typer.Option(help="A model by name.")] = None,
    nodes: Annotated[int, typer.Option(help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs in each.")] = 8,
    gpu: Annotated[str, typer.Option(help="a100-80gb, h100, h200 or b200.")] = "h200",
    memory: Annotated[
        float | None, typer.Option(help="GB per GPU, instead of the table's.")
    ] = None,
    network: Annotated[float, typer.Option(help="GB/s between nodes, a GPU.")] = 50.0,
    link: Annotated[
        float | None, typer.Option(help="GB/s within a node, a GPU and direction.")
    ] = None,
    utilisation: Annotated[
        float, typer.Option(help="Share of the peak that products reach.")
    ] = 0.5,
    batch_tokens: BatchTokens = None,
    design: Annotated[
        bool, typer.Option("--design", help="Choose the number of experts, too.")
    ] = False,
    show: Annotated[int, typer.Option(min=1, help="Layouts to print.")] = 10,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Find the fastest layout of a model on a cluster, and what it takes."""
    from switchlm.planning.hardware import Cluster, find_gpu

    kind = find_gpu(gpu)
    if memory is not None:
        kind = dataclasses.replace(kind, memory=memory * 1e9)
    if link is not None:
        kind = dataclasses.replace(kind, link=link * 1e9)
    cluster = Cluster(
        gpu=kind,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        network=network * 1e9,
        utilisation=utilisation,
    )
    run = batch_config(config, preset, set_, batch_tokens)
    console = Console(stderr=as_json)
    if design:
        _design(run, cluster, console, as_json)
        return
    from switchlm.planning.layouts import plan as recipe

    with console.status(f"Judging the layouts of {cluster.num_gpus} GPUs"):
        found = recipe(run, cluster)
    if as_json:
        typer.echo(json.dumps(_mapping(found)))
        return
    if found.layouts:
        console.print(_table(found.layouts[:show]))
        console.print(_memory(found.layouts[0]), highlight=False)
        console.print(_traffic_table(found.layouts[0]))
    console.print(found.reason, highlight=False)
    console.print(_counts(found), style="dim", highlight=False)


def _counts(found: "Plan") -> str:
    from switchlm.planning.layouts import words

    text = f"{len(found.layouts)} layouts fit, {len(found.misfits)} need more memory"
    if found.misfits:
        nearest = found.misfits[0]
        text += f" (the nearest, {words(nearest.mesh)}, {nearest.missing / 1e9:.3g} GB per GPU)"
    return f"{text}, {found.impossible} do not divide the model or the batch."


def _table(layouts: "tuple[Layout, ...]") -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("replicas", "data", "expert", "tensor", "GB per GPU", "ms per step", "tokens/s"):
        table.add_column(column, justify="right")
    for layout in layouts:
        mesh = layout.mesh
        table.add_row(
            *(str(size) for size in (mesh.replicas, mesh.data, mesh.expert, mesh.tensor)),
            f"{layout.peak.total / 1e9:.2f}",
            f"{1e3 * layout.times.step:.1f}",
            f"{layout.tokens_per_second:,.0f}",
        )
    return table


def _memory(layout: "Layout") -> str:
    parts = dataclasses.asdict(layout.peak).items()
    return "The first, GB per GPU: " + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts)


def _traffic_table(layout: "Layout") -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", title_justify="left")
    table.title = f"The first, a GPU and step: {layout.flops / 1e12:.4g} TFLOPs, and"
    for column in ("collective", "axes", "dtype"):
        table.add_column(column)
    for column in ("calls", "payload GB", "sent GB"):
        table.add_column(column, justify="right")
    for row in traffic_mapping(layout.traffic):
        table.add_row(
            row["kind"],
            row["axes"],
            row["dtype"],
            f"{row['calls']}",
            f"{row['payload'] / 1e9:.4f}",
            f"{row['sent'] / 1e9:.4f}",
        )
    return table


def _mapping(found: "Plan") -> dict[str, Any]:
    return {
        "reason": found.reason,
        "layouts": [_layout_mapping(layout) for layout in found.layouts],
        "misfits": [
            {"mesh": dataclasses.asdict(misfit.mesh), "missing": misfit.missing}
            for misfit in found.misfits
        ],
        "impossible": found.impossible,
    }


def _layout_mapping(layout: "Layout") -> dict[str, Any]:
    return {
        "mesh": dataclasses.asdict(layout.mesh),
        "rows": layout.rows,
        "memory": {**dataclasses.asdict(layout.peak), "total": layout.peak.total},
        "flops": layout.flops,
        "traffic": traffic_mapping(layout.traffic),
        "seconds": {**dataclasses.asdict(layout.times), "step": layout.times.step},
        "tokens_per_second": layout.tokens_per_second,
    }


def _design(run: "RunConfig", cluster: "Cluster", console: Console, as_json: bool) -> None:
    from switchlm.planning.layouts import design, words

    with console.status("Planning every number of experts"):
        choices = design(run, cluster)
    if as_json:
        found = [
            {
                "num_experts": choice.num_experts,
                "parameters": choice.parameters,
                "best": None if choice.best is None else _layout_mapping(choice.best),
                "reason": choice.reason,
                "chosen": choice.chosen,
            }
            for choice in choices
        ]
        typer.echo(json.dumps({"choices": found}))
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("experts", "parameters", "GB per GPU", "ms", "tokens/s"):
        table.add_column(column, justify="right")
    table.add_column("best layout")
    for choice in choices:
        best = choice.best
        if best is None:
            cells = ["", "", "", "nothing fits"]
        else:
            cells = [
                f"{best.peak.total / 1e9:.1f}",
                f"{1e3 * best.times.step:.1f}",
                f"{best.tokens_per_second:,.0f}",
                words(best.mesh),
            ]
        style = "bold" if choice.chosen else None
        table.add_row(f"{choice.num_experts}", f"{choice.parameters:,}", *cells, style=style)
    console.print(table)
    for choice in choices:
        if choice.chosen:
            console.print(
                f"Take {choice.num_experts} experts: the most whose step takes at most a tenth "
                f"longer than the shortest. {choice.reason}",
                highlight=False,
            )
    if not any(choice.chosen for choice in choices):
        console.print(choices[0].reason, highlight=False)
