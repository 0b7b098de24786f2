"""Distil a model into a smaller one: a sparse teacher into its dense twin (section 4.2).

A student learns from text or the examples of tasks, and from its teacher's logits. The result is
that of the paper: the share of the teacher's gain over a dense model that the student keeps, and
how much smaller than the teacher it is.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from switchlm.data.batch import BatchSource
from switchlm.data.pretraining.loader import Loader, open_data
from switchlm.data.tasks.loader import PairLoader
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.evaluation.evaluator import held_out_loss
from switchlm.evaluation.routing import routing_statistics
from switchlm.files import Report, replace_file, to_json
from switchlm.huggingface.init_from import init_from
from switchlm.huggingface.load import load, save
from switchlm.model import count
from switchlm.model.config import ModelConfig
from switchlm.model.precision import in_float32
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.apply import gather_model
from switchlm.parallel.mesh import Mesh, find_device, joined
from switchlm.recipes.config import (
    check_vocabulary,
    load_with_tokenizer,
    open_tokenizer,
    to_sections,
)
from switchlm.recipes.distill_config import DistillationConfig, DistillRun, stored
from switchlm.recipes.finetune import Examples, make_scorer, read_tasks
from switchlm.recipes.pretrain import build_model, record_routing
from switchlm.recipes.start import open_run
from switchlm.recipes.trained_with import metadata_of
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
ROLES = ("teacher", "student", "baseline")


class DistillationData:
    """The data of a distillation.

    loader: the batches of all processes together.
    examples: of the tasks; None for text.
    text_hash: of all examples.
    """

    def __init__(self, config: DistillRun, tokenizer: Tokenizer, report: Report) -> None:
        self.config = config
        self.examples: Examples | None = None
        self.loader: Loader | PairLoader
        self.text_hash: str
        seed = config.run.training.seed
        if config.finetune is None:
            loader = open_data(config.run.data, seed=seed, tokenizer=tokenizer, report=report)
            self.loader, self.text_hash = loader, loader.text_hash
        else:
            self.examples = read_tasks(config.finetune, report)
            self.text_hash = self.examples.text_hash()
            self.loader = self.examples.loader(config.finetune, tokenizer, seed, report)

    def measure(self, model: SwitchTransformer, mesh: Mesh) -> Result:
        """Return the held-out `loss` of a model in nats per target token, in float32.

        On tasks also `score` and `scores`, in per cent. A sharded student is gathered in every
        process, which has room for the larger teacher.
        """
        settings, num_batches = self.config.finetune, self.config.run.training.evaluate_batches
        model = gather_model(model)
        with in_float32(model):
            if settings is None or self.examples is None:
                share = self.loader.share(mesh.data_rank, mesh.data_size)
                metrics = held_out_loss(model, share.held_out(num_batches), share.sources, mesh)
                return {"loss": metrics["loss"]}
            assert isinstance(self.loader, PairLoader)
            score = make_scorer(settings, self.examples, self.loader, mesh, num_batches)
            metrics = score(model)
        return {"loss": metrics.pop("evaluation_loss"), **metrics}


def teacher_batches(
    data: DistillationData,
    model: SwitchTransformer,
    mesh: Mesh,
    should_stop: Callable[[], bool],
    report: Report,
) -> BatchSource | None:
    """Return this process's share of the batches, with the teacher's logits.

    A missing cache is built first; returns None if the user stopped that.
    """
    settings, training = data.config.distillation, data.config.run.training
    loader = data.loader
    share = loader.share(mesh.data_rank, mesh.data_size)
    if not settings.soft_weight:
        return share
    teacher = Teacher(
        model,
        temperature=settings.temperature,
        precision=training.precision,
        top_k=settings.effective_top_k,
    )
    if settings.cache_logits is None:
        return TeacherLoader(share, lambda number, batch: teacher(batch))
    assert settings.effective_top_k is not None, "a cache implies it"
    folder = Path(settings.cache_logits)
    num_batches = training.steps * training.accumulate
    key = CacheKey(
        teacher=hash_weights(model),
        tokenizer=loader.tokenizer.fingerprint(),
        seed=training.seed,
        temperature=settings.temperature,
        precision=training.precision,
        top_k=settings.effective_top_k,
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
    next(batches)  # raises an error for other text now, before the run folder exists
    batches.close()
    return source


def share_kept(student: float, teacher: float, baseline: float) -> float | None:
    """Return (student - baseline) / (teacher - baseline) of qualities, higher being better.

    None if the teacher is no better than the baseline.
    """
    if teacher <= baseline:
        return None
    return (student - baseline) / (teacher - baseline)


def summarise(
    config: DistillRun,
    teacher: ModelConfig,
    metrics: Mapping[str, Mapping[str, Any]],
    folder: RunFolder,
) -> Result:
    """Return the content of distill.json.

    Quality is the score if there are tasks and the baseline has one, else the negated loss, as in
    the paper.

    metrics: of each role, `loss` (held out, nats per target), and `score` and `scores` (per cent)
        on tasks.
    """
    loss = {role: metrics[role]["loss"] if role in metrics else None for role in ROLES}
    score = {role: metrics[role]["score"] for role in ROLES if "score" in metrics.get(role, {})}
    quality = {role: -value for role, value in loss.items() if value is not None}
    by = "loss"
    if config.finetune is not None and ("baseline" in score or "baseline" not in metrics):
        quality, by = score, "score"
    sizes = {
        "student": count.parameters(config.run.model),
        "teacher": count.parameters(teacher),
    }
    trained = [line for line in read_metrics(folder.metrics) if "loss" in line]
    scores = {role: metrics[role]["scores"] for role in score}
    return {
        **{f"{role}_loss": value for role, value in loss.items()},
        **{f"{role}_score": value for role, value in score.items()},
        **({"scores": scores} if scores else {}),
        "score_without_input": metrics["student"].get("score_without_input"),
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
    """Return the result as one sentence, as the paper reports it."""
    by, sizes = result["quality"], result["parameters"]
    form, unit = (".2f", "%") if by == "score" else (".4f", " nats per target")
    found = {role: result.get(f"{role}_{by}") for role in ("student", "teacher", "baseline")}
    blind = result.get("score_without_input") if by == "score" else None
    values = ", ".join(
        f"{'dense baseline' if role == 'baseline' else role} {value:{form}}{unit}"
        for role, value in found.items()
        if value is not None
    )
    if blind is not None:
        values += f", without reading the input {blind:{form}}{unit}"
    compression = (
        f"compression {result['compression']:.0%} ({sizes['student']:,} of {sizes['teacher']:,} "
        "parameters)"
    )
    if found["baseline"] is None:
        return f"{'Score' if by == 'score' else 'Held-out loss'}: {values}; {compression}."
    if result["quality_kept"] is None:
        return f"The teacher is no better than the dense baseline: {values}; {compression}."
    return (
        f"Quality kept: {result['quality_kept']:.0%} of the teacher's gain over the dense baseline "
        f"({values}); {compression}."
    )


def result_table(result: Result) -> list[dict[str, str]]:
    """Return the result with one row per model, all text."""
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

    Writes the run folder OUT, with distillation.yaml beside config.yaml, and the result in
    distill.json; nothing if the user stops while the cache is built. With `resume` it continues
    from the newest checkpoint there; a run that has ended, and would take another course now,
    yields `{"ended": text}` alone. Started by torchrun, the student is sharded over the mesh, and
    each process has the full teacher.
    """
    settings, run = config.distillation, config.run
    with joined(run.mesh, run.training.device) as mesh, ExitStack() as opened:
        device = find_device(run.training.device)
        resume = resume or mesh.restarted
        started = opened.enter_context(open_run(out, resume, mesh))
        folder = started.folder
        files = {folder.config.name: to_sections(run), folder.distillation.name: stored(config)}
        ended = started.check(files, report)
        if ended is not None:
            yield {"ended": ended}
            return
        yield {"phase": "loading the teacher"}
        teacher, tokenizer = load_with_tokenizer(settings.teacher, "teacher", report, device)
        _check_vocabularies(settings, tokenizer)
        yield {"phase": "reading text"}
        with mesh.local_rank_zero_first("text"):
            data = DistillationData(config, tokenizer, report)
        source = teacher_batches(data, teacher, mesh, should_stop, report)
        if source is None:
            return
        started.begin(files, tokenizer, text=data.text_hash)
        student = build_model(run, mesh)
        if not folder.has_checkpoint():
            init_student(settings, teacher, student, data.loader, report)
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
        read = run.data if config.finetune is None else None
        about = metadata_of(student, read, config.finetune)
        save(student, tokenizer, folder.model, group=mesh.storage, metadata=about)
        routing = record_routing(student, source, tokenizer, folder, mesh)
        metrics = {
            "student": data.measure(student, mesh),
            "teacher": data.measure(teacher, mesh),
        }
        if settings.baseline_loss is not None:
            metrics["baseline"] = {"loss": settings.baseline_loss}
        elif settings.baseline_model is not None:
            baseline, _ = load(settings.baseline_model, device=device, report=report)
            metrics["baseline"] = data.measure(baseline, mesh)
        if not mesh.is_main:
            return
        result = summarise(config, teacher.config, metrics, folder)
        text = to_json(result, indent=2) + "\n"
        replace_file(folder.result, text.encode("utf-8"))
        write_report(
            folder.report,
            title=f"Distillation: {out.name}",
            headline=headline(result),
            runs=[ReportRun(name=out.name, metrics=read_metrics(folder.metrics), routing=routing)],
            table=result_table(result),
            configuration=result["configuration"],
        )
        yield {"result": result}


