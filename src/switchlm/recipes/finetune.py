"""Fine-tune a model on tasks, and keep the best checkpoint by the tasks' own metrics.

Dropout and routing of the loaded model are set, and parts of it frozen. A run writes the full
model, and the adapters alone if it trains some.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from switchlm.data.tasks.loader import PairLoader
from switchlm.data.tasks.mixture import find_tasks, read_splits, spread_evenly
from switchlm.data.tasks.task import Example, Task
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import CheckpointError, ConfigError, DataError
from switchlm.evaluation.baselines import baselines
from switchlm.evaluation.evaluator import held_out_loss
from switchlm.evaluation.metrics import measure
from switchlm.evaluation.tasks import score_task
from switchlm.files import Report, replace_file
from switchlm.huggingface.adapters import AdapterConfig, save_adapters
from switchlm.huggingface.load import load, load_metadata, load_weights, save
from switchlm.huggingface.weights import read_json
from switchlm.model import lora
from switchlm.model.config import ModelConfig
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.mesh import Mesh, find_device, joined
from switchlm.recipes.config import RunConfig, open_tokenizer, to_sections
from switchlm.recipes.finetune_config import FinetuneConfig, FinetuneRun
from switchlm.recipes.pretrain import build_model, record_routing
from switchlm.recipes.start import open_run
from switchlm.recipes.trained_with import metadata_of
from switchlm.report.write import ReportRun, write_report
from switchlm.training.evaluation import BestCheckpoint
from switchlm.training.loop import train
from switchlm.training.monitor import read_metrics
from switchlm.training.optimizer import train_only
from switchlm.training.run_folder import RunFolder


def open_model(
    config: FinetuneRun, mesh: Mesh, report: Report
) -> tuple[SwitchTransformer, Tokenizer]:
    """Load the model as configured, on the run's device, with all but the trained part frozen.

    On many processes it is sharded over the mesh, and all of it trains.
    """
    settings = config.finetune
    with mesh.local_rank_zero_first("model"):  # which may come from the hub
        tokenizer = open_tokenizer(settings.model, "model to fine-tune")
    if mesh.is_distributed:
        model = build_model(RunConfig(model=config.model, training=config.training), mesh)
        load_weights(model, settings.model, report=report, group=mesh.storage)
        model.metadata = load_metadata(settings.model)
        return model, tokenizer
    device = find_device(config.training.device)
    model, _ = load(settings.model, dtype=torch.float32, device=device, report=report)
    model = with_config(model, config.model)
    if settings.lora_rank is None:
        train_only(model, settings.trainable)
    else:
        lora.apply(model, settings.lora_rank, settings.lora_alpha, config.training.seed)
    return model, tokenizer


def with_config(model: SwitchTransformer, config: ModelConfig) -> SwitchTransformer:
    """Return a model of that configuration which shares the weights of `model`."""
    state = model.state_dict()
    with torch.device("meta"):
        other = SwitchTransformer(config, model.metadata)
    for name, place in other.state_dict().items():
        if name not in state:  # expert biases, if the router is now balanced by them
            state[name] = torch.zeros(place.shape, device=model.embedding.weight.device)
    other.load_state_dict({name: state[name] for name in other.state_dict()}, assign=True)
    return other


def check_frozen_weights(model: SwitchTransformer, folder: RunFolder, name: str) -> None:
    """Record a hash of the frozen weights, which the run's checkpoints do not contain.

    Raises CheckpointError if a resumed run finds other weights under the name of its model.
    """
    digest = hashlib.sha256()
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest.update(f"{key} {int(torch.hash_tensor(parameter).view(torch.int64))}\n".encode())
    record = {"frozen": digest.hexdigest()}
    if not folder.base.exists():
        replace_file(folder.base, json.dumps(record).encode())
    elif read_json(folder.root, folder.base.name) != record:
        raise CheckpointError(
            f"The model {name!r} is not the one that the run in {str(folder.root)!r} began with: "
            "its weights have changed since, and the run's checkpoints hold only what it trains. "
            "Put the old model back to resume, or choose another --out for a new run."
        )


def check_labels(tasks: Sequence[Task], tokenizer: Tokenizer, model: str) -> None:
    """Raise DataError for a label that the tokenizer cannot represent."""
    for task in tasks:
        for label in task.labels or ():
            decoded = tokenizer.decode(tokenizer.encode(label)).strip()
            if decoded != label:
                raise DataError(
                    f"The model {model!r} cannot learn the task {task.name!r}: its tokenizer turns "
                    f"the label {label!r} into {decoded!r}. Take a model whose vocabulary covers "
                    "the task, or a file with other labels."
                )


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The training and validation examples by task."""

    tasks: tuple[Task, ...]
    train: Mapping[str, Sequence[Example]]
    validation: Mapping[str, Sequence[Example]]

    def text_hash(self) -> str:
        """Return a hash of all examples, in order."""
        state = hashlib.sha256()
        for part in (self.train, self.validation):
            for name, examples in part.items():
                state.update(json.dumps([name, len(examples)]).encode())
                for example in examples:
                    state.update(json.dumps([example.input, example.target]).encode())
        return state.hexdigest()

    def loader(
        self, settings: FinetuneConfig, tokenizer: Tokenizer, seed: int, report: Report
    ) -> PairLoader:
        """Return the batches; raises DataError for labels that the tokenizer cannot represent."""
        check_labels(self.tasks, tokenizer, settings.model)
        return PairLoader(
            self.train,
            tokenizer,
            input_length=settings.input_length,
            target_length=settings.target_length,
            batch_size=settings.batch_size,
            seed=seed,
            held_out=self.validation,
            pack=settings.pack,
            long_targets="truncate" if settings.truncate_targets else "refuse",
            report=report,
        )


