"""Distil a model into a smaller one: a sparse teacher into its dense twin (section 4.2).

A student reads text or the examples of tasks, with what its teacher says of each. What the paper
reports comes out: the share of the teacher's gain over a dense model that the student keeps, and
how much smaller than the teacher it is.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from switchlm.config import write_yaml
from switchlm.data.batch import BatchSource
from switchlm.data.pretraining.loader import Loader, open_data
from switchlm.data.tasks.loader import PairLoader
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.evaluation.evaluator import held_out_loss
from switchlm.evaluation.routing import routing_statistics
from switchlm.files import Report, replace_file
from switchlm.huggingface.init_from import transplant
from switchlm.huggingface.load import load, save
from switchlm.model import count
from switchlm.model.config import ModelConfig
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.apply import gather_model
from switchlm.parallel.mesh import Mesh, default_device, joined
from switchlm.recipes.config import check_vocabulary, open_tokenizer, open_whole, to_sections
from switchlm.recipes.distill_config import SETTINGS, DistillationConfig, DistillRun, stored
from switchlm.recipes.finetune import Examples, read_tasks, scorer
from switchlm.recipes.pretrain import begin, build_model, open_folder, record_routing
from switchlm.report.write import ReportRun, write_report
from switchlm.training.distillation import (
    CacheKey,
    Distillation,
    LogitCache,
    Teacher,
    TeacherLoader,
    build_cache,
    hash_weights,
)
from switchlm.training.loop import train
from switchlm.training.monitor import read_metrics
from switchlm.training.run_folder import RunFolder
from switchlm.training.step import Objective, target_cross_entropy

Result = dict[str, Any]
RESULT = "distill.json"
ROLES = ("teacher", "student", "baseline")


class Reading:
    """The data of a distillation.

    loader: the batches of all processes together. examples: of the tasks; None where it is text.
    """

    def __init__(self, config: DistillRun, tokenizer: Tokenizer, report: Report) -> None:
        self.config = config
        self.examples: Examples | None = None
        self.loader: Loader | PairLoader
        seed = config.run.training.seed
        if config.finetune is None:
            self.loader = open_data(config.run.data, seed=seed, tokenizer=tokenizer, report=report)
        else:
            self.examples = read_tasks(config.finetune)
            self.loader = self.examples.loader(config.finetune, tokenizer, seed, report)

    def measure(self, model: SwitchTransformer, mesh: Mesh) -> Result:
        """Return the held-out loss of a model in nats per target token.

        On tasks also score and scores, in per cent.
        """
        settings, num_batches = self.config.finetune, self.config.run.training.evaluate_batches
        if settings is None or self.examples is None:
            share = self.loader.share(mesh.data_rank, mesh.data_size)
            figures = held_out_loss(model, share.held_out(num_batches), share.sources, mesh)
            return {"loss": figures["loss"]}
        assert isinstance(self.loader, PairLoader)
        score = scorer(settings, self.examples, self.loader, mesh, num_batches)
        figures = score(gather_model(model))
        return {
            "loss": figures["evaluation_loss"],
            "score": figures["score"],
            "scores": figures["scores"],
        }


def taught(
    reading: Reading,
    model: SwitchTransformer,
    mesh: Mesh,
    should_stop: Callable[[], bool],
    report: Report,
) -> BatchSource | None:
    """Return this process's share of the batches, with what the teacher says of them.

    A cache that is not there yet is made first; None if the user stopped that.
    """
    settings, training = reading.config.distillation, reading.config.run.training
    loader = reading.loader
    share = loader.share(mesh.data_rank, mesh.data_size)
    if not settings.soft_weight:
        return share
    teacher = Teacher(
        model,
        temperature=settings.temperature,
        precision=training.precision,
        top_k=settings.num_words,
    )
    if settings.cache_logits is None:
        return TeacherLoader(share, lambda number, batch: teacher(batch))
    assert settings.num_words is not None, "a cache implies it"
    folder = Path(settings.cache_logits)
    num_batches = training.steps * training.accumulate
    key = CacheKey(
        teacher=hash_weights(model),
        tokenizer=loader.tokenizer.fingerprint(),
        seed=training.seed,
        temperature=settings.temperature,
        precision=training.precision,
        top_k=settings.num_words,
    )
    with mesh.local_rank_zero_first("logits"):
        build_cache(folder, key, teacher, loader, num_batches, should_stop, report)
    if mesh.any_rank(not folder.exists()):
        return None
    cache = LogitCache(
        folder,
        key,
        num_batches * loader.batch_size,
        share=mesh.data_rank,
        num_shares=mesh.data_size,
    )
    source = TeacherLoader(share, cache.add_teacher)
    batches = source.iterate(0)
    next(batches)  # other text is refused now, before there is a run
    batches.close()
    return source


def share_kept(student: float, teacher: float, baseline: float) -> float | None:
    """Return (student - baseline) / (teacher - baseline) of qualities, the more the better.

    None where the teacher is no better than the baseline.
    """
    if teacher <= baseline:
        return None
    return (student - baseline) / (teacher - baseline)


def summarise(
    config: DistillRun,
    teacher: ModelConfig,
    figures: Mapping[str, Mapping[str, Any]],
    folder: RunFolder,
) -> Result:
    """Return all that distill.json holds.

    figures: of each role, `loss` (held out, nats per target), and `score` and `scores` (per cent)
        on tasks. Quality is the score where there are tasks and the baseline has one, else the loss
        negated, the paper's measure.
    """
    loss = {role: figures[role]["loss"] if role in figures else None for role in ROLES}
    score = {role: figures[role]["score"] for role in ROLES if "score" in figures.get(role, {})}
    quality = {role: -value for role, value in loss.items() if value is not None}
    by = "loss"
    if config.finetune is not None and ("baseline" in score or "baseline" not in figures):
        quality, by = score, "score"
    sizes = {
        "student": count.parameters(config.run.model),
        "teacher": count.parameters(teacher),
    }
    trained = [line for line in read_metrics(folder.metrics) if "loss" in line]
    scores = {role: figures[role]["scores"] for role in score}
    return {
        **{f"{role}_loss": value for role, value in loss.items()},
        **{f"{role}_score": value for role, value in score.items()},
        **({"scores": scores} if scores else {}),
        "quality": by,
        "quality_kept": share_kept(**quality) if "baseline" in quality else None,
        "compression": 1 - sizes["student"] / sizes["teacher"],
        "parameters": sizes,
        "steps": trained[-1]["step"] if trained else 0,
        "seconds": trained[-1]["seconds"] if trained else 0.0,
        "seeds": [config.run.training.seed],
        "configuration": {**stored(config), **to_sections(config.run)},
    }


def headline(result: Result) -> str:
    """Return the result in the line that the paper reports."""
    by, sizes = result["quality"], result["parameters"]
    form, unit = (".2f", "%") if by == "score" else (".4f", " nats per target")
    found = {role: result.get(f"{role}_{by}") for role in ("student", "teacher", "baseline")}
    said = ", ".join(
        f"{'dense baseline' if role == 'baseline' else role} {value:{form}}{unit}"
        for role, value in found.items()
        if value is not None
    )
    compression = (
        f"compression {result['compression']:.0%} ({sizes['student']:,} of {sizes['teacher']:,} "
        "parameters)"
    )
    if found["baseline"] is None:
        return f"{'Score' if by == 'score' else 'Held-out loss'}: {said}; {compression}."
    if result["quality_kept"] is None:
        return f"The teacher is no better than the dense baseline: {said}; {compression}."
    return (
        f"Quality kept: {result['quality_kept']:.0%} of the teacher's gain over the dense baseline "
        f"({said}); {compression}."
    )


def result_table(result: Result) -> list[dict[str, str]]:
    """Return the result as a row a model, text in every cell."""
    rows = []
    for role in ROLES:
        loss, score = result[f"{role}_loss"], result.get(f"{role}_score")
        if loss is not None:
            size = result["parameters"].get(role)
            row = {"": role, "held-out loss": f"{loss:.4f}"}
            if result["quality"] == "score":
                row["score"] = "" if score is None else f"{score:.2f}%"
            rows.append({**row, "parameters": "" if size is None else f"{size:,}"})
    return rows


def distill(
    config: DistillRun,
    out: Path,
    *,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    report: Report = lambda line: None,
) -> Iterator[Result]:
    """Train a student; yield `{"phase": text}`, metrics lines, and last `{"result": {...}}`.

    Text is read, or the examples of tasks. Writes the run folder OUT, with distillation.yaml beside
    config.yaml, and the result in distill.json; neither if the user stops the making of a cache.
    With `resume` it goes on from the newest checkpoint there. Started by torchrun, the student is
    spread over the mesh; the teacher is whole in each process.
    """
    settings, run = config.distillation, config.run
    with joined(run.mesh) as mesh:
        resume = resume or mesh.restarted
        folder = open_folder(out, resume)
        yield {"phase": "loading the teacher"}
        teacher, tokenizer = open_whole(settings.teacher, "teacher", report, default_device())
        _check_others(settings, tokenizer)
        yield {"phase": "reading text"}
        with mesh.local_rank_zero_first("text"):
            reading = Reading(config, tokenizer, report)
        source = taught(reading, teacher, mesh, should_stop, report)
        if source is None:
            return
        begin(folder, run, tokenizer, mesh)
        if mesh.is_main:
            write_yaml(out / SETTINGS, stored(config))
        student = build_model(run, mesh)
        if not folder.has_checkpoint():
            _start(settings, teacher, student, reading.loader, report)
        objective: Objective = target_cross_entropy
        if settings.soft_weight:
            objective = Distillation(
                hard_weight=settings.hard_weight,
                soft_weight=settings.soft_weight,
                temperature=settings.temperature,
            )
        yield {"phase": "training"}
        yield from train(
            student,
            source,
            run.training,
            run=folder,
            resume=resume,
            should_stop=should_stop,
            mesh=mesh,
            kernels=run.kernels,
            objective=objective,
        )
        yield {"phase": "saving and measuring"}
        save(student, tokenizer, folder.model, group=mesh.storage)
        routing = record_routing(student, source, tokenizer, folder, mesh)
        figures = {
            "student": reading.measure(student, mesh),
            "teacher": reading.measure(teacher, mesh),
        }
        if settings.baseline_loss is not None:
            figures["baseline"] = {"loss": settings.baseline_loss}
        elif settings.baseline_model is not None:
            baseline, _ = load(settings.baseline_model, device=default_device(), report=report)
            figures["baseline"] = reading.measure(baseline, mesh)
        if not mesh.is_main:
            return
        result = summarise(config, teacher.config, figures, folder)
        text = json.dumps(result, indent=2, allow_nan=False) + "\n"
        replace_file(out / RESULT, text.encode("utf-8"))
        metrics = read_metrics(folder.metrics)
        write_report(
            folder.report,
            title=f"Distillation: {out.name}",
            headline=headline(result),
            runs=[ReportRun(name=out.name, metrics=metrics, routing=routing)],
            table=result_table(result),
            configuration=result["configuration"],
        )
        yield {"result": result}


def _check_others(settings: DistillationConfig, tokenizer: Tokenizer) -> None:
    """Refuse a student or baseline of another vocabulary before any work is done."""
    others = {"student": settings.trained_student, "baseline": settings.baseline_model}
    for role, name in others.items():
        if name is not None:
            other = open_tokenizer(name, role)
            teacher = f"the teacher {settings.teacher!r}"
            check_vocabulary(tokenizer, other, teacher, f"The {role} {name!r}")


def _start(
    settings: DistillationConfig,
    teacher: SwitchTransformer,
    student: SwitchTransformer,
    loader: Loader | PairLoader,
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
