"""switchlm plan, simulate and verify-parallel: layouts of a model over many processes.

`plan` lists the layouts that fit a cluster; `simulate` runs the step of one process of a layout;
`verify-parallel` runs all processes of every layout. The first two default to the paper's batch
size, and show collectives in the same table.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from switchlm.cli import options
from switchlm.cli.progress import plain_table
from switchlm.files import to_json

if TYPE_CHECKING:
    from switchlm.parallel.mesh import MeshConfig
    from switchlm.planning.cluster import Cluster
    from switchlm.planning.layouts import Choice, Layout, Plan
    from switchlm.planning.recorder import Bytes, Collective
    from switchlm.recipes.config import RunConfig

Traffic = list[dict[str, Any]]
PAPER_BATCH = 2**20  # tokens, of inputs
AXES = ["replicas", "data", "expert", "tensor"]

BatchTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Input tokens per global micro-batch; else as set, or 2^20."),
]


def plan(
    config: options.Config = None,
    preset: options.Preset = None,
    nodes: Annotated[int, typer.Option(help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs in each.")] = 8,
    gpu: Annotated[str, typer.Option(help="a100-40gb, h100, rtx-4090, ...")] = "h200",
    memory: Annotated[
        float | None, typer.Option(help="GB per GPU, instead of the table's.")
    ] = None,
    network: Annotated[float, typer.Option(help="GB/s between nodes, per GPU.")] = 50.0,
    link: Annotated[
        float | None, typer.Option(help="GB/s within a node, per GPU and direction.")
    ] = None,
    utilisation: Annotated[float, typer.Option(help="Share of the peak that matmuls reach.")] = 0.5,
    batch_tokens: BatchTokens = None,
    design: Annotated[
        bool, typer.Option("--design", help="Choose the number of experts, too.")
    ] = False,
    show: Annotated[int, typer.Option(min=1, help="Layouts to print.")] = 10,
    set_: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Find the fastest layout of a model on a cluster, its memory and traffic.

    Exits with status 1 if none fits.
    """
    from switchlm.planning.cluster import Cluster, find_gpu
    from switchlm.planning.layouts import plan as recipe

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
    with console.status(f"Planning the layouts of {cluster.num_gpus} GPUs"):
        found = recipe(run, cluster)
    if as_json:
        typer.echo(to_json(_mapping(found)))
    else:
        _print_plan(found, console, show)
    if not found.layouts:
        raise typer.Exit(1)


def _print_plan(found: "Plan", console: Console, show: int) -> None:
    if found.layouts:
        best = found.layouts[0]
        console.print(_layout_table(found.layouts[:show]))
        sizes = dataclasses.asdict(best.estimate.peak).items()
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in sizes)
        console.print(f"The first, GB per GPU: {parts}", highlight=False)
        title = f"The first, per GPU and step: {best.flops / 1e12:.4g} TFLOPs, and"
        console.print(_traffic_table(_traffic_mapping(best.estimate.traffic), title))
    console.print(found.reason, highlight=False)
    console.print(_counts(found), style="dim", highlight=False)