def finetune(
    config: FinetuneRun,
    out: Path,
    *,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    report: Report = lambda line: None,
) -> Iterator[dict[str, Any]]:
    """Train as configured; yield `{"phase": text}` and every line of metrics.jsonl.

    A resumed run that has ended, and would take another course now, yields `{"ended": text}` alone.

    A line of evaluation has score (per cent, the mean over tasks of each task's metric), scores (by
    task and metric), evaluation_loss (nats per target token), best_score and best_step. Writes the
    run folder OUT, where `model` and `adapters` are always the best so far. With `resume`, and
    after torchrun restarted a failed job, it continues from the newest valid checkpoint.

    report: called with lines about the data and the model.

    Started by torchrun, each process calls this and trains its part of the mesh. For scoring, the
    model is gathered in each process and the examples are divided among them.
    """
    with joined(config.mesh, config.training.device) as mesh, ExitStack() as opened:
        resume = resume or mesh.restarted
        _check(config, mesh)
        run = opened.enter_context(open_run(out, resume, mesh))
        folder, settings = run.folder, config.finetune
        stored = {folder.config.name: to_sections(config)}
        ended = run.check(stored, report)
        if ended is not None:
            yield {"ended": ended}
            return
        yield {"phase": "reading the tasks"}
        with mesh.local_rank_zero_first("tasks"):
            examples = read_tasks(settings, report)
        yield {"phase": "loading the model"}
        model, tokenizer = open_model(config, mesh, report)
        loader = examples.loader(settings, tokenizer, config.training.seed, report)
        share = loader.share(mesh.data_rank, mesh.data_size)
        run.begin(
            stored,
            tokenizer,
            text=examples.text_hash(),
            extra=lambda: check_frozen_weights(model, folder, settings.model),
        )

        def keep(best: SwitchTransformer) -> None:
            """Write the best model, with adapters merged, and the adapters alone."""
            if not mesh.is_main:
                return
            if settings.lora_rank is not None:
                about = AdapterConfig(
                    rank=settings.lora_rank, alpha=settings.lora_alpha, base=settings.model
                )
                save_adapters(best, about, folder.adapters)
                best = lora.merged(best)
            trained = metadata_of(model, None, settings)
            save(best, tokenizer, folder.model, report=report, metadata=trained)

        score = make_scorer(settings, examples, loader, mesh, config.training.evaluate_batches)
        yield {"phase": "training"}
        yield from train(
            model,
            share,
            config.training,
            run=folder,
            resume=resume,
            should_stop=should_stop,
            mesh=mesh,
            kernels=config.kernels,
            evaluator=BestCheckpoint(score=score, keep=keep, patience=settings.patience),
        )
        if not mesh.is_main:
            return
        routing = []
        if folder.model.exists():
            device = find_device(config.training.device)
            best, _ = load(folder.model, device=device, report=lambda line: None)
            routing = record_routing(best, loader, tokenizer, folder)
        _write_report(config, examples, folder, routing)
        steps = [line["best_step"] for line in read_metrics(folder.metrics) if "best_step" in line]
        if steps and not folder.model.exists():
            raise CheckpointError(
                f"The model of the best step, {steps[-1]:,}, is gone from {str(folder.model)!r}, "
                "where it was written after its evaluation. Start again with another --out."
            )


