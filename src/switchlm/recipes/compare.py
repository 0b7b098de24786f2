"""Train a Switch Transformer and its FLOP-matched dense twin on the same batches, side by side.

The two runs share the machine at the same time, so that load from outside slows both, and take the
same number of steps. The result is that of the paper's section 3.1: how much earlier, in steps and
in time, the sparse model reaches the dense model's final held-out loss.
"""

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml

from switchlm.config import read_yaml
from switchlm.data.pretraining.loader import Loader, open_data
from switchlm.errors import ConfigError
from switchlm.evaluation.evaluator import perplexity
from switchlm.files import (
    MANIFEST,
    Report,
    exchange,
    hidden_folder,
    remove_folder,
    replace_file,
    sweep,
    to_json,
)
from switchlm.generation.answer import fill, put_into_blanks, read_spans
from switchlm.huggingface.load import load
from switchlm.huggingface.save import check_replaceable
from switchlm.locks import LOCK, exclusive
from switchlm.model import count
from switchlm.parallel.mesh import ALONE, find_device
from switchlm.recipes.compare_worker import CompareWorker
from switchlm.recipes.config import RunConfig, run_config, to_sections, with_vocabulary
from switchlm.recipes.start import open_run
from switchlm.report.write import ReportRun, write_report
from switchlm.training.run_folder import RunFolder

Event = dict[str, Any]
Line = Mapping[str, Any]
Speed = dict[str, float | None]
ENDLESS = 10**9  # steps: more than any time budget allows
RUNS = ("dense", "sparse")
RESULT, REPORT = "compare.json", "report.html"
KIND = "comparison"  # in the manifest of its folder
FILES = (RESULT, REPORT, MANIFEST, LOCK)
FINAL_SHARE = 0.04  # of the budget, for the last evaluation, the models and the report


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The two configurations; they differ in the experts and in settings of the section `dense`."""

    sparse: RunConfig
    dense: RunConfig


def configure(
    *,
    path: Path | None = None,
    preset: str | None = None,
    sources: Sequence[str] = (),
    overrides: Sequence[str] = (),
    dense_overrides: Sequence[str] = (),
    by_time: bool = False,
) -> Comparison:
    """Resolve both configurations.

    The base is the demo's (compare.yaml). Its section `dense`, or that of the file at `path`, has
    settings of the dense twin alone, such as its learning rate; dense_overrides come last.

    by_time: whether a time budget ends the runs instead of a number of steps.
    """
    text = files("switchlm.recipes").joinpath("compare.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    dense = values.pop("dense", {})
    base = run_config(values=values)
    stated = {} if path is None else read_yaml(path)
    dense = stated.pop("dense", dense)
    sparse = run_config(base, preset=preset, values=stated, sources=sources, overrides=overrides)
    if by_time:
        training = dataclasses.replace(sparse.training, steps=ENDLESS)
        sparse = dataclasses.replace(sparse, training=training)
    if not sparse.model.num_experts:
        raise ConfigError(
            "model.num_experts is 0: a comparison needs a sparse model; its dense twin is derived."
        )
    twin = dataclasses.replace(sparse, model=sparse.model.dense_twin())
    twin = run_config(twin, values=dense, overrides=dense_overrides)
    return Comparison(sparse=sparse, dense=twin)


def compare(
    config: Comparison,
    out: Path,
    *,
    overwrite: bool = False,
    seconds: float | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    report: Report = lambda line: None,
) -> Iterator[Event]:
    """Train both models for `training.steps` steps, or until `seconds` of wall time are spent.

    Yields events: `{"phase": text}`, the metric lines of both with `run` ("dense" or "sparse"), and
    last `{"result": {...}}`, which compare.json holds too. Writes OUT/dense and OUT/sparse (run
    folders), OUT/compare.json and OUT/report.html.

    overwrite: replace an earlier comparison in OUT, when this one is finished.
    report: called with lines of progress while text is prepared.
    """
    started = time.monotonic()
    training = config.sparse.training
    # On a CPU both run at once, each on half of the cores; on an accelerator they take turns.
    together = find_device(training.device).type == "cpu"
    with ExitStack() as opened:
        folder = opened.enter_context(_place(out, overwrite))
        yield {"phase": "reading text"}
        loader = open_data(config.sparse.data, seed=training.seed, report=report)
        config = Comparison(
            sparse=with_vocabulary(config.sparse, loader.tokenizer),
            dense=with_vocabulary(config.dense, loader.tokenizer),
        )
        threads = max(1, torch.get_num_threads() // (2 if together else 1))
        with ExitStack() as running:
            workers = {}
            for name, config_of_run in (("dense", config.dense), ("sparse", config.sparse)):
                run = opened.enter_context(open_run(folder / name, False, ALONE))
                settings = {run.folder.config.name: to_sections(config_of_run)}
                run.begin(settings, loader.tokenizer, text=loader.text_hash)
                workers[name] = CompareWorker(run.folder, threads)
                running.callback(workers[name].close)
            yield {"phase": "training"}
            deadline = started + (math.inf if seconds is None else seconds * (1 - FINAL_SHARE))
            step = 0
            while step == 0 or (step < training.steps and time.monotonic() < deadline):
                if should_stop():
                    break
                step = min(step + training.log_every, training.steps)
                yield from _run_command(workers, f"advance {step}", together)
            yield {"phase": "evaluating and saving"}
            yield from _run_command(workers, "finish", together)
        result = _result(config, workers, loader)
        text = to_json(result, indent=2) + "\n"
        replace_file(folder / RESULT, text.encode())
        write_report(
            folder / REPORT,
            title="Switch Transformer against its dense twin",
            headline=headline(result),
            runs=[_report_run(name, workers[name]) for name in ("sparse", "dense")],
            sources=result["sources"],
            table=result_table(result),
            target_loss=result["dense_loss"],
            crossing=result["crossing"],
            example=result["example"],
            configuration=result["configuration"],
        )
    yield {"result": result}


@contextmanager
def _place(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yield the folder to write a comparison to, locked.

    That is `out`; or a hidden one, which replaces an earlier comparison in `out` at the end of the
    block. If the block fails before anything is trained, nothing is left in `out`.

    Raises ConfigError for a folder with anything else.
    """
    with exclusive(out):
        for name in (MANIFEST, RESULT, REPORT):
            sweep(out / name)
        if not any(path.name != LOCK for path in out.iterdir()):
            replace_file(out / MANIFEST, json.dumps({"kind": KIND}).encode())
            try:
                yield out
            except BaseException:
                if not any((out / name).exists() for name in RUNS):
                    (out / MANIFEST).unlink()
                raise
            return
        check_comparison(out)
        if not overwrite:
            raise ConfigError(
                f"{str(out)!r} holds an earlier comparison. Choose another --out, or --overwrite."
            )
        new = hidden_folder(out)
        try:
            replace_file(new / MANIFEST, json.dumps({"kind": KIND}).encode())
            yield new
            exchange(new, out)
        finally:
            remove_folder(new)


