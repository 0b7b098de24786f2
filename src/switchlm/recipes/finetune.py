"""Fine-tune a model on tasks: the best checkpoint by the tasks' own metrics is what stays."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from switchlm.checkpoint.huggingface import load
from switchlm.checkpoint.run_folder import RunFolder
from switchlm.config import read_yaml, write_yaml
from switchlm.data.pairs import PairLoader
from switchlm.data.task import Example, Task
from switchlm.data.tasks import find_tasks, read_examples, spread_evenly
from switchlm.errors import ConfigError
from switchlm.evaluation.evaluator import held_out_loss
from switchlm.evaluation.metrics import measure
from switchlm.evaluation.tasks import score_task
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.mesh import ALONE, AnyMesh, Mesh, joined
from switchlm.recipes.config import to_sections
from switchlm.recipes.finetune_config import FinetuneConfig, FinetuneRun
from switchlm.recipes.finetune_model import Say, check_base, check_spelling, keep, open_model
from switchlm.recipes.pretrain import default_device
from switchlm.recipes.routing import record_routing
from switchlm.report.write import ReportRun, write_report
from switchlm.training.evaluation import KeepBest
from switchlm.training.loop import train
from switchlm.training.monitor import read_metrics


@dataclass(frozen=True, kw_only=True)
class Examples:
    """What a run learns from and is scored on, by task."""

    tasks: tuple[Task, ...]
    train: Mapping[str, Sequence[Example]]
    validation: Mapping[str, Sequence[Example]]


def finetune(
    config: FinetuneRun,
    out: Path,
    *,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    report: Say = lambda line: None,
) -> Iterator[dict[str, Any]]:
    """Train as configured; yield `{"phase": text}` and every line of metrics.jsonl.

    A line of evaluation has score (per cent, the mean over tasks of each task's metric), scores (by
    task and metric), evaluation_loss (nats a target token), best_score and best_step. Writes the
    run folder OUT: `model` is the best so far at any time, and with adapters `adapters` is too.
    With `resume`, goes on from the newest valid checkpoint in it, and so it does when a job was
    started anew after it failed. report: told of what a user should know.

    Started by torchrun, each process calls this and trains its part of the mesh. To be scored the
    model is put together in each of them, and the examples are shared out.
    """
    with joined(config.mesh) as mesh:
        yield from _finetune(config, out, mesh, resume or mesh.restarted, should_stop, report)


def _finetune(
    config: FinetuneRun,
    out: Path,
    mesh: AnyMesh,
    resume: bool,
    should_stop: Callable[[], bool],
    report: Say,
) -> Iterator[dict[str, Any]]:
    folder = RunFolder(out)
    _check(config, folder, mesh, resume)
    settings = config.finetune
    yield {"phase": "reading the tasks"}
    with mesh.first_on_node("tasks"):
        examples = read_tasks(settings)
    yield {"phase": "loading the model"}
    model, tokenizer = open_model(config, mesh, report)
    check_spelling(examples.tasks, tokenizer, settings.model)
    loader = PairLoader(
        examples.train,
        tokenizer,
        input_length=settings.input_length,
        target_length=settings.target_length,
        batch_size=settings.batch_size,
        seed=config.training.seed,
        held_out=examples.validation,
        pack=settings.pack,
        long_targets="truncate" if settings.truncate_targets else "refuse",
        report=report,
    )
    share = loader.share(mesh.share, mesh.num_shares)
    mesh.wait()  # until all have found the folder as it was
    if mesh.is_main:
        folder.create()
        check_base(model, folder, settings.model)
        write_yaml(folder.config, to_sections(config))
    mesh.wait()

    def keep_best(best: SwitchTransformer) -> None:
        if mesh.is_main:
            keep(best, tokenizer, settings, folder, report)

    evaluator = KeepBest(
        score=scorer(config, examples, loader, mesh), keep=keep_best, patience=settings.patience
    )
    yield {"phase": "training"}
    yield from train(
        model,
        share,
        config.training,
        run=folder,
        resume=resume,
        should_stop=should_stop,
        mesh=mesh,
        evaluator=evaluator,
    )
    if mesh.is_main:
        routing = _routing_of_the_best(loader, folder) if folder.model.exists() else []
        _write_report(config, examples, folder, routing)


def read_tasks(settings: FinetuneConfig) -> Examples:
    """Return the examples of the configured tasks, at least one of each to learn and to score."""
    tasks = find_tasks(settings.tasks, settings.columns)
    if settings.data is not None and all(task.path for task in tasks):
        raise ConfigError(
            f"finetune.data is {settings.data!r}, but every task is a file itself: leave it out, "
            "or name a task that is read from there."
        )

    def read(split: str, limit: int | None = None) -> dict[str, Sequence[Example]]:
        return {
            task.name: spread_evenly(read_examples(task, split, task.path or settings.data), limit)
            for task in tasks
        }

    examples = Examples(
        tasks=tasks,
        train=read(settings.train_split),
        validation=read(settings.validation_split, settings.evaluation_examples),
    )
    for task in tasks:  # what is wrong with a metric is told now, not at the first evaluation
        right = examples.validation[task.name]
        measure(task.metrics, [one.target for one in right], right, task.labels, resamples=1)
    return examples


def scorer(
    config: FinetuneRun, examples: Examples, loader: PairLoader, mesh: AnyMesh = ALONE
) -> Callable[[SwitchTransformer], dict[str, Any]]:
    """Return what gives the figures, all but the best so far, of a model whole in each process."""
    settings = config.finetune
    batches = loader.share(mesh.share, mesh.num_shares).held_out(config.training.evaluate_batches)

    def score(model: SwitchTransformer) -> dict[str, Any]:
        scores = {}
        for task in examples.tasks:
            found = score_task(
                model,
                loader.tokenizer,
                task,
                examples.validation[task.name],
                input_length=settings.input_length,
                max_new_tokens=settings.target_length,
                batch_size=settings.batch_size,
                resamples=1,  # intervals are for `evaluate`
                mesh=mesh,
            )
            scores[task.name] = {name: part.value for name, part in found.metrics.items()}
        deciding = [scores[task.name][task.metrics[0]] for task in examples.tasks]
        return {
            "score": sum(deciding) / len(deciding),
            "scores": scores,
            "evaluation_loss": held_out_loss(model, batches, loader.sources, mesh)["loss"],
        }

    return score


def _check(config: FinetuneRun, folder: RunFolder, mesh: AnyMesh, resume: bool) -> None:
    settings = config.finetune
    if isinstance(mesh, Mesh) and (settings.trainable != "all" or settings.lora_rank is not None):
        raise ConfigError(
            "A part of a model, or adapters, are fine-tuned in one process: run it without "
            "torchrun, or train all parameters."
        )
    if folder.exists() and not resume:
        raise ConfigError(
            f"There is a run in {str(folder.root)!r} already. Go on with it by --resume, or choose "
            "another --out."
        )
    if not folder.config.exists():
        return
    before = read_yaml(folder.config).get("finetune")
    if not isinstance(before, dict):
        raise ConfigError(
            f"The run in {str(folder.root)!r} is no fine-tuning: choose another --out."
        )
    now = to_sections(config)["finetune"]
    for name in sorted(now.keys() - {"patience"}):
        if before.get(name) != now[name]:
            raise ConfigError(
                f"The run in {str(folder.root)!r} has finetune.{name} = {before.get(name)!r}, so "
                f"it cannot be resumed with {now[name]!r}. Leave that out to go on, or choose "
                "another --out for a new run."
            )


def _routing_of_the_best(loader: PairLoader, folder: RunFolder) -> list[dict[str, Any]]:
    best, _ = load(folder.model, device=default_device(), report=lambda line: None)
    return record_routing(best, loader, loader.tokenizer, folder)


def _write_report(
    config: FinetuneRun,
    examples: Examples,
    folder: RunFolder,
    routing: Sequence[Mapping[str, Any]],
) -> None:
    metrics = read_metrics(folder.metrics)
    evaluations = [line for line in metrics if "score" in line]
    names = {task.name: task.metrics[0] for task in examples.tasks}
    headline = "Stopped before the first evaluation."
    if evaluations:
        last = evaluations[-1]
        what = " and ".join(f"{metric} on {task}" for task, metric in names.items())
        headline = (
            f"Best {what}: {last['best_score']:.1f}% at step {last['best_step']:,} of "
            f"{metrics[-1]['step']:,}."
        )
    write_report(
        folder.report,
        title=f"Fine-tuning: {folder.root.name}",
        headline=headline,
        runs=[ReportRun(name=folder.root.name, metrics=metrics, routing=routing)],
        table=[
            {
                "step": f"{line['step']:,}",
                **{
                    f"{task} {metric}": f"{line['scores'][task][metric]:.2f}"
                    for task, metric in names.items()
                },
                "held-out loss": f"{line['evaluation_loss']:.3f}",
            }
            for line in evaluations
        ],
        configuration=to_sections(config),
    )
