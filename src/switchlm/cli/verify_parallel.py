"""switchlm verify-parallel: every layout of so many processes against one process."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from switchlm.config import read_yaml

if TYPE_CHECKING:
    from switchlm.recipes.verify_parallel import LayoutResult


def verify_parallel(
    config: Annotated[Path | None, typer.Argument(help="YAML configuration.")] = None,
    preset: Annotated[str | None, typer.Option(help="A model by name.")] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Processes.")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Training steps a layout.")] = 3,
    tokens: Annotated[int, typer.Option(min=4, help="Inputs in a row.")] = 48,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting: model.num_experts=8.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Compare every layout over many processes with one process."""
    from switchlm.recipes.config import run_config
    from switchlm.recipes.verify_parallel import verify_parallel as recipe

    values = {} if config is None else read_yaml(config)
    run = run_config(preset=preset, values=values, overrides=set_ or ())
    console = Console(stderr=as_json)
    results = []
    with console.status("Training in one process") as status:
        for result in recipe(run, nproc, steps=steps, tokens=tokens):
            results.append(result)
            status.update(f"{len(results)} layouts done")
            if as_json:
                typer.echo(json.dumps(dataclasses.asdict(result)))
    fitting = [result for result in results if result.does_not_fit is None]
    console.print(_table(fitting))
    for reason in sorted({result.does_not_fit for result in results if result.does_not_fit}):
        console.print(f"Left out: {reason}", style="dim", highlight=False)
    different = [result for result in fitting if not result.equal]
    console.print(
        f"{len(fitting) - len(different)} of {len(fitting)} layouts equal one process "
        "(relative differences of losses and gradients)."
    )
    if different:
        raise typer.Exit(1)


def _table(results: "list[LayoutResult]") -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("replicas", "data", "expert", "tensor", "loss", "gradient", "seconds"):
        table.add_column(column, justify="right")
    table.add_column("")
    for result in results:
        mesh = result.mesh
        table.add_row(
            *(str(size) for size in (mesh.replicas, mesh.data, mesh.expert, mesh.tensor)),
            f"{result.loss:.1e}",
            f"{result.gradient:.1e}",
            f"{result.seconds:.1f}",
            "equal" if result.equal else f"[red]differs at {result.parameter}",
        )
    return table
