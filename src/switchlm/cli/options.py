"""Shared by several commands: options, and functions that open models, texts and tasks."""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from switchlm.config import parse_size
from switchlm.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from switchlm.data.batch import Batch
    from switchlm.data.pretraining.loader import Loader
    from switchlm.data.tasks.task import Task
    from switchlm.data.text.tokenizer import Tokenizer
    from switchlm.model.transformer import SwitchTransformer

Config = Annotated[Path | None, typer.Argument(help="YAML configuration.")]
Preset = Annotated[str | None, typer.Option(help="A model by name.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting: training.steps=500.")
]
Run = Annotated[Path, typer.Option("--out", help="The run's folder.")]
Resume = Annotated[bool, typer.Option(help="Continue from the newest checkpoint in OUT.")]
Model = Annotated[str, typer.Option(help="A run, a model folder, or a name on the hub.")]
OptionalModel = Annotated[
    str | None, typer.Option(help="A run, a model folder, or a name on the hub.")
]
OutFolder = Annotated[Path, typer.Option("--out", help="The folder to write.")]
Cache = Annotated[
    Path | None,
    typer.Option(
        envvar="SWITCHLM_CACHE",
        help="Folder of tokenised text; ~/.cache/switchlm if left out.",
    ),
]
Device = Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:1, ...")]


class Precision(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Dtype = Annotated[
    Precision | None,
    typer.Option(help="Number format to compute in; that of the files if left out."),
]
TrainingDevice = Annotated[
    str | None, typer.Option("--device", help="Where to compute: auto, cpu, cuda, cuda:1, mps.")
]
ExpertMemory = Annotated[
    str | None,
    typer.Option(
        help="Leave experts in their files; keep the last used in this much memory: 4GB, 512MiB.",
    ),
]
SkipSpecial = Annotated[
    bool, typer.Option("--skip-special", help="Leave special tokens, such as sentinels, out.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print metrics as JSON lines.")]
Data = Annotated[
    list[str] | None,
    typer.Option(help="Text: [name=]path[:weight], python:stdlib, ...; may be repeated."),
]
Batches = Annotated[int, typer.Option(min=1, help="The most batches of text to read.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Rows in a batch.")]
InputLength = Annotated[
    int | None, typer.Option(min=1, help="Tokens in a row of inputs; the run's, or 512.")
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--task", help="A task or mixture by name, or your own file or folder; may be repeated."
    ),
]
InputColumn = Annotated[
    str | None, typer.Option(help="The column of your file with the inputs; input if left out.")
]
TargetColumn = Annotated[
    str | None, typer.Option(help="The column of your file with the targets; target if left out.")
]
Template = Annotated[
    str | None,
    typer.Option(help="Inputs made of your file's columns: 'question: {question} text: {text}'."),
]
TargetTemplate = Annotated[
    str | None, typer.Option(help="Targets made of your file's columns, as in '{answers.text}'.")
]
Metrics = Annotated[
    list[str] | None,
    typer.Option("--metric", help="Metric of your file: exact_match, f1, rouge2, ...; repeatable."),
]
Labels = Annotated[
    list[str] | None,
    typer.Option("--label", help="A possible target of your file; repeat it for each."),
]
SkipEmpty = Annotated[
    bool,
    typer.Option("--skip-empty", help="Leave out examples with an empty input or target."),
]


def note(message: str) -> None:
    """Print a note to stderr."""
    typer.echo(f"Note: {message}", err=True)


