"""switchlm compare: the same text and budget, dense twin against sparse."""

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from switchlm.cli.progress import Progress, stop_on_signal
from switchlm.errors import ConfigError


def parse_duration(text: str) -> float:
    """Return seconds of `90s`, `6m`, `1.5h` or a plain number of seconds."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "s")
    try:
        seconds = float(number) * units[unit]
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"Cannot read the duration {text!r}; write for example 90s, 6m or 1.5h.")
    return seconds


def compare(
    out: Annotated[Path, typer.Option(help="Folder for both runs, compare.json and report.html.")],
    config: Annotated[
        Path | None, typer.Argument(help="YAML configuration; the demo's where left out.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Text: [name=]path[:weight], python:stdlib, ...")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="A model by name.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting: training.steps=500.")
    ] = None,
    set_dense: Annotated[
        list[str] | None, typer.Option(help="Override a setting of the dense twin alone.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Wall time for everything, such as 6m or 30m.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier comparison in OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Race a Switch Transformer against its FLOP-matched dense twin on the same text."""
    from switchlm.recipes import compare as recipe

    seconds = None if budget is None else parse_duration(budget)
    pair = recipe.configure(
        path=config,
        preset=preset,
        sources=data or (),
        overrides=set_ or (),
        dense_overrides=set_dense or (),
        by_time=seconds is not None,
    )
    result_file = out / "compare.json"
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise ConfigError(f"{str(out)!r} is not empty. Choose another --out, or --overwrite.")
        if not (result_file.exists() or (out / "dense").exists()):
            raise ConfigError(f"{str(out)!r} holds no comparison; it is not overwritten.")
        shutil.rmtree(out)

    console = Console(stderr=as_json)
    steps = None if seconds is not None else pair.sparse.training.steps
    progress = Progress(console, steps=steps, seconds=seconds)
    result: dict = {}
    with stop_on_signal() as should_stop:
        events = recipe.compare(
            pair, out, seconds=seconds, should_stop=should_stop, report=progress.say
        )
        for event in progress.watch(events):
            result = event.get("result", result)
    if as_json:
        typer.echo(json.dumps(result))
        return
    table = Table()
    rows = recipe.result_table(result)
    for column in rows[0]:
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    for label, text in result["example"].items():
        console.print(f"\n[dim]{label}[/dim]")
        console.print(text, markup=False, highlight=False)
    console.print(f"\n{recipe.headline(result)}", style="bold", highlight=False)
    console.print(f"Report: {out / 'report.html'}   Models: {out}/sparse/model, {out}/dense/model")
