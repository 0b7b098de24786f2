"""Distil a model into a smaller one: a sparse teacher into its dense twin (section 4.2).

What the paper reports comes out: the share of the teacher's gain over a dense model that the
student keeps, and how much smaller than the teacher it is.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from switchlm.checkpoint.files import replace_file
from switchlm.checkpoint.huggingface import load, save
from switchlm.checkpoint.transplant import transplant
from switchlm.config import write_yaml
from switchlm.data.loader import Loader
from switchlm.data.pairs import PairLoader
from switchlm.data.tokenizer import Tokenizer
from switchlm.evaluation.evaluator import held_out_loss
from switchlm.evaluation.routing import routing_statistics
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.mesh import AnyMesh, joined
from switchlm.recipes.distill_config import SETTINGS, DistillationConfig, DistillRun, stored
from switchlm.recipes.distill_data import Reading, taught
from switchlm.recipes.distill_result import summarise, write_page
from switchlm.recipes.pretrain import begin, build_model, default_device, open_folder
from switchlm.recipes.routing import record_routing
from switchlm.recipes.start import check_vocabulary, open_tokenizer, open_whole
from switchlm.training.distillation import Distillation
from switchlm.training.loop import train
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

    Text is read, or the examples of tasks. Writes the run folder OUT, with distillation.yaml beside
    config.yaml, and the result in distill.json; neither if the user stops the making of a cache.
    With `resume` it goes on from the newest checkpoint there. Started by torchrun, the student is
    spread over the mesh; the teacher is whole in each process.
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
    routing = record_routing(student, source, tokenizer, folder, mesh)
    models = _measured(settings, teacher, student, report)
    figures = {role: _measure(reading, model, mesh) for role, model in models}
    if settings.baseline_loss is not None:
        figures["baseline"] = {"loss": settings.baseline_loss}
    if not mesh.is_main:
        return
    result = summarise(config, teacher.config, figures, folder)
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    replace_file(out / RESULT, text.encode("utf-8"))
    write_page(folder, result, routing)
    yield {"result": result}


def _check_others(settings: DistillationConfig, tokenizer: Tokenizer) -> None:
    """Refuse a student or baseline of other words before any work is done."""
    others = {}
    if settings.trained_student is not None:
        others["student"] = settings.trained_student
    if settings.baseline_model is not None:
        others["baseline"] = settings.baseline_model
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


def _measured(
    settings: DistillationConfig,
    teacher: SwitchTransformer,
    student: SwitchTransformer,
    report: Report,
) -> Iterator[tuple[str, SwitchTransformer]]:
    """Yield every model to be measured, and its role; the baseline is loaded for that alone."""
    yield "student", student
    yield "teacher", teacher
    if settings.baseline_model is not None:
        yield "baseline", load(settings.baseline_model, device=default_device(), report=report)[0]


def _measure(reading: Reading, model: SwitchTransformer, mesh: AnyMesh) -> dict[str, Any]:
    """Return the held-out loss of a model in nats a target, and its scores on tasks."""
    share = reading.loader.share(mesh.share, mesh.num_shares)
    batches = share.held_out(reading.config.run.training.evaluate_batches)
    loss = held_out_loss(model, batches, share.sources, mesh)["loss"]
    return {"loss": loss, **reading.score(model, mesh)}