def simulate(
    config: options.Config = None,
    preset: options.Preset = None,
    ranks: Annotated[int, typer.Option(help="Processes of the job.")] = 8,
    batch_tokens: BatchTokens = None,
    set_: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Simulate the training step of one process of a large job, and measure it."""
    from switchlm.planning.estimate import estimate_step
    from switchlm.planning.simulate import simulate as recipe

    run = batch_config(config, preset, set_, batch_tokens)
    console = Console(stderr=as_json)
    with console.status(f"Simulating {ranks} processes"):
        found = recipe(run, ranks)
        sizes = run.mesh.shape(ranks)
        planned = estimate_step(run, dataclasses.replace(run.mesh, data=sizes[1]))
    traffic = Counter(found.collectives)
    if as_json:
        metrics = {
            "ranks": ranks,
            "parameters": found.parameters,
            "rows": found.rows,
            "memory": _memory_mapping(found.peak),
            "traffic": _traffic_mapping(traffic),
            "planned_memory": _memory_mapping(planned.peak),
            "planned_traffic": _traffic_mapping(planned.traffic),
            "seconds": found.seconds,
        }
        typer.echo(to_json(metrics))
        return
    mesh = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
    console.print(
        f"{found.parameters:,} parameters on {ranks} processes ({mesh}), {found.rows} rows each, "
        f"simulated in {found.seconds:.1f} s.",
        highlight=False,
    )
    memory = plain_table(["GB at the peak"], list(_memory_mapping(found.peak)))
    for label, one in (("the step", found.peak), ("the plan", planned.peak)):
        memory.add_row(label, *(f"{size / 1e9:.3f}" for size in _memory_mapping(one).values()))
    console.print(memory)
    console.print(_traffic_table(_traffic_mapping(traffic)))
    if traffic == planned.traffic:
        console.print("The plan has the same collectives with the same sizes.")


def verify_parallel(
    config: options.Config = None,
    preset: options.Preset = None,
    nproc: Annotated[int, typer.Option(min=1, help="Processes.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Training steps per layout.")] = 3,
    tokens: Annotated[int, typer.Option(min=4, help="Inputs in a row.")] = 48,
    device: options.TrainingDevice = None,
    set_: options.Set = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Compare every layout over many processes with one process."""
    from switchlm.recipes.config import run_config
    from switchlm.recipes.verify_parallel import verify_parallel as recipe

    values = options.read_sections(config)
    run = run_config(preset=preset, values=values, overrides=options.settings(set_, device))
    console = Console(stderr=as_json)
    results = []
    with console.status("Training in one process") as status:
        for result in recipe(run, nproc, steps=steps, tokens=tokens):
            results.append(result)
            status.update(f"{len(results)} layouts done")
            if as_json:
                typer.echo(to_json(dataclasses.asdict(result)))
    fitting = [result for result in results if result.does_not_fit is None]
    table = plain_table([], [*AXES, "loss", "evaluation", "gradient", "seconds"])
    table.add_column("")
    for result in fitting:
        table.add_row(
            *_mesh_cells(result.mesh),
            f"{result.loss:.1e}",
            f"{result.evaluation:.1e}",
            f"{result.gradient:.1e}",
            f"{result.seconds:.1f}",
            "equal" if result.equal else f"[red]differs at {result.parameter}",
        )
    console.print(table)
    for reason in sorted({result.does_not_fit for result in results if result.does_not_fit}):
        console.print(f"Left out: {reason}", style="dim", highlight=False)
    different = [result for result in fitting if not result.equal]
    console.print(
        f"{len(fitting) - len(different)} of {len(fitting)} layouts equal one process "
        "(relative differences of losses, also evaluated, and gradients)."
    )
    if different:
        raise typer.Exit(1)


def batch_config(
    config: Path | None, preset: str | None, overrides: list[str] | None, batch_tokens: int | None
) -> "RunConfig":
    """Resolve a configuration, with data.batch_size of `batch_tokens`, else as set.

    The default is 2^20 input tokens, as in the paper.
    """
    from switchlm.recipes.config import run_config

    values = options.read_sections(config)
    stated = list(overrides or ())
    run = run_config(preset=preset, values=values, overrides=stated)
    is_set = "batch_size" in (values.get("data") or {}) or any(
        one.startswith("data.batch_size=") for one in stated
    )
    if batch_tokens is None and is_set:
        return run
    rows = max((batch_tokens or PAPER_BATCH) // run.data.input_length, 1)
    return run_config(preset=preset, values=values, overrides=[*stated, f"data.batch_size={rows}"])


def _memory_mapping(peak: "Bytes") -> dict[str, int]:
    return {**dataclasses.asdict(peak), "total": peak.total}


def _traffic_mapping(traffic: "Mapping[Collective, int]") -> Traffic:
    """Return one row per kind, axes and dtype: calls, and total bytes of payload and sent."""
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


def _traffic_table(traffic: Traffic, title: str | None = None) -> Table:
    words = ["collective", "axes", "dtype"]
    table = plain_table(words, ["processes", "calls", "payload GB", "sent GB"], title)
    for row in traffic:
        table.add_row(
            row["kind"],
            row["axes"],
            row["dtype"],
            f"{row['size']}",
            f"{row['calls']}",
            f"{row['payload'] / 1e9:.6f}",
            f"{row['sent'] / 1e9:.6f}",
        )
    return table


def _counts(found: "Plan") -> str:
    from switchlm.planning.layouts import describe_mesh

    text = f"{len(found.layouts)} layouts fit, {len(found.misfits)} need more memory"
    if found.misfits:
        nearest = found.misfits[0]
        text += (
            f" (the nearest, {describe_mesh(nearest.mesh)}, {nearest.missing / 1e9:.3g} GB per GPU)"
        )
    return f"{text}, {found.impossible} do not divide the model or the batch."


def _mesh_cells(mesh: "MeshConfig") -> list[str]:
    """Return the cells of the columns `AXES`."""
    return [str(getattr(mesh, axis)) for axis in AXES]


def _layout_table(layouts: "Sequence[Layout]") -> Table:
    table = plain_table([], [*AXES, "GB per GPU", "ms per step", "tokens/s"])
    for layout in layouts:
        table.add_row(
            *_mesh_cells(layout.mesh),
            f"{layout.estimate.peak.total / 1e9:.2f}",
            f"{1e3 * layout.times.step:.1f}",
            f"{layout.tokens_per_second:,.0f}",
        )
    return table


def _mapping(found: "Plan") -> dict[str, Any]:
    return {
        "reason": found.reason,
        "layouts": [_layout_mapping(layout) for layout in found.layouts],
        "misfits": [dataclasses.asdict(misfit) for misfit in found.misfits],
        "impossible": found.impossible,
    }


def _layout_mapping(layout: "Layout") -> dict[str, Any]:
    return {
        "mesh": dataclasses.asdict(layout.mesh),
        "rows": layout.estimate.rows,
        "memory": _memory_mapping(layout.estimate.peak),
        "flops": layout.flops,
        "traffic": _traffic_mapping(layout.estimate.traffic),
        "seconds": {**dataclasses.asdict(layout.times), "step": layout.times.step},
        "tokens_per_second": layout.tokens_per_second,
    }


def _design(run: "RunConfig", cluster: "Cluster", console: Console, as_json: bool) -> None:
    from switchlm.planning.layouts import design

    with console.status("Planning every number of experts"):
        choices = design(run, cluster)
    fits = any(choice.best for choice in choices)
    if as_json:
        found = [
            {**vars(choice), "best": choice.best and _layout_mapping(choice.best)}
            for choice in choices
        ]
        typer.echo(to_json({"choices": found}))
    elif fits:
        _print_choices(choices, console)
    else:
        console.print(f"With {choices[0].num_experts} experts: {choices[0].reason}")
    if not fits:
        raise typer.Exit(1)


def _print_choices(choices: "Sequence[Choice]", console: Console) -> None:
    from switchlm.planning.layouts import describe_mesh

    table = plain_table([], ["experts", "parameters", "GB per GPU", "ms", "tokens/s"])
    table.add_column("best layout")
    advice = choices[0].reason
    for choice in choices:
        best = choice.best
        cells = ["", "", "", "nothing fits"]
        if best is not None:
            cells = [
                f"{best.estimate.peak.total / 1e9:.1f}",
                f"{1e3 * best.times.step:.1f}",
                f"{best.tokens_per_second:,.0f}",
                describe_mesh(best.mesh),
            ]
        style = "bold" if choice.chosen else None
        table.add_row(f"{choice.num_experts}", f"{choice.parameters:,}", *cells, style=style)
        if choice.chosen:
            advice = (
                f"Take {choice.num_experts} experts: the most whose step takes at most a tenth "
                f"longer than the shortest. {choice.reason}"
            )
    console.print(table)
    console.print(advice, highlight=False)
