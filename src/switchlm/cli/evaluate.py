"""switchlm evaluate: held-out loss by source, or the metrics of tasks, with 95% intervals."""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from switchlm.cli import options, score_tasks
from switchlm.cli.expert_memory import ExpertMemorySize, Usage
from switchlm.cli.options import (
    Batches,
    BatchSize,
    Device,
    InputLength,
    Json,
    open_model,
    read_batches,
)
from switchlm.cli.score_tasks import Figures, show_one, show_several, summarise
from switchlm.errors import CheckpointError, ConfigError, DataError

Result = dict[str, Any]
Notes = dict[str, str]

_OF_TEXT = ("batches",)
_OF_TASKS = (
    *("split", "limit", "predictions", "rank_labels", "max_new_tokens"),
    *("input_column", "target_column", "template", "target_template", "metric"),
)


def evaluate(
    context: typer.Context,
    model: Annotated[
        list[str],
        typer.Option(help="A run, a model folder, or a hub name; several are also summarised."),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text: [name=]path[:weight], ...; of tasks: [TASK=]PATH. Repeatable."),
    ] = None,
    task: options.Tasks = None,
    split: Annotated[
        str | None, typer.Option(help="Of tasks; validation if left out, or all of a file.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Score so many examples per task, spread evenly.")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Write every answer to this JSONL file.")
    ] = None,
    rank_labels: Annotated[
        bool, typer.Option("--rank-labels", help="Choose among the labels, by likelihood.")
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of an answer; the longest reference's if left out.")
    ] = None,
    input_column: options.InputColumn = "input",
    target_column: options.TargetColumn = "target",
    template: options.Template = None,
    target_template: options.TargetTemplate = None,
    metric: options.Metrics = None,
    batches: Batches = 20,
    batch_size: BatchSize = None,
    input_length: InputLength = None,
    device: Device = "auto",
    expert_memory: ExpertMemorySize = None,
    as_json: Json = False,
) -> None:
    """Measure the loss of models on text by source, or how well they do tasks.

    Without --task the text is all that --data gives, or what the run held out of its own data. With
    --task the model answers examples, read from --data or from the hub. Intervals are of 95%, from
    resampling rows of text, or examples (those that belong together, together).
    """
    _refuse_idle(context, bool(task))
    if task:
        tasks = options.find(
            task,
            input_column=input_column,
            target_column=target_column,
            template=template,
            target_template=target_template,
            metrics=metric,
        )
        work = score_tasks.read(tasks, options.places(tasks, data), split, limit)
        results = score_tasks.score(
            model,
            work,
            predictions,
            device=device,
            expert_memory=expert_memory,
            input_length=input_length,
            batch_size=batch_size or 32,
            max_new_tokens=max_new_tokens,
            rank_labels=rank_labels,
        )
        notes = {task.name: f"{len(examples):,} examples" for task, examples in work}
        _present(results, [score_tasks.figures(result) for result in results], notes, as_json)
        return
    results = [
        _measure(one, data, batches, batch_size, input_length, device, expert_memory)
        for one in model
    ]
    _check_same_texts(results)
    notes = {
        name: f"perplexity {part['perplexity']:.2f}, {part['tokens']:,} tokens"
        for name, part in {**results[0]["sources"], "all": results[0]}.items()
    }
    _present(results, [_text_figures(result) for result in results], notes, as_json)


def _refuse_idle(context: typer.Context, on_tasks: bool) -> None:
    """Raise ConfigError for an option that was given and would do nothing."""
    for name in _OF_TEXT if on_tasks else _OF_TASKS:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{option} is about text: leave it out with --task."
                if on_tasks
                else f"{option} is about tasks: name one with --task, or leave it out."
            )


def _check_same_texts(results: list[Result]) -> None:
    """Raise DataError where runs held out different texts: their losses do not compare."""
    first = results[0]
    for other in results[1:]:
        if set(other["sources"]) != set(first["sources"]):
            raise DataError(
                f"{first['model']!r} was measured on {', '.join(first['sources'])}, but "
                f"{other['model']!r} on {', '.join(other['sources'])}, which do not compare: give "
                "the text for both with --data."
            )


def _measure(
    model: str,
    data: list[str] | None,
    batches: int,
    batch_size: int | None,
    input_length: int | None,
    device: str,
    expert_memory: str | None,
) -> Result:
    """Return the loss of a model on text, in total and by source."""
    from switchlm.evaluation.evaluator import held_out_loss
    from switchlm.evaluation.metrics import RESAMPLES

    loaded, tokenizer = open_model(model, device, expert_memory)
    usage = Usage(loaded)
    read, names = read_batches(
        model, tokenizer, data, batches=batches, batch_size=batch_size, input_length=input_length
    )
    with usage.timed():
        result = held_out_loss(loaded, read, names, resamples=RESAMPLES)
    usage.tell()
    if not math.isfinite(result["loss"]):
        raise CheckpointError(
            f"The loss of {model!r} is {result['loss']}: its weights are damaged, or too large for "
            "the number format that it computes in."
        )
    for part in (result, *result["sources"].values()):
        part["perplexity"] = math.exp(min(part["loss"], 700.0))
    if expert_memory is not None:
        result["experts"] = usage.figures()
    return {"model": model, **result}


def _text_figures(result: Result) -> Figures:
    parts = {**result["sources"], **({"all": result} if len(result["sources"]) > 1 else {})}
    return {
        (name, "loss"): {"value": part["loss"], "interval": part["interval"]}
        for name, part in parts.items()
    }


def _present(results: list[Result], figures: list[Figures], notes: Notes, as_json: bool) -> None:
    """Show one result as it is; several beside their mean and standard deviation."""
    if len(results) == 1:
        if as_json:
            typer.echo(json.dumps(results[0]))
        else:
            show_one(figures[0], notes)
    elif as_json:
        typer.echo(json.dumps({"models": results, "summary": summarise(figures)}))
    else:
        show_several([result["model"] for result in results], figures)
