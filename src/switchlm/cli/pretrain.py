"""switchlm pretrain: train a model on text with span corruption."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from switchlm.cli.options import note
from switchlm.cli.progress import Progress, stop_on_signal
from switchlm.config import read_yaml


def pretrain(
    out: Annotated[Path, typer.Option(help="The run's folder.")],
    config: Annotated[Path | None, typer.Argument(help="YAML configuration.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Text: [name=]path[:weight], python:stdlib, ...")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="A model by name.")] = None,
    init_from: Annotated[
        str | None,
        typer.Option(
            help="Start from this model's weights and vocabulary: of equal shape, or dense, whose "
            "networks become all experts. Its shape is the default."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting: training.steps=500.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint in OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print metrics as JSON lines.")] = False,
) -> None:
    """Pre-train a Switch Transformer, or a dense model, on text."""
    from switchlm.huggingface.load import load_config
    from switchlm.parallel.launch import launched
    from switchlm.recipes.config import RunConfig, run_config
    from switchlm.recipes.pretrain import pretrain as recipe

    if resume and config is None and (out / "config.yaml").exists():
        config = out / "config.yaml"
    values = {} if config is None else read_yaml(config)
    overrides = list(set_ or ())
    base = None
    if init_from is not None:
        overrides.append(f"init_from={json.dumps(init_from)}")
        base = RunConfig(model=load_config(init_from, report=note, to_train=True))
    run = run_config(base, preset=preset, values=values, sources=data or (), overrides=overrides)
    launch = launched()
    is_main = launch is None or launch.rank == 0
    console = Console(stderr=as_json, quiet=not is_main)
    progress = Progress(console, steps=run.training.steps, seconds=run.training.seconds)
    with stop_on_signal() as should_stop:
        events = recipe(run, out, resume=resume, should_stop=should_stop, report=progress.say)
        for event in progress.watch(events):
            if as_json and is_main and "step" in event:
                typer.echo(json.dumps(event))
    console.print(f"Model: {out / 'model'}   Report: {out / 'report.html'}")
