"""How `evaluate` scores models on tasks, and shows their metrics with intervals side by side.

Examples are read once and answered by every model.
"""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from switchlm.cli.expert_memory import Usage
from switchlm.cli.options import note, open_model
from switchlm.config import from_mapping, read_yaml
from switchlm.errors import ConfigError
from switchlm.training.run_folder import RunFolder

if TYPE_CHECKING:
    from switchlm.data.tasks.task import Example, Task
    from switchlm.evaluation.tasks import TaskScore

    Work = Sequence[tuple[Task, Sequence[Example]]]

Figure = dict[str, Any]  # `value`, and `interval`: the two ends of 95%
Figures = dict[tuple[str, str], Figure]  # by what was measured on, and the metric


def summarise(models: Sequence[Figures]) -> dict[str, dict[str, Figure]]:
    """Return mean and standard deviation (of a sample) over models of every figure."""
    found: dict[str, dict[str, Figure]] = {}
    for on, metric in models[0]:
        values = [figures[on, metric]["value"] for figures in models]
        found.setdefault(on, {})[metric] = {
            "mean": statistics.fmean(values),
            "std": statistics.stdev(values),
            "values": values,
        }
    return found


def show_one(figures: Figures, notes: Mapping[str, str]) -> None:
    """Print the figures of one model; notes: a last column, by what was measured on."""
    table = Table()
    for column in ("", "metric", "value", "95% interval"):
        table.add_column(
            column, justify="left" if column in ("", "metric") else "right", no_wrap=True
        )
    table.add_column("of")
    for (on, metric), figure in figures.items():
        value = _number(metric, figure["value"])
        table.add_row(on, metric, value, _interval(metric, figure), notes.get(on, ""))
    Console().print(table)


def show_several(names: Sequence[str], models: Sequence[Figures]) -> None:
    """Print one row per model, and under them the mean and the standard deviation."""
    table = Table()
    table.add_column("model")
    for on, metric in models[0]:
        table.add_column(f"{on}\n{metric}", justify="right")
    for place, (name, figures) in enumerate(zip(names, models, strict=True), start=1):
        cells = [
            f"{_number(metric, figure['value'])}\n{_interval(metric, figure)}"
            for (_, metric), figure in figures.items()
        ]
        table.add_row(name, *cells, end_section=place == len(names))
    summary = summarise(models)
    for title, key in (("mean", "mean"), ("standard deviation", "std")):
        cells = [_number(metric, summary[on][metric][key]) for on, metric in models[0]]
        table.add_row(title, *cells)
    Console().print(table)


def _number(metric: str, value: float) -> str:
    """Losses differ in the third place, per cent in the first."""
    return f"{value:.4f}" if metric.startswith("loss") else f"{value:.2f}"


def _interval(metric: str, figure: Figure) -> str:
    return " to ".join(_number(metric, end) for end in figure.get("interval", ()))


Result = dict[str, Any]
AVERAGE = "average"


def read(
    tasks: "Sequence[Task]",
    places: dict[str, Path | None],
    split: str | None,
    limit: int | None,
) -> "Work":
    """Return the examples of each task, spread evenly over the split where they are limited."""
    from switchlm.data.tasks.mixture import EVERYTHING, read_examples, spread_evenly

    found = []
    for task in tasks:
        place = places[task.name]
        whole = place is not None and place.is_file()
        examples = read_examples(task, split or (EVERYTHING if whole else "validation"), place)
        found.append((task, spread_evenly(examples, limit)))
    return found


def score(
    models: Sequence[str],
    work: "Work",
    predictions: Path | None,
    *,
    device: str,
    expert_memory: str | None,
    input_length: int | None,
    **settings: Any,
) -> list[Result]:
    """Return what every model scores on every task; settings: of `score_task`.

    input_length: None takes what the model was fine-tuned with, or 512.
    """
    from switchlm.evaluation.tasks import score_task

    results = []
    with _opened(predictions) as file:
        for model in models:
            loaded, tokenizer = open_model(model, device, expert_memory)
            usage = Usage(loaded)
            result: Result = {"model": model, "tasks": {}}
            settings["input_length"] = input_length or _trained_length(model)
            for task, examples in work:
                with _counting(task.name, len(examples)) as report, usage.timed():
                    found = score_task(loaded, tokenizer, task, examples, report=report, **settings)
                _tell(found, settings["input_length"])
                result["tasks"][task.name] = _as_json(found, len(examples))
                if file is not None:
                    for line in _lines(model, task.name, examples, found.predictions):
                        file.write(json.dumps(line, ensure_ascii=False) + "\n")
            if len(work) > 1:
                result[AVERAGE] = _average(result["tasks"])
            usage.tell()
            if expert_memory is not None:
                result["experts"] = usage.figures()
            results.append(result)
    return results


def figures(result: Result) -> Figures:
    """Return the figures of a result by (task, metric)."""
    found = {
        (task, metric): figure
        for task, part in result["tasks"].items()
        for metric, figure in part["metrics"].items()
    }
    return found | ({("all", AVERAGE): {"value": result[AVERAGE]}} if AVERAGE in result else {})


def _trained_length(model: str) -> int:
    """Return the tokens of the inputs that a run on tasks learnt from; else 512."""
    from switchlm.recipes.finetune_config import FinetuneConfig

    config = RunFolder(Path(model)).config
    section = read_yaml(config).get("finetune") if config.is_file() else None
    if not section:
        return 512
    return from_mapping(FinetuneConfig, section, "finetune").input_length


@contextmanager
def _opened(path: Path | None) -> Iterator[TextIO | None]:
    if path is None:
        yield None
        return
    try:
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"Cannot write predictions to {str(path)!r}: {error}.") from None
    with file:
        yield file


@contextmanager
def _counting(task: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show on a terminal how many examples are done, and how long the rest will take."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        number = bar.add_task(task, total=total)
        yield lambda done: bar.update(number, completed=done)


def _as_json(found: "TaskScore", num_examples: int) -> Result:
    return {
        "examples": num_examples,
        "truncated_inputs": found.truncated_inputs,
        "unfinished": found.unfinished,
        "metrics": {
            name: {"value": interval.value, "interval": [interval.low, interval.high]}
            for name, interval in found.metrics.items()
        },
    }


def _lines(
    model: str, task: str, examples: "Sequence[Example]", predictions: Sequence[str]
) -> Iterator[Result]:
    for example, prediction in zip(examples, predictions, strict=True):
        yield {
            "model": model,
            "task": task,
            "input": example.input,
            "target": example.target,
            "prediction": prediction,
            "references": example.references,
        }


def _tell(found: "TaskScore", input_length: int) -> None:
    if found.truncated_inputs:
        note(
            f"{found.task}: {found.truncated_inputs:,} inputs were cut to {input_length:,} tokens; "
            "raise --input-length to read them whole."
        )
    if found.unfinished:
        note(
            f"{found.task}: {found.unfinished:,} answers had not ended where --max-new-tokens, or "
            "the longest reference, ended them."
        )


def _average(tasks: Result) -> float:
    """Return the mean over tasks of the mean of their metrics, as GLUE and SuperGLUE report it."""
    means = [
        sum(figure["value"] for figure in part["metrics"].values()) / len(part["metrics"])
        for part in tasks.values()
    ]
    return sum(means) / len(means)
