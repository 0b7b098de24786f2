"""What a distillation comes to: how much of the teacher's gain is kept, and the compression."""

from collections.abc import Mapping, Sequence
from typing import Any

from switchlm.checkpoint.run_folder import RunFolder
from switchlm.model import count
from switchlm.model.config import ModelConfig
from switchlm.recipes.config import to_sections
from switchlm.recipes.distill_config import DistillRun, stored
from switchlm.report.write import ReportRun, write_report
from switchlm.training.monitor import read_metrics

Result = dict[str, Any]
ROLES = ("teacher", "student", "baseline")


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

    figures: of each role, `loss` (held out, nats a target), and `score` and `scores` (per cent) on
    tasks. Quality is the score where there are tasks and the baseline has one, else the loss
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
    form, unit = (".2f", "%") if by == "score" else (".4f", " nats a target")
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


def write_page(
    folder: RunFolder, result: Result, routing: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Write report.html; routing: that of the student's Switch layers, if it has any."""
    run = ReportRun(name=folder.root.name, metrics=read_metrics(folder.metrics), routing=routing)
    write_report(
        folder.report,
        title=f"Distillation: {folder.root.name}",
        headline=headline(result),
        runs=[run],
        table=result_table(result),
        configuration=result["configuration"],
    )