def _check_vocabularies(settings: DistillationConfig, tokenizer: Tokenizer) -> None:
    """Raise CheckpointError for a student or baseline of another vocabulary."""
    names = {"student": settings.trained_student, "baseline": settings.baseline_model}
    for role, name in names.items():
        if name is not None:
            other = open_tokenizer(name, role)
            teacher = f"the teacher {settings.teacher!r}"
            check_vocabulary(tokenizer, other, teacher, f"The {role} {name!r}")


def init_student(
    settings: DistillationConfig,
    teacher: SwitchTransformer,
    student: SwitchTransformer,
    loader: Loader | PairLoader,
    report: Report,
) -> None:
    """Set the student's initial weights, if they are not random."""
    if settings.trained_student is not None:
        init_from(load(settings.trained_student)[0], student)
    elif settings.start == "teacher":
        load_by_layer: dict[str, Tensor] = {}
        if settings.feedforward == "most_used":
            batches = [loader.batch(number) for number in range(settings.load_batches)]
            layers = routing_statistics(teacher, batches, loader.tokenizer)
            load_by_layer = {layer.name: torch.tensor(layer.load_E) for layer in layers}
        result = init_from(teacher, student, feedforward=settings.feedforward, load=load_by_layer)
        report(
            f"Of the student's tensors {len(result.copied)} are the teacher's, "
            f"{len(result.derived)} derived from its experts, {len(result.random)} random."
        )
