"""switchlm distill: a sparse teacher into a dense student."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from switchlm.cli.options import Tasks
from switchlm.cli.progress import Progress, stop_on_signal
from switchlm.errors import ConfigError


def distill(
    out: Annotated[Path, typer.Option(help="The run's folder.")],
    teacher: Annotated[
        str | None, typer.Option(help="A run, a model folder, or a name on the hub.")
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(
            help="dense (the teacher's twin of equal FLOPs, the default), a preset, or a model, "
            "which then starts from its own weights."
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text, as for pretrain, or the folder or file of a task; what the teacher was "
            "trained on where left out."
        ),
    ] = None,
    task: Tasks = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="A dense model trained without a teacher, or its held-out loss."),
    ] = None,
    cache_logits: Annotated[
        Path | None, typer.Option(help="Keep what the teacher says here, for other students.")
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=1, help="The teacher names so many tokens for each target; 32 in a cache."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a setting: distillation.feedforward=mean."),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint in OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Teach a small model what a large one knows."""
    from switchlm.parallel.launch import launched
    from switchlm.recipes import distill_config
    from switchlm.recipes.distill import distill as recipe
    from switchlm.recipes.distill import headline

    stated: dict[str, Any] = {
        "baseline": baseline,
        "cache_logits": None if cache_logits is None else str(cache_logits),
        "top_k": top_k,
    }
    stated = {name: value for name, value in stated.items() if value is not None}
    if resume and (out / distill_config.SETTINGS).exists():
        fixed = {"--teacher": teacher, "--student": student, "--data": data, "--task": task}
        for option, value in fixed.items():
            if value:
                raise ConfigError(
                    f"{option} is given with --resume, but the run in {str(out)!r} has its own. "
                    f"Leave {option} out, or start another run."
                )
        config = distill_config.resumed(out, set_ or (), **stated)
    elif teacher is None:
        raise ConfigError("There is no teacher: give one with --teacher.")
    else:
        config = distill_config.configure(
            teacher=teacher,
            student=student or "dense",
            sources=data or (),
            tasks=task or (),
            overrides=set_ or (),
            **stated,
        )
    launch = launched()
    console = Console(stderr=as_json, quiet=launch is not None and launch.rank != 0)
    training = config.run.training
    progress = Progress(console, steps=training.steps, seconds=training.seconds)
    result: dict[str, Any] = {}
    with stop_on_signal() as should_stop:
        events = recipe(config, out, resume=resume, should_stop=should_stop, report=progress.say)
        for event in progress.watch(events):
            result = event.get("result", result)
    if not result:
        return
    if as_json:
        typer.echo(json.dumps(result))
        return
    console.print(headline(result), style="bold", highlight=False)
    console.print(f"Model: {out / 'model'}   Report: {out / 'report.html'}")