def given(**options: Any) -> dict[str, Any]:
    """Return the options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def settings(stated: list[str] | None, device: str | None, cache: Path | None = None) -> list[str]:
    """Return the overrides of --set, --device and --cache."""
    found = [] if device is None else [f"training.device={device}"]
    if cache is not None:
        found.append(f"data.cache={json.dumps(str(cache))}")
    return [*found, *(stated or ())]


def check_resumed(out: Path, *beginnings: Any) -> None:
    """Raise ConfigError if there is no run in `out` to resume, and nothing to begin one from.

    beginnings: the options that a new run would begin from.
    """
    from switchlm.training.run_folder import RunFolder

    if RunFolder(out).exists() or any(beginnings):
        return
    folder = out.absolute().parent
    names = sorted(path.name for path in folder.glob("*") if RunFolder(path).exists())
    found = f"The runs in {str(folder)!r}:{nearest(out.name, names)}" if names else ""
    raise ConfigError(f"There is no run in {str(out)!r} to resume. {found}")


def read_sections(config: Path | None) -> dict[str, Any]:
    """Return the sections of a configuration file, none without one."""
    from switchlm.config import read_yaml

    return {} if config is None else read_yaml(config)


def torch_dtype(precision: Precision | None) -> Any:
    """Return the torch.dtype of that name; None for None."""
    import torch

    return None if precision is None else getattr(torch, precision.value)


def open_model(
    name: str,
    device: str = "auto",
    expert_memory: str | None = None,
    dtype: Precision | None = None,
) -> "tuple[SwitchTransformer, Tokenizer]":
    """Load a model that must have a tokenizer.

    expert_memory: a size such as 4GB, with which experts stay on disk; None loads all.
    dtype: to compute in; None: that of the files.
    """
    from switchlm.parallel.mesh import find_device
    from switchlm.recipes.config import load_with_tokenizer, require_tokenizer

    if expert_memory is None:
        return load_with_tokenizer(name, "model", note, find_device(device), torch_dtype(dtype))
    size = parse_size(expert_memory, "--expert-memory")
    if device not in ("auto", "cpu"):
        raise ConfigError(
            f"--expert-memory works on CPUs, and --device is {device!r}: leave one of them out."
        )
    from switchlm.compression.offload import load_offloaded

    loaded = load_offloaded(name, size, dtype=torch_dtype(dtype), report=note)
    return loaded.model, require_tokenizer(loaded.tokenizer, name, "model")


def trained_output_length(name: str) -> int | None:
    """Return the length of outputs that a model was fine-tuned on; None for other models."""
    from switchlm.recipes.trained_with import trained_with

    length = trained_with(name).get("finetune", {}).get("target_length")
    if length is not None:
        note(f"Outputs have up to {length:,} tokens if no limit is given, as in fine-tuning.")
    return None if length is None else int(length)


def read_text(argument: str | None) -> str:
    """Return the argument, or standard input if it is None or `-`."""
    if argument is not None and argument != "-":
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            raise DataError("The text is not valid UTF-8.") from None
        return argument
    if sys.stdin.isatty():
        raise DataError("There is no text: give it as an argument, or pipe it in.")
    try:
        return sys.stdin.buffer.read().decode("utf-8").rstrip("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"The text on standard input is not valid UTF-8: {error}") from None


def read_batches(
    name: str, tokenizer: "Tokenizer", data: list[str] | None, *, batches: int, **rows: Any
) -> "tuple[list[Batch], tuple[str, ...], dict[str, Any]]":
    """Return masked text, the names of its sources, and the settings of its rows.

    It is all of the text of `data`, or by default the text that the run of that name held out in
    training. Rows have the shape of the model's training.

    rows: batch_size, input_length and cache, as of `open_text`.
    """
    loader, settings = open_text(name, tokenizer, data, held_out_share=0.0, **rows)
    read = [loader.batch(step) for step in range(batches)] if data else loader.held_out(batches)
    return read, loader.sources, settings


def open_text(
    name: str,
    tokenizer: "Tokenizer",
    data: list[str] | None,
    *,
    held_out_share: float,
    batch_size: int | None = None,
    input_length: int | None = None,
    cache: Path | None = None,
) -> "tuple[Loader, dict[str, Any]]":
    """Return masked text, of `data`, with a share held out, or the run's own; and its settings.

    What is not given is as in the training of the model; it is said.

    cache: folder of the token caches.
    """
    from switchlm.config import from_mapping
    from switchlm.data.config import DataConfig
    from switchlm.data.pretraining.loader import open_data
    from switchlm.recipes.trained_with import describe_text, trained_with

    sections = trained_with(name)
    config = from_mapping(DataConfig, sections.get("data", {}), "data")
    changes = given(batch_size=batch_size, input_length=input_length)
    if cache is not None:
        changes["cache"] = str(cache)
    if data:
        changes |= {"sources": tuple(data), "held_out_share": held_out_share, "max_documents": None}
    elif not config.sources:
        raise DataError(
            f"There is no text: {name!r} is not a run with held-out text. Give some with --data."
        )
    if input_length is not None:
        changes["target_length"] = None
    config = dataclasses.replace(config, **changes)
    settings = describe_text(sections, config)
    known = settings.pop("as_trained")
    note(
        f"{name}: rows of {settings['input_length']:,} inputs and {settings['target_length']:,} "
        f"targets, {config.noise_density:.0%} masked in spans of {config.mean_span:g}, "
        f"{config.batch_size} rows in a batch; "
        + (
            "as in training, unless given."
            if known
            else "the model does not say how it was trained."
        )
    )
    return open_data(config, seed=0, tokenizer=tokenizer, report=note), settings


def find_tasks(
    names: Sequence[str],
    metrics: Sequence[str] | None,
    models: Sequence[str] = (),
    **columns: Any,
) -> "tuple[Task, ...]":
    """Return the tasks of those names; raises ConfigError if the options do not fit them.

    models: files are read by default as those that the models were fine-tuned on.
    columns: other fields of `TaskOptions`; None leaves the default.
    """
    from switchlm.data.tasks import mixture
    from switchlm.evaluation.metrics import find_metric

    for metric in metrics or ():
        find_metric(metric)
    stated = given(**columns)
    if metrics:
        stated["metrics"] = tuple(metrics)
    if not any(name in mixture.TASKS or name in mixture.MIXTURES for name in names):
        stated = _as_trained(models, stated) | stated
    return mixture.find_tasks(names, mixture.TaskOptions(**stated))


def _as_trained(models: Sequence[str], stated: dict[str, Any]) -> dict[str, Any]:
    """Return the columns, templates and metrics of the models' fine-tuning that are not stated."""
    from switchlm.config import from_mapping, to_mapping
    from switchlm.data.tasks.mixture import TaskOptions
    from switchlm.recipes.trained_with import trained_with

    options = []
    for model in models:
        section = trained_with(model).get("finetune", {}).get("columns") or {}
        found = to_mapping(from_mapping(TaskOptions, section, "finetune.columns"))
        for column, template in (
            ("input_column", "template"),
            ("target_column", "target_template"),
        ):
            if column in stated:
                found[template] = None  # the column that is stated counts
        if stated.keys() & {"target_column", "target_template"}:
            found["labels"] = None  # of another target
        options.append({name: value for name, value in found.items() if name not in stated})
    if any(other != options[0] for other in options):
        raise ConfigError(
            f"The models {', '.join(models)} were fine-tuned with different templates or metrics: "
            "give them with --template, --target-template and --metric, or evaluate one by one."
        )
    default = to_mapping(TaskOptions())
    changed = {k: v for k, v in (options[0] if options else {}).items() if v != default[k]}
    if changed:
        note("Read as in fine-tuning: " + ", ".join(f"{k} {v!r}" for k, v in changed.items()) + ".")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in changed.items()}


