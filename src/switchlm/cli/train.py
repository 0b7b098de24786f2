"""switchlm pretrain, finetune, distill and compare: training runs under the live display."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from switchlm.cli import options
from switchlm.cli.progress import follow
from switchlm.errors import ConfigError
from switchlm.files import to_json


def pretrain(
    out: options.Run,
    config: options.Config = None,
    data: options.Data = None,
    preset: options.Preset = None,
    init_from: Annotated[
        str | None,
        typer.Option(
            help="Start from this model's weights and vocabulary: of equal shape, or dense "
            "(sparse upcycling). Its shape is the default."
        ),
    ] = None,
    device: options.TrainingDevice = None,
    cache: options.Cache = None,
    set_: options.Set = None,
    resume: options.Resume = False,
    as_json: options.JsonLines = False,
) -> None:
    """Pre-train a Switch Transformer, or a dense model, on text."""
    from switchlm.huggingface.load import load_config
    from switchlm.recipes.config import RunConfig, from_sections, run_config, sections_of_run
    from switchlm.recipes.pretrain import pretrain as recipe

    if resume:
        options.check_resumed(out, config, data, set_)
    overrides = options.settings(set_, device, cache)
    if init_from is not None:
        overrides.append(f"init_from={json.dumps(init_from)}")
    base = None
    if before := sections_of_run(out) if resume else None:
        base = from_sections(before)  # what is stated is compared with it
    elif init_from is not None:
        base = RunConfig(model=load_config(init_from, report=options.note, to_train=True))
    run = run_config(
        base,
        preset=preset,
        values=options.read_sections(config),
        sources=data or (),
        overrides=overrides,
    )
    console, _ = follow(
        partial(recipe, run, out, resume=resume),
        steps=run.training.steps,
        seconds=run.training.seconds,
        as_json=as_json,
    )
    show_results(console, out)


def finetune(
    out: options.Run,
    model: options.OptionalModel = None,
    task: options.Tasks = None,
    data: Annotated[
        str | None, typer.Option(help="The folder or file of a named task; else the hub.")
    ] = None,
    input_column: options.InputColumn = None,
    target_column: options.TargetColumn = None,
    template: options.Template = None,
    target_template: options.TargetTemplate = None,
    metric: options.Metrics = None,
    label: options.Labels = None,
    skip_empty: options.SkipEmpty = False,
    trainable: Annotated[
        str | None, typer.Option(help="all, non-expert, expert or router parameters.")
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="Train only low-rank adapters of this rank.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML configuration.")] = None,
    device: options.TrainingDevice = None,
    set_: options.Set = None,
    resume: options.Resume = False,
    as_json: options.JsonLines = False,
) -> None:
    """Fine-tune a model on tasks, and keep the best checkpoint by their metrics."""
    from switchlm.recipes.config import merge_sections, sections_of_run
    from switchlm.recipes.finetune import beside_baseline
    from switchlm.recipes.finetune import finetune as recipe
    from switchlm.recipes.finetune_config import finetune_run

    if resume:
        options.check_resumed(out, config, model)
    values = sections_of_run(out) if resume else {}
    if values and "finetune" not in values:
        raise ConfigError(
            f"The run in {str(out)!r} is not a fine-tuning run; choose another --out."
        )
    values = merge_sections(values, options.read_sections(config))
    columns = options.given(
        input_column=input_column,
        target_column=target_column,
        template=template,
        target_template=target_template,
        metrics=metric,
        labels=label,
        skip_empty=skip_empty or None,
    )
    stated = options.given(
        model=model,
        tasks=task,
        data=data,
        columns=columns or None,
        trainable=trainable,
        lora_rank=lora_rank,
    )
    run = finetune_run(values, stated=stated, overrides=options.settings(set_, device))
    console, last = follow(
        partial(recipe, run, out, resume=resume),
        steps=run.training.steps,
        seconds=run.training.seconds,
        as_json=as_json,
    )
    if "best_score" in last:
        console.print(
            f"Best score: {last['best_score']:.2f}% at step {last['best_step']:,}."
            f"{beside_baseline(last)}",
            highlight=False,
        )
    show_results(console, out)


def distill(
    out: options.Run,
    teacher: options.OptionalModel = None,
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
            help="Text, as for pretrain, or the folder or file of a task; the teacher's own "
            "training data if left out."
        ),
    ] = None,
    task: options.Tasks = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="A dense model trained without a teacher, or its held-out loss."),
    ] = None,
    cache_logits: Annotated[
        Path | None, typer.Option(help="Cache the teacher's logits in this folder.")
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, help="The teacher's most probable tokens per target; 32 in a cache."),
    ] = None,
    device: options.TrainingDevice = None,
    cache: options.Cache = None,
    set_: options.Set = None,
    resume: options.Resume = False,
    as_json: options.Json = False,
) -> None:
    """Distil a large model into a small one."""
    from switchlm.recipes import distill_config
    from switchlm.recipes.distill import distill as recipe
    from switchlm.recipes.distill import headline
    from switchlm.training.run_folder import RunFolder

    if resume:
        options.check_resumed(out, teacher)
    logits = None if cache_logits is None else str(cache_logits)
    stated = options.given(baseline=baseline, cache_logits=logits, top_k=top_k)
    overrides = options.settings(set_, device, cache)
    if resume and RunFolder(out).exists():
        fixed = {"--teacher": teacher, "--student": student, "--data": data, "--task": task}
        for option, value in fixed.items():
            if value:
                raise ConfigError(
                    f"{option} is given with --resume, but the run in {str(out)!r} has its own. "
                    f"Leave {option} out, or start another run."
                )
        config = distill_config.resumed(out, overrides, **stated)
    elif teacher is None:
        raise ConfigError("There is no teacher: give one with --teacher.")
    else:
        config = distill_config.configure(
            teacher=teacher,
            student=student or "dense",
            sources=data or (),
            tasks=task or (),
            overrides=overrides,
            **stated,
        )
    console, last = follow(
        partial(recipe, config, out, resume=resume),
        steps=config.run.training.steps,
        seconds=config.run.training.seconds,
        as_json=as_json,
        lines=False,
    )
    if "result" not in last:
        return
    if as_json:
        typer.echo(to_json(last["result"]))
        return
    console.print(headline(last["result"]), style="bold", highlight=False)
    show_results(console, out)


def show_results(console: Console, out: Path) -> None:
    """Print where the model and the report of a run are; a run may end before it has them."""
    paths = {"Model": out / "model", "Report": out / "report.html"}
    found = [f"{name}: {path}" for name, path in paths.items() if path.exists()]
    console.print("   ".join(found), markup=False, highlight=False)


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
        Path | None, typer.Argument(help="YAML configuration; the demo's if left out.")
    ] = None,
    data: options.Data = None,
    preset: options.Preset = None,
    device: options.TrainingDevice = None,
    cache: options.Cache = None,
    set_: options.Set = None,
    set_dense: Annotated[
        list[str] | None, typer.Option(help="Override a setting of the dense twin alone.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Wall time in total, such as 6m or 30m.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier comparison in OUT.")] = False,
    as_json: options.Json = False,
) -> None:
    """Compare a Switch Transformer with its FLOP-matched dense twin on the same text."""
    from switchlm.recipes import compare as recipe

    seconds = None if budget is None else parse_duration(budget)
    pair = recipe.configure(
        path=config,
        preset=preset,
        sources=data or (),
        overrides=options.settings(set_, device, cache),
        dense_overrides=set_dense or (),
        by_time=seconds is not None,
    )
    console, last = follow(
        partial(recipe.compare, pair, out, overwrite=overwrite, seconds=seconds),
        steps=None if seconds is not None else pair.sparse.training.steps,
        seconds=seconds,
        as_json=as_json,
        lines=False,
        of_training=False,
    )
    result = last["result"]
    if as_json:
        typer.echo(to_json(result))
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
