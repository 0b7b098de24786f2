"""switchlm finetune: train a model on tasks, and keep the best."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from switchlm.cli.options import Metrics, TargetTemplate, Tasks, Template
from switchlm.cli.progress import Progress, stop_on_signal
from switchlm.config import read_yaml
from switchlm.errors import ConfigError


def finetune(
    out: Annotated[Path, typer.Option(help="The run's folder.")],
    model: Annotated[
        str | None, typer.Option(help="A run, a model folder, or a name on the hub.")
    ] = None,
    task: Tasks = None,
    data: Annotated[
        str | None, typer.Option(help="The folder or file of a named task; else the hub.")
    ] = None,
    input_column: Annotated[
        str | None, typer.Option(help="Of a file of yours: the column to read.")
    ] = None,
    target_column: Annotated[
        str | None, typer.Option(help="Of a file of yours: the column to write.")
    ] = None,
    template: Template = None,
    target_template: TargetTemplate = None,
    metric: Metrics = None,
    trainable: Annotated[
        str | None, typer.Option(help="all, non-expert, expert or router parameters.")
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="Train low-rank adapters of that rank only.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML configuration.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting: training.steps=500.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint in OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print metrics as JSON lines.")] = False,
) -> None:
    """Fine-tune a model on tasks, and keep the checkpoint that does best at them."""
    from switchlm.parallel.launch import launched
    from switchlm.recipes.finetune import finetune as recipe
    from switchlm.recipes.finetune_config import finetune_run

    if resume and config is None and (out / "config.yaml").exists():
        config = out / "config.yaml"
    columns = {
        "input_column": input_column,
        "target_column": target_column,
        "template": template,
        "target_template": target_template,
        "metrics": metric,
    }
    options: dict[str, Any] = {
        "model": model,
        "tasks": task,
        "data": data,
        "columns": {name: value for name, value in columns.items() if value} or None,
        "trainable": trainable,
        "lora_rank": lora_rank,
    }
    values = {} if config is None else read_yaml(config)
    if resume and config == out / "config.yaml" and "finetune" not in values:
        raise ConfigError(f"The run in {str(out)!r} is no fine-tuning: choose another --out.")
    run = finetune_run(
        values,
        stated={name: value for name, value in options.items() if value is not None},
        overrides=set_ or (),
    )
    launch = launched()
    is_main = launch is None or launch.rank == 0
    console = Console(stderr=as_json, quiet=not is_main)
    progress = Progress(console, steps=run.training.steps, seconds=run.training.seconds)
    last: dict[str, Any] = {}
    with stop_on_signal() as should_stop:
        events = recipe(run, out, resume=resume, should_stop=should_stop, report=progress.say)
        for event in progress.watch(events):
            if "best_score" in event:
                last = event
            if as_json and is_main and "step" in event:
                typer.echo(json.dumps(event))
    if last:
        console.print(f"Best score: {last['best_score']:.2f}% at step {last['best_step']:,}.")
    console.print(f"Model: {out / 'model'}   Report: {out / 'report.html'}")