def task_paths(tasks: "Sequence[Task]", data: Sequence[str] | None) -> dict[str, Path | None]:
    """Return the path of each task's examples, None for the hub.

    data: `PATH` of all named tasks, which may have one folder per task, or `TASK=PATH`.
    """
    found: dict[str, Path | None] = {task.name: task.path for task in tasks}
    named = [task.name for task in tasks if task.path is None]
    for text in data or ():
        name, equals, path = text.partition("=")
        if not equals or os.path.exists(text):
            if not named:
                raise ConfigError(f"--data {text!r} is for no task here: --task is a file itself.")
            found.update(dict.fromkeys(named, Path(text)))
        elif name in found:
            found[name] = Path(path)
        else:
            raise ConfigError(f"--data {text!r} is for no task here.{nearest(name, found)}")
    return found


class Usage:
    """Time and memory that a command used; empty for a model whose experts are not on disk."""

    def __init__(self, model: "SwitchTransformer") -> None:
        from switchlm.compression.offload import memory_of

        self._memory = memory_of(model)
        self._seconds = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the time of the body."""
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start

    def metrics(self, num_tokens: int | None = None) -> dict[str, Any]:
        """Return resident memory, bytes read and rates; empty if all experts are in memory.

        num_tokens: generated tokens, None if nothing was generated.
        """
        if self._memory is None:
            return {}
        counters = self._memory.counters
        resident, peak = resident_bytes()
        found: dict[str, Any] = {
            "resident_bytes": resident,
            "peak_resident_bytes": peak,
            "expert_bytes_held": counters.bytes_held,
            "bytes_read": counters.bytes_read,
            "hits": counters.hits,
            "misses": counters.misses,
            "hit_rate": counters.hit_rate,
            "guesses": counters.guesses,
            "wrong_guesses": counters.wrong_guesses,
            "seconds": self._seconds,
        }
        if num_tokens is not None:
            found["tokens_a_second"] = num_tokens / max(self._seconds, 1e-9)
        return found

    def print(self, num_tokens: int | None = None) -> None:
        """Print the metrics to stderr, in one line."""
        found = self.metrics(num_tokens)
        if not found:
            return
        rate = "" if num_tokens is None else f", {found['tokens_a_second']:.1f} tokens per second"
        requests = found["hits"] + found["misses"]
        typer.echo(
            f"Experts on disk: {found['bytes_read'] / 1e9:.2f} GB read, "
            f"{found['hit_rate']:.0%} of {requests:,} requests were in memory; "
            f"resident {found['resident_bytes'] / 1e9:.2f} GB "
            f"(at most {found['peak_resident_bytes'] / 1e9:.2f}){rate}.",
            err=True,
        )


def resident_bytes() -> tuple[int, int]:
    """Return the resident memory of this process, now and at its peak, in bytes."""
    import resource  # not on every system

    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return peak, peak
    return pages * resource.getpagesize(), peak
