"""Distil a model into a smaller one: a sparse teacher into its dense twin (section 4.2).

What the paper reports comes out: the share of the teacher's gain over a dense model that the
student keeps, and how much smaller than the teacher it is.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from switchlm.checkpoint.files import replace_file
from switchlm.checkpoint.huggingface import load, save
from switchlm.checkpoint.run_folder import RunFolder
from switchlm.checkpoint.transplant import transplant
from switchlm.config import write_yaml
from switchlm.data.loader import Loader, open_data
from switchlm.data.tokenizer import Tokenizer
from switchlm.errors import ConfigError
from switchlm.evaluation.evaluator import held_out_loss
from switchlm.evaluation.routing import routing_statistics
from switchlm.model import count
from switchlm.model.config import ModelConfig
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.mesh import AnyMesh, joined
from switchlm.recipes.config import to_sections
from switchlm.recipes.distill_config import SETTINGS, DistillationConfig, DistillRun
from switchlm.recipes.pretrain import begin, build_model, default_device, open_folder
from switchlm.recipes.start import check_vocabulary, open_tokenizer, open_whole
from switchlm.report.write import ReportRun, write_report
from switchlm.training.distillation import Distillation, Taught, Teacher
from switchlm.training.logit_cache import CacheKey, LogitCache, build, digest
from switchlm.training.loop import BatchSource, train
from switchlm.training.monitor import read_metrics
from switchlm.training.objective import Objective, target_cross_entropy

Event = dict[str, Any]
Report = Callable[[str], None]
RESULT = "distill.json"


def distill(
    config: DistillRun,
    out: Path,
    *,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    report: Report = lambda line: None,
) -> Iterator[Event]:
    """Train a student; yield `{"phase": text}`, metrics lines, and last `{"result": {...}}`.

    Writes the run folder OUT, with distillation.yaml beside config.yaml, and the result in
    distill.json. With `resume` it goes on from the newest checkpoint there. Started by torchrun,
    the student is spread over the mesh; the teacher is whole in each process.
    """
    with joined(config.run.mesh) as mesh:
        yield from _distill(config, out, mesh, resume or mesh.restarted, should_stop, report)


def _distill(
    config: DistillRun,
    out: Path,
    mesh: AnyMesh,
    resume: bool,
    should_stop: Callable[[], bool],
    report: Report,
) -> Iterator[Event]:
    settings, run = config.distillation, config.run
    folder = open_folder(out, resume)
    yield {"phase": "loading the teacher"}
    teacher, tokenizer = open_whole(settings.teacher, "teacher", report, default_device())
    _check_others(settings, tokenizer)
    yield {"phase": "reading text"}
    with mesh.first_on_node("text"):
        loader = open_data(run.data, seed=run.training.seed, tokenizer=tokenizer, report=report)
    source = _taught(config, loader, teacher, mesh, report)
    begin(folder, run, tokenizer, mesh)
    if mesh.is_main:
        write_yaml(out / SETTINGS, settings)
    student = build_model(run, mesh)
    if not folder.has_checkpoint():
        _start(settings, teacher, student, loader, report)
    yield {"phase": "training"}
    yield from train(
        student,
        source,
        run.training,
        run=folder,
        resume=resume,
        should_stop=should_stop,
        mesh=mesh,
        objective=_objective(settings),
    )
    yield {"phase": "saving and measuring"}
    save(student, tokenizer, folder.model, group=mesh.storage)
    losses = _losses(config, loader, teacher, student, mesh, report)
    if not mesh.is_main:
        return
    result = _result(config, teacher.config, losses, read_metrics(folder.metrics))
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    replace_file(out / RESULT, text.encode("utf-8"))
    _report(folder, result)
    yield {"result": result}


def _check_others(settings: DistillationConfig, tokenizer: Tokenizer) -> None:
    """Refuse a student or baseline of other words before any work is done."""
    others = {}
    if settings.trained_student is not None:
        others["student"] = settings.trained_student
    if settings.baseline is not None and _as_loss(settings.baseline) is None:
        others["baseline"] = settings.baseline
    for role, name in others.items():
        other = open_tokenizer(name, role)
        teacher = f"the teacher {settings.teacher!r}"
        check_vocabulary(tokenizer, other, teacher, f"The {role} {name!r}")


def _objective(settings: DistillationConfig) -> Objective:
    if not settings.soft_weight:
        return target_cross_entropy
    return Distillation(
        hard_weight=settings.hard_weight,
        soft_weight=settings.soft_weight,
        temperature=settings.temperature,
    )


def _taught(
    config: DistillRun, loader: Loader, model: SwitchTransformer, mesh: AnyMesh, report: Report
) -> BatchSource:
    """Return this process's share of the text, with what the teacher says of it."""
    settings, training = config.distillation, config.run.training
    share = loader.share(mesh.share, mesh.num_shares)
    if not settings.soft_weight:
        return share
    teacher = Teacher(
        model,
        temperature=settings.temperature,
        precision=training.precision,
        top_k=settings.top_k,
    )
    if settings.cache_logits is None:
        return Taught(share, lambda number, batch: teacher(batch))
    assert settings.top_k is not None, "a cache implies it"
    folder = Path(settings.cache_logits)
    num_batches = training.steps * training.accumulate
    key = CacheKey(
        teacher=digest(model),
        tokenizer=loader.tokenizer.fingerprint(),
        seed=training.seed,
        temperature=settings.temperature,
        precision=training.precision,
        top_k=settings.top_k,
    )
    with mesh.first_on_node("logits"):
        build(folder, key, teacher, loader, num_batches, report)
    cache = LogitCache(
        folder,
        key,
        num_batches * loader.batch_size,
        share=mesh.share,
        num_shares=mesh.num_shares,
    )
    source = Taught(share, cache.teach)
    batches = source.iterate(0)
    next(batches)  # other text is refused now, not after the model is built
    batches.close()
    return source