def read_tasks(settings: FinetuneConfig, report: Report = lambda line: None) -> Examples:
    """Return the examples of the configured tasks, at least one per task and split.

    report: called with lines on records that are left out.
    """
    tasks = find_tasks(settings.tasks, settings.columns)
    if settings.data is not None and all(task.path for task in tasks):
        raise ConfigError(
            f"finetune.data is {settings.data!r}, but every task is a file itself: leave it out, "
            "or name a task that is read from there."
        )

    splits = (settings.train_split, settings.validation_split)
    found = {
        task.name: read_splits(task, splits, task.path or settings.data, report) for task in tasks
    }
    limit = settings.evaluation_examples
    examples = Examples(
        tasks=tasks,
        train={name: part[settings.train_split] for name, part in found.items()},
        validation={
            name: spread_evenly(part[settings.validation_split], limit)
            for name, part in found.items()
        },
    )
    for task in tasks:  # a wrong metric is an error now, not at the first evaluation
        right = examples.validation[task.name]
        measure(task.metrics, [one.target for one in right], right, task.labels, resamples=1)
    return examples


def make_scorer(
    settings: FinetuneConfig,
    examples: Examples,
    loader: PairLoader,
    mesh: Mesh,
    evaluate_batches: int,
) -> Callable[[SwitchTransformer], dict[str, Any]]:
    """Return a function that scores a model which is gathered in each process.

    evaluate_batches: number of held-out batches for the loss.

    Beside the score, `score_without_input` is the mean of each task's better baseline.
    """
    known = [
        baselines(task, examples.validation[task.name]).best(task.metrics[0])
        for task in examples.tasks
    ]
    batches = loader.share(mesh.data_rank, mesh.data_size).held_out(evaluate_batches)

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
            "score_without_input": sum(known) / len(known),
            "evaluation_loss": held_out_loss(model, batches, loader.sources, mesh)["loss"],
        }

    return score


def beside_baseline(line: Mapping[str, Any]) -> str:
    """Return a sentence on the best score beside that of answers without reading the input."""
    baseline = line.get("score_without_input")  # runs of older versions have none
    if baseline is None:
        return ""
    if line["best_score"] > baseline:
        return f" Without reading the input, the best constant answer or guess has {baseline:.1f}%."
    return (
        f" That is no better than the {baseline:.1f}% of the best constant answer or guess, which "
        "reads no input."
    )


def _check(config: FinetuneRun, mesh: Mesh) -> None:
    """Raise ConfigError for partial training on many processes."""
    settings = config.finetune
    if mesh.is_distributed and (settings.trainable != "all" or settings.lora_rank is not None):
        raise ConfigError(
            "A part of a model, or adapters, are fine-tuned in one process: run it without "
            "torchrun, or train all parameters."
        )


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
            f"{metrics[-1]['step']:,}.{beside_baseline(last)}"
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
