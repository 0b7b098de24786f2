"""switchlm evaluate: held-out loss by source, or the metrics of tasks, with 95% intervals."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from switchlm.cli import options
from switchlm.cli.progress import counting
from switchlm.cli.results import json_lines
from switchlm.errors import CheckpointError, ConfigError, DataError
from switchlm.files import to_json

if TYPE_CHECKING:
    from switchlm.data.tasks.task import Example, Task
    from switchlm.evaluation.baselines import Baselines
    from switchlm.evaluation.tasks import TaskScore

    Work = Sequence[tuple[Task, Sequence[Example]]]

Result = dict[str, Any]
# `value`, `interval` (both ends of the 95% interval), and of tasks `baselines` by name.
Estimate = dict[str, Any]
Estimates = dict[tuple[str, str], Estimate]  # by (data, metric)
Notes = Mapping[str, str]  # last column of the table, by data

AVERAGE = "average"
_OF_TEXT = ("batches",)
_OF_TASKS = (
    *("split", "limit", "predictions", "rank_labels", "max_new_tokens", "skip_special"),
    *("input_column", "target_column", "template", "target_template", "metric"),
    *("label", "skip_empty"),
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
        int | None, typer.Option(min=1, help="The most examples per task, spread evenly.")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Write every output to this JSONL file.")
    ] = None,
    rank_labels: Annotated[
        bool, typer.Option("--rank-labels", help="Take the most likely label.")
    ] = False,
    skip_special: options.SkipSpecial = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of an output; as the longest reference if left out.")
    ] = None,
    input_column: options.InputColumn = None,
    target_column: options.TargetColumn = None,
    template: options.Template = None,
    target_template: options.TargetTemplate = None,
    metric: options.Metrics = None,
    label: options.Labels = None,
    skip_empty: options.SkipEmpty = False,
    batches: options.Batches = 20,
    batch_size: options.BatchSize = None,
    input_length: options.InputLength = None,
    cache: options.Cache = None,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    expert_memory: options.ExpertMemory = None,
    as_json: options.Json = False,
) -> None:
    """Measure the loss of models on text by source, or their scores on tasks.

    Without --task the text is all of --data, or by default the run's own held-out text. With --task
    outputs are generated for examples, read from --data or the hub. Intervals are of 95%, from
    resampling rows of text, or examples (related ones together).
    """
    _refuse_unused(context, bool(task))
    if task:
        tasks = options.find_tasks(
            task,
            metric,
            model,
            input_column=input_column,
            target_column=target_column,
            template=template,
            target_template=target_template,
            labels=tuple(label) if label else None,
            skip_empty=skip_empty or None,
        )
        work = _read_tasks(tasks, options.task_paths(tasks, data), split, limit)
        results = _score(
            model,
            work,
            predictions,
            device=device,
            expert_memory=expert_memory,
            dtype=dtype,
            input_length=input_length,
            batch_size=batch_size or 32,
            max_new_tokens=max_new_tokens,
            rank_labels=rank_labels,
            skip_special=skip_special,
        )
        notes = {task.name: f"{len(examples):,} examples" for task, examples in work}
        _present(results, [_task_estimates(result) for result in results], notes, as_json)
        return
    rows = {
        "batches": batches,
        "batch_size": batch_size,
        "input_length": input_length,
        "cache": cache,
    }
    results = [_measure(one, data, device, expert_memory, dtype, **rows) for one in model]
    _check_same_texts(results)
    notes = {
        name: f"perplexity {part['perplexity']:.2f}, {_bits(part)}{part['tokens']:,} tokens"
        for name, part in {**results[0]["sources"], "all": results[0]}.items()
    }
    _present(results, [_text_estimates(result) for result in results], notes, as_json)


def _refuse_unused(context: typer.Context, on_tasks: bool) -> None:
    """Raise ConfigError for an option that has no effect."""
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
    """Raise DataError if runs held out different texts."""
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
    device: str,
    expert_memory: str | None,
    dtype: options.Precision | None,
    **rows: Any,
) -> Result:
    """Return the loss of a model on text, in total and by source.

    rows: options of `read_batches`.
    """
    from switchlm.evaluation.evaluator import held_out_loss, perplexity
    from switchlm.evaluation.metrics import RESAMPLES
    from switchlm.generation.decode import NOT_FINITE

    loaded, tokenizer = options.open_model(model, device, expert_memory, dtype)
    usage = options.Usage(loaded)
    read, names, settings = options.read_batches(model, tokenizer, data, **rows)
    with usage.timed():
        result = held_out_loss(loaded, read, names, resamples=RESAMPLES, tokenizer=tokenizer)
    usage.print()
    if not math.isfinite(result["loss"]):
        raise CheckpointError(f"The loss of {model!r} is {result['loss']}. {NOT_FINITE}")
    for part in (result, *result["sources"].values()):
        part["perplexity"] = perplexity(part["loss"])
    if expert_memory is not None:
        result["experts"] = usage.metrics()
    return {"model": model, "settings": settings, **result}


def _bits(part: Result) -> str:
    bits = part["bits_per_byte"]
    return "" if bits is None else f"{bits:.3f} bits per byte, "


def _text_estimates(result: Result) -> Estimates:
    parts = {**result["sources"], **({"all": result} if len(result["sources"]) > 1 else {})}
    return {
        (name, "loss"): {"value": part["loss"], "interval": part["interval"]}
        for name, part in parts.items()
    }


def _read_tasks(
    tasks: "Sequence[Task]",
    paths: dict[str, Path | None],
    split: str | None,
    limit: int | None,
) -> "Work":
    """Return the examples of each task, spread evenly over the split if they are limited."""
    from switchlm.data.tasks.mixture import EVERYTHING, read_examples, spread_evenly

    found = []
    for task in tasks:
        path = paths[task.name]
        is_file = path is not None and path.is_file()
        part = split or (EVERYTHING if is_file else "validation")
        examples = read_examples(task, part, path, options.note)
        found.append((task, spread_evenly(examples, limit)))
    return found


def _score(
    models: Sequence[str],
    work: "Work",
    predictions: Path | None,
    *,
    device: str,
    expert_memory: str | None,
    dtype: options.Precision | None,
    input_length: int | None,
    **settings: Any,
) -> list[Result]:
    """Return the scores of every model on every task.

    input_length: None takes that of the model's fine-tuning, or 512.
    settings: options of `score_task`.
    """
    from switchlm.evaluation.baselines import baselines
    from switchlm.evaluation.tasks import score_task

    known = {task.name: baselines(task, examples) for task, examples in work}
    results = []
    with json_lines(predictions, "prediction", "--predictions") as write:
        for model in models:
            loaded, tokenizer = options.open_model(model, device, expert_memory, dtype)
            usage = options.Usage(loaded)
            settings["input_length"] = input_length or _trained_length(model)
            options.note(f"{model}: inputs of up to {settings['input_length']:,} tokens.")
            result: Result = {"model": model, "settings": dict(settings), "tasks": {}}
            for task, examples in work:
                with counting(task.name, len(examples)) as report, usage.timed():
                    found = score_task(loaded, tokenizer, task, examples, report=report, **settings)
                _note_limits(found, settings["input_length"])
                result["tasks"][task.name] = _as_json(found, known[task.name], len(examples))
                _note_baselines(found, known[task.name])
                for example, prediction in zip(examples, found.predictions, strict=True):
                    write(
                        {
                            "model": model,
                            "task": task.name,
                            "input": example.input,
                            "target": example.target,
                            "prediction": prediction,
                            "references": example.references,
                        }
                    )
            if len(work) > 1:
                result[AVERAGE] = _average(result["tasks"])
            usage.print()
            if expert_memory is not None:
                result["experts"] = usage.metrics()
            results.append(result)
    return results


def _task_estimates(result: Result) -> Estimates:
    """Return the metrics of a result by (task, metric)."""
    found = {
        (task, metric): {**estimate, "baselines": _of_metric(part["baselines"], metric)}
        for task, part in result["tasks"].items()
        for metric, estimate in part["metrics"].items()
    }
    return found | ({("all", AVERAGE): {"value": result[AVERAGE]}} if AVERAGE in result else {})


def _of_metric(baselines: Result, metric: str) -> dict[str, float]:
    """Return the baselines of one metric by the names they are shown with."""
    named = {"most frequent answer": baselines["majority"], "chance": baselines["chance"]}
    return {name: values[metric] for name, values in named.items() if values is not None}


def _trained_length(model: str) -> int:
    """Return the input length that a model was fine-tuned with; 512 for others."""
    from switchlm.recipes.trained_with import trained_with

    return int(trained_with(model).get("finetune", {}).get("input_length", 512))


def _as_json(found: "TaskScore", known: "Baselines", num_examples: int) -> Result:
    return {
        "examples": num_examples,
        "truncated_inputs": found.truncated_inputs,
        "unfinished": found.unfinished,
        "metrics": {
            name: {"value": interval.value, "interval": [interval.low, interval.high]}
            for name, interval in found.metrics.items()
        },
        "baselines": vars(known),
    }


def _note_baselines(found: "TaskScore", known: "Baselines") -> None:
    """Say if the model is no better than an answer that reads no input."""
    metric, score = next(iter(found.metrics.items()))
    best = known.best(metric)
    if score.low > best:
        return
    how = "guessing" if best > known.majority[metric] else f"always answering {known.answer[:60]!r}"
    clearly = "" if score.value <= best else "clearly "
    options.note(
        f"{found.task}: {metric} {score.value:.2f} is not {clearly}better than the {best:.2f} of "
        f"{how}, without reading the input."
    )


def _note_limits(found: "TaskScore", input_length: int) -> None:
    if found.truncated_inputs:
        options.note(
            f"{found.task}: {found.truncated_inputs:,} inputs were cut to {input_length:,} tokens; "
            "raise --input-length to read all of them."
        )
    if found.unfinished:
        options.note(
            f"{found.task}: {found.unfinished:,} outputs were cut off at --max-new-tokens, or at "
            "the length of the longest reference."
        )


def _average(tasks: Result) -> float:
    """Return the mean over tasks of the mean of their metrics, as in GLUE and SuperGLUE."""
    means = [
        statistics.fmean(estimate["value"] for estimate in part["metrics"].values())
        for part in tasks.values()
    ]
    return statistics.fmean(means)


def _present(
    results: list[Result], estimates: list[Estimates], notes: Notes, as_json: bool
) -> None:
    """Show one result, or several with their mean and standard deviation.

    Results of different settings, such as other lengths, have no mean.
    """
    alike = all(result["settings"] == results[0]["settings"] for result in results)
    if not alike:
        options.note(
            "The models were measured with different settings, so their results do not compare and "
            "have no mean: give --input-length, or models that were trained alike."
        )
    if len(results) == 1:
        if as_json:
            typer.echo(to_json(results[0]))
        else:
            _show_one(estimates[0], notes)
    elif as_json:
        summary = summarise(estimates) if alike else None
        typer.echo(to_json({"models": results, "summary": summary}))
    else:
        _show_several([result["model"] for result in results], estimates, alike)


def summarise(models: Sequence[Estimates]) -> dict[str, dict[str, Estimate]]:
    """Return the mean and the sample standard deviation over models of every metric."""
    found: dict[str, dict[str, Estimate]] = {}
    for on, metric in models[0]:
        values = [estimates[on, metric]["value"] for estimates in models]
        found.setdefault(on, {})[metric] = {
            "mean": statistics.fmean(values),
            "std": statistics.stdev(values),
            "values": values,
        }
    return found


def _show_one(estimates: Estimates, notes: Notes) -> None:
    """Print the metrics of one model."""
    table = Table()
    for column in ("", "metric"):
        table.add_column(column, no_wrap=True)
    for column in ("value", "95% interval"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("of")
    for (on, metric), estimate in estimates.items():
        value = _number(metric, estimate["value"])
        of = notes.get(on, "")
        for name, baseline in estimate.get("baselines", {}).items():
            of += f"\n{name} {baseline:.2f}"
        table.add_row(on, metric, value, _interval(metric, estimate), of)
    Console().print(table)


def _show_several(names: Sequence[str], models: Sequence[Estimates], alike: bool) -> None:
    """Print one row per model, then, if they compare, the mean and the standard deviation."""
    table = Table()
    table.add_column("model")
    for on, metric in models[0]:
        table.add_column(f"{on}\n{metric}", justify="right")
    for place, (name, estimates) in enumerate(zip(names, models, strict=True), start=1):
        cells = [
            f"{_number(metric, estimate['value'])}\n{_interval(metric, estimate)}"
            for (_, metric), estimate in estimates.items()
        ]
        table.add_row(name, *cells, end_section=place == len(names))
    known = [estimate.get("baselines", {}) for estimate in models[0].values()]
    for name in dict.fromkeys(name for baselines in known for name in baselines):
        cells = [f"{one[name]:.2f}" if name in one else "" for one in known]
        table.add_row(name, *cells)
    summary = summarise(models)
    for title, key in (("mean", "mean"), ("standard deviation", "std")) if alike else ():
        cells = [_number(metric, summary[on][metric][key]) for on, metric in models[0]]
        table.add_row(title, *cells)
    Console().print(table)


def _number(metric: str, value: float) -> str:
    """Return losses with four decimals, and percentages with two."""
    return f"{value:.4f}" if metric.startswith("loss") else f"{value:.2f}"


def _interval(metric: str, estimate: Estimate) -> str:
    return " to ".join(_number(metric, end) for end in estimate.get("interval", ()))