def _start(
    settings: DistillationConfig,
    teacher: SwitchTransformer,
    student: SwitchTransformer,
    loader: Loader,
    report: Report,
) -> None:
    """Give a student its first weights, where they are not to be random."""
    if settings.trained_student is not None:
        transplant(load(settings.trained_student)[0], student)
    elif settings.start == "teacher":
        load_by_layer: dict[str, Tensor] = {}
        if settings.feedforward == "most_used":
            batches = [loader.batch(number) for number in range(settings.load_batches)]
            layers = routing_statistics(teacher, batches, loader.tokenizer)
            load_by_layer = {layer.name: torch.tensor(layer.load_E) for layer in layers}
        account = transplant(teacher, student, feedforward=settings.feedforward, load=load_by_layer)
        report(
            f"Of the student's tensors {len(account.taken)} are the teacher's, "
            f"{len(account.derived)} derived from its experts, {len(account.drawn)} random."
        )


def _losses(
    config: DistillRun,
    loader: Loader,
    teacher: SwitchTransformer,
    student: SwitchTransformer,
    mesh: AnyMesh,
    report: Report,
) -> dict[str, float | None]:
    """Return the held-out loss of student, teacher and baseline on the same batches, in nats."""
    baseline = config.distillation.baseline
    share = loader.share(mesh.share, mesh.num_shares)
    batches = share.held_out(config.run.training.evaluate_batches)

    def measure(model: SwitchTransformer) -> float:
        return held_out_loss(model, batches, loader.sources, mesh)["loss"]

    losses: dict[str, float | None] = {"student": measure(student), "teacher": measure(teacher)}
    losses["baseline"] = None if baseline is None else _as_loss(baseline)
    if baseline is not None and losses["baseline"] is None:
        losses["baseline"] = measure(load(baseline, device=default_device(), report=report)[0])
    return losses


def _as_loss(baseline: str) -> float | None:
    """Return the loss that a baseline is given as, None if it is a model."""
    try:
        loss = float(baseline)
    except ValueError:
        return None
    if not (math.isfinite(loss) and loss > 0):
        raise ConfigError(f"distillation.baseline must be a loss above 0 or a model, got {loss}.")
    return loss


def quality_kept(student: float, teacher: float, baseline: float | None) -> float | None:
    """Return (student - baseline) / (teacher - baseline) of qualities, which are losses negated.

    None without a baseline, or where the teacher is no better than it.
    """
    if baseline is None or teacher >= baseline:
        return None
    return (student - baseline) / (teacher - baseline)


def _result(
    config: DistillRun,
    teacher: ModelConfig,
    losses: dict[str, float | None],
    metrics: list[Event],
) -> Event:
    """Return all that distill.json holds."""
    student_loss, teacher_loss = losses["student"], losses["teacher"]
    assert student_loss is not None
    assert teacher_loss is not None
    sizes = {
        "student": count.parameters(config.run.model),
        "teacher": count.parameters(teacher),
    }
    trained = [line for line in metrics if "loss" in line]
    return {
        "student_loss": student_loss,
        "teacher_loss": teacher_loss,
        "baseline_loss": losses["baseline"],
        "quality_kept": quality_kept(student_loss, teacher_loss, losses["baseline"]),
        "compression": 1 - sizes["student"] / sizes["teacher"],
        "parameters": sizes,
        "steps": trained[-1]["step"] if trained else 0,
        "seconds": trained[-1]["seconds"] if trained else 0.0,
        "seeds": [config.run.training.seed],
        "configuration": {"distillation": asdict(config.distillation), **to_sections(config.run)},
    }


def headline(result: Event) -> str:
    """Return the result in the line that the paper reports."""
    sizes = result["parameters"]
    compression = (
        f"compression {result['compression']:.0%} ({sizes['student']:,} of {sizes['teacher']:,} "
        "parameters)"
    )
    losses = f"student {result['student_loss']:.4f}, teacher {result['teacher_loss']:.4f}"
    if result["baseline_loss"] is None:
        return f"Held-out loss: {losses} nats a target; {compression}."
    losses += f", dense baseline {result['baseline_loss']:.4f} nats a target"
    if result["quality_kept"] is None:
        return f"The teacher is no better than the dense baseline: {losses}; {compression}."
    return (
        f"Quality kept: {result['quality_kept']:.0%} of the teacher's gain over the dense baseline "
        f"({losses}); {compression}."
    )


def result_table(result: Event) -> list[dict[str, str]]:
    """Return the result as a row a model, text in every cell."""
    sizes = result["parameters"]
    rows = []
    for name in ("teacher", "student", "baseline"):
        loss = result[f"{name}_loss"]
        if loss is not None:
            size = f"{sizes[name]:,}" if name in sizes else ""
            rows.append({"": name, "held-out loss": f"{loss:.4f}", "parameters": size})
    return rows


def _report(folder: RunFolder, result: Event) -> None:
    write_report(
        folder.report,
        title=f"Distillation: {folder.root.name}",
        headline=headline(result),
        runs=[ReportRun(name=folder.root.name, metrics=read_metrics(folder.metrics))],
        table=result_table(result),
        configuration=result["configuration"],
    )