def check_comparison(out: Path) -> None:
    """Raise ConfigError for a folder that holds anything but a comparison that we wrote."""
    marker = out / (MANIFEST if (out / MANIFEST).is_file() else RESULT)
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))
        ours = found.get("kind") == KIND or {"dense_loss", "sparse_loss"} <= found.keys()
    except (OSError, ValueError, AttributeError, RecursionError):
        ours = False
    if not ours:
        raise ConfigError(f"{str(out)!r} contains no comparison; it is not overwritten.")
    others = [path for path in out.iterdir() if path.name not in (*RUNS, *FILES)]
    for name in RUNS:
        others += RunFolder(out / name).others()
        check_replaceable(RunFolder(out / name).model)
    if others:
        raise ConfigError(
            f"{str(out)!r} is not overwritten: it holds {str(others[0].relative_to(out))!r}, which "
            "is not part of a comparison. Move it away, or choose another --out."
        )


def _report_run(name: str, worker: CompareWorker) -> ReportRun:
    """Return a run for the report; a dense one has no routing."""
    file = worker.folder.routing
    routing = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    return ReportRun(name=name, metrics=worker.metrics, routing=routing)


def _run_command(
    workers: Mapping[str, CompareWorker], command: str, together: bool
) -> Iterator[Event]:
    """Send a command to both runs, at once or in turn, and yield their metrics."""
    if together:
        for worker in workers.values():
            worker.send(command)
    for name, worker in workers.items():
        if not together:
            worker.send(command)
        for line in worker.read_lines():
            yield {"run": name, **line}


def _result(config: Comparison, workers: Mapping[str, CompareWorker], loader: Loader) -> Event:
    dense, sparse = workers["dense"].evaluations, workers["sparse"].evaluations
    last = {"dense": dense[-1], "sparse": sparse[-1]}
    reached = crossing(sparse, last["dense"]["evaluation_loss"])
    batch = loader.batch(0)
    lengths = (batch.inputs_BS.shape[1], batch.targets_BT.shape[1])
    models = {"dense": config.dense.model, "sparse": config.sparse.model}
    return {
        **_speed(dense, sparse),
        "crossing": None if reached is None else dataclasses.asdict(reached),
        "sources": speed_by_source(dense, sparse),
        "steps": last["dense"]["step"],
        "seconds": {name: line["seconds"] for name, line in last.items()},
        "bits_per_byte": {
            name: line.get("evaluation_bits_per_byte") for name, line in last.items()
        },
        "parameters": {name: count.parameters(model) for name, model in models.items()},
        "flops_per_token": {
            name: count.flops_per_token(model, *lengths) for name, model in models.items()
        },
        "seeds": [config.sparse.training.seed],
        "example": _example(workers, loader),
        "configuration": {
            "sparse": to_sections(config.sparse),
            "dense": to_sections(config.dense),
        },
    }


def _example(workers: Mapping[str, CompareWorker], loader: Loader) -> dict[str, str]:
    """Fill the blanks of a held-out text with both models."""
    text, targets = loader.example()
    filled = {
        f"filled by the {name} model": fill(
            load(str(worker.folder.model))[0], loader.tokenizer, text
        )
        for name, worker in workers.items()
    }
    truth = read_spans(loader.tokenizer.encode(targets), loader.tokenizer)
    return {
        "held-out text with blanks": text,
        **filled,
        "the text itself": put_into_blanks(text, truth),
    }


def headline(result: Event) -> str:
    """Return the result as one sentence."""
    if result["step_ratio"] is None:
        return (
            f"After {result['steps']} steps the sparse model has not reached the dense twin's "
            f"held-out loss: {result['sparse_loss']:.3f} against {result['dense_loss']:.3f}."
        )
    return (
        f"The Switch Transformer reached its dense twin's final held-out loss "
        f"({result['dense_loss']:.3f}) in {result['step_ratio']:.2f} of the steps and "
        f"{result['time_ratio']:.2f} of the time, and went on to {result['sparse_loss']:.3f}."
    )


def result_table(result: Event) -> list[dict[str, str]]:
    """Return the table of results: one row per metric, one column per model, all text."""
    names = ("dense", "sparse")

    def row(label: str, cells: dict[str, str]) -> dict[str, str]:
        return {"": label, **{name: cells.get(name, "") for name in names}}

    def both(key: str, form: str, unit: str = "") -> dict[str, str]:
        return {name: format(result[key][name], form) + unit for name in names}

    bits = {name: found for name, found in result["bits_per_byte"].items() if found is not None}
    rows = [
        row("held-out loss", {name: f"{result[f'{name}_loss']:.4f}" for name in names}),
        row("perplexity", {name: f"{perplexity(result[f'{name}_loss']):.2f}" for name in names}),
        *([row("bits per byte", {k: f"{found:.4f}" for k, found in bits.items()})] if bits else []),
        row("parameters", both("parameters", ",")),
        row("FLOPs per token", both("flops_per_token", ",.0f")),
        row("steps", dict.fromkeys(names, f"{result['steps']:,}")),
        row("training time", both("seconds", ".0f", " s")),
    ]
    if result["crossing"] is not None:
        reached = result["crossing"]
        rows += [
            row("dense loss reached at step", {"sparse": f"{reached['step']:,.0f}"}),
            row("speed-up in steps", {"sparse": f"{1 / result['step_ratio']:.2f} x"}),
            row("speed-up in time", {"sparse": f"{1 / result['time_ratio']:.2f} x"}),
        ]
    if len(result["sources"]) > 1:
        sources = result["sources"].values()
        better = sum(one["sparse_loss"] < one["dense_loss"] for one in sources)
        ratios = [one["step_ratio"] or math.inf for one in sources]
        rows.append(row("sources with a lower loss", {"sparse": f"{better} of {len(ratios)}"}))
        middle = statistics.median(ratios)
        speed_up = "never reached" if middle == math.inf else f"{1 / middle:.2f} x"
        rows.append(row("speed-up in steps, median source", {"sparse": speed_up}))
    return rows


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """The step, and the seconds of training, at which a run first reached a loss."""

    step: float
    seconds: float


def crossing(evaluations: Sequence[Line], target: float | None) -> Crossing | None:
    """Return where the held-out loss first reached `target`, by linear interpolation, or None.

    evaluations: lines with `step`, `seconds` and `evaluation_loss`, in order; lines without a loss,
        which was not finite, are passed over.
    target: None if it was not finite; no run reaches that.
    """
    before: Line | None = None
    for line in evaluations if target is not None else ():
        if line["evaluation_loss"] is None:
            continue
        if line["evaluation_loss"] <= target:
            if before is None:
                return Crossing(step=line["step"], seconds=line["seconds"])
            drop = before["evaluation_loss"] - line["evaluation_loss"]
            part = (before["evaluation_loss"] - target) / drop
            return Crossing(
                step=before["step"] + part * (line["step"] - before["step"]),
                seconds=before["seconds"] + part * (line["seconds"] - before["seconds"]),
            )
        before = line
    return None


def speed_by_source(dense: Sequence[Line], sparse: Sequence[Line]) -> dict[str, Speed]:
    """Return how the two runs compare on each source of the text (section 4.3).

    Of each source: `dense_loss` and `sparse_loss` at the end, and `step_ratio` and `time_ratio`,
    the share of the dense run after which the sparse run had reached the dense run's last loss,
    None if it never did.

    dense, sparse: lines as of `crossing` that also have `evaluation_loss_by_source`.
    """
    return {
        name: _speed(_of_source(dense, name), _of_source(sparse, name))
        for name in dense[-1]["evaluation_loss_by_source"]
    }


def _of_source(lines: Sequence[Line], name: str) -> list[Line]:
    return [{**line, "evaluation_loss": line["evaluation_loss_by_source"][name]} for line in lines]


def _speed(dense: Sequence[Line], sparse: Sequence[Line]) -> Speed:
    """Return the losses and ratios of `speed_by_source`, of one source or of all text."""
    last = dense[-1]
    reached = crossing(sparse, last["evaluation_loss"])
    return {
        "dense_loss": last["evaluation_loss"],
        "sparse_loss": sparse[-1]["evaluation_loss"],
        "step_ratio": None if reached is None else reached.step / last["step"],
        "time_ratio": None if reached is None else reached.seconds / last["seconds"],
    }
