"""The configuration of a distillation: teacher, student, initial weights and loss."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from switchlm.config import check_choices, from_mapping, override, to_mapping
from switchlm.data.config import DataConfig
from switchlm.data.tasks.registry import MIXTURES, TASKS
from switchlm.errors import ConfigError, nearest
from switchlm.huggingface.init_from import FeedForwardSource, check_fit
from switchlm.huggingface.load import load_config
from switchlm.model.config import ModelConfig
from switchlm.model.presets import PRESETS, preset
from switchlm.recipes.config import (
    RunConfig,
    check_stated,
    open_tokenizer,
    run_config,
    with_vocabulary,
)
from switchlm.recipes.finetune_config import FinetuneConfig, paper_training
from switchlm.recipes.start import settings_of_run
from switchlm.recipes.trained_with import trained_with
from switchlm.training.config import TrainingConfig
from switchlm.training.run_folder import RunFolder

TOP_K = 32
_DISTILLATION, _FINETUNE = "distillation", "finetune"
# Settings of a fine-tuned teacher's run that other tasks take over.
_ROW_SETTINGS = ("input_length", "target_length", "batch_size", "pack")

Section = TypeVar("Section")


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """The section `distillation`, in a file of its own.

    teacher: a run, a model folder, or a name on the hub.
    student: `dense`, the teacher's twin of equal FLOPs; a preset; or a model like the teacher,
        which then starts from its own weights.
    baseline: a dense model that was trained without a teacher, or its held-out loss in nats.
    start: initial weights: `teacher`, wherever they fit (all but the experts, for a dense student),
        or `random`.
    feedforward: initial weights of the networks in place of the teacher's experts: `random`, the
        `mean` of the experts, or the `most_used` one over load_batches of the data.
    load_batches: number of batches that `most_used` counts.
    hard_weight, soft_weight: of the loss against the text, and against the teacher.
    temperature: softens both distributions; the soft loss is multiplied by its square.
    top_k: number of the teacher's most probable tokens that are used per target; None uses all.
    cache_logits: a folder that the teacher's logits are cached in; top_k is then 32 by default.
    """

    teacher: str
    student: str = "dense"
    baseline: str | None = None
    start: Literal["teacher", "random"] = "teacher"
    feedforward: FeedForwardSource = "random"
    load_batches: int = 16
    hard_weight: float = 0.75
    soft_weight: float = 0.25
    temperature: float = 1.0
    top_k: int | None = None
    cache_logits: str | None = None

    @property
    def trained_student(self) -> str | None:
        """The student, if it is a trained model and not an architecture."""
        return None if self.student in ("dense", *PRESETS) else self.student

    @property
    def baseline_loss(self) -> float | None:
        """The baseline, if it is given as its held-out loss."""
        try:
            return None if self.baseline is None else float(self.baseline)
        except ValueError:
            return None

    @property
    def baseline_model(self) -> str | None:
        """The baseline, if it is a model."""
        return self.baseline if self.baseline_loss is None else None

    @property
    def effective_top_k(self) -> int | None:
        """The number of the teacher's tokens used per target; None for all."""
        return TOP_K if self.top_k is None and self.cache_logits is not None else self.top_k

    def __post_init__(self) -> None:
        check_choices(self, "distillation")
        for name in ("hard_weight", "soft_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"distillation.{name} must be 0 or more, got {getattr(self, name)}."
                )
        if self.hard_weight + self.soft_weight == 0:
            raise ConfigError(
                "distillation.hard_weight and distillation.soft_weight are both 0: there is "
                "nothing to learn from. Set one of them."
            )
        if self.temperature <= 0:
            raise ConfigError(f"distillation.temperature must be positive, got {self.temperature}.")
        if self.baseline_loss is not None and not 0 < self.baseline_loss < math.inf:
            raise ConfigError(
                "distillation.baseline must be a loss above 0 or a model, got "
                f"{self.baseline_loss}."
            )
        for name in ("load_batches", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"distillation.{name} must be at least 1, got {value}.")


@dataclass(frozen=True, kw_only=True)
class DistillRun:
    """A distillation, and the run of its student.

    finetune: the tasks that are read instead of `run.data`; its fields about training a model are
        ignored.
    """

    distillation: DistillationConfig
    run: RunConfig
    finetune: FinetuneConfig | None = None


def configure(
    *,
    teacher: str,
    student: str = "dense",
    sources: Sequence[str] = (),
    tasks: Sequence[str] = (),
    overrides: Sequence[str] = (),
    **settings: Any,
) -> DistillRun:
    """Resolve a new distillation.

    The default data is what the teacher, if it is a run, was trained on: its text, or its tasks.
    Batches have the shape of the teacher's run; the vocabulary is always the teacher's.

    sources: text; with tasks, the folder or file of the task.
    overrides: dotted, of any section.
    settings: other fields of the section `distillation`.
    """
    values = {"teacher": teacher, "student": student, **settings}
    distillation = _section(DistillationConfig, _DISTILLATION, values, overrides)
    teacher_model = load_config(teacher, report=lambda line: None)
    before = trained_with(teacher)
    finetune = _finetune(teacher, before.get(_FINETUNE), sources, tasks, overrides)
    base = RunConfig(
        model=_student(distillation.student, teacher_model),
        data=from_mapping(DataConfig, before.get("data", {}), "data"),
        training=TrainingConfig() if finetune is None else paper_training(),
    )
    texts = sources if finetune is None else ()
    run = run_config(base, sources=texts, overrides=_others(overrides))
    _check(distillation, teacher_model, run)
    tokenizer = open_tokenizer(teacher, "teacher")
    if run.data.tokenizer != base.data.tokenizer:
        check_stated(run.data.tokenizer, tokenizer, f"the teacher {teacher!r}")
    return DistillRun(distillation=distillation, run=run, finetune=finetune)


def stored(config: DistillRun) -> dict[str, Any]:
    """Return the content of distillation.yaml: all but the run, which is in config.yaml."""
    values = {_DISTILLATION: to_mapping(config.distillation)}
    if config.finetune is not None:
        values[_FINETUNE] = to_mapping(config.finetune)
    return values


def resumed(out: Path, overrides: Sequence[str] = (), **settings: Any) -> DistillRun:
    """Return the distillation that was started in a folder, with some settings changed."""
    folder = RunFolder(out)
    before = settings_of_run(folder, folder.distillation.name)
    if _DISTILLATION not in before:
        raise ConfigError(f"The run in {str(out)!r} is no distillation; choose another --out.")
    values = {**before[_DISTILLATION], **settings}
    finetune = before.get(_FINETUNE)
    if finetune is not None:
        finetune = _section(FinetuneConfig, _FINETUNE, finetune, overrides)
    return DistillRun(
        distillation=_section(DistillationConfig, _DISTILLATION, values, overrides),
        run=run_config(values=settings_of_run(folder), overrides=_others(overrides)),
        finetune=finetune,
    )


def _section(
    cls: type[Section], name: str, values: Mapping[str, Any], overrides: Sequence[str]
) -> Section:
    own = [one for one in overrides if one.startswith(f"{name}.")]
    return from_mapping(cls, override({name: dict(values)}, own)[name], name)


def _others(overrides: Sequence[str]) -> list[str]:
    return [one for one in overrides if not one.startswith((f"{_DISTILLATION}.", f"{_FINETUNE}."))]


def _finetune(
    teacher: str,
    before: Mapping[str, Any] | None,
    sources: Sequence[str],
    tasks: Sequence[str],
    overrides: Sequence[str],
) -> FinetuneConfig | None:
    """Return the tasks to read: those named, or the teacher's own; None for text."""
    if not tasks and (sources or before is None):
        return None
    values = {**(before or {}), "model": teacher}
    if tasks:
        if len(sources) > 1:
            raise ConfigError(
                f"There are {len(sources)} places for the data of tasks: give one --data, a folder "
                "or file, or none for the hub."
            )
        own = {"tasks": list(tasks), "data": sources[0] if sources else None}
        named = any(task in TASKS or task in MIXTURES for task in tasks)
        kept = _ROW_SETTINGS if named else (*_ROW_SETTINGS, "columns")
        limits = {name: values[name] for name in kept if name in values}
        values = {**limits, "model": teacher, **own}
    return _section(FinetuneConfig, _FINETUNE, values, overrides)


def _student(name: str, teacher: ModelConfig) -> ModelConfig:
    if name == "dense":
        return teacher.dense_twin()
    if name in PRESETS:
        return with_vocabulary(RunConfig(model=preset(name)), teacher).model
    if not Path(name).exists() and "/" not in name:
        raise ConfigError(
            f"The student {name!r} is no preset and no folder.{nearest(name, ['dense', *PRESETS])}"
        )
    return load_config(name, report=lambda line: None, to_train=True)


def _check(distillation: DistillationConfig, teacher: ModelConfig, run: RunConfig) -> None:
    size = teacher.vocabulary_size
    if run.model.vocabulary_size != size:
        raise ConfigError(
            f"The student {distillation.student!r} has a vocabulary of "
            f"{run.model.vocabulary_size:,} tokens and the teacher {distillation.teacher!r} one of "
            f"{size:,}. A student learns the teacher's probabilities of each token, so theirs must "
            "be the same: take a preset, or a student trained with the teacher's tokenizer."
        )
    if distillation.start == "teacher" and distillation.trained_student is None:
        check_fit(teacher, run.model, feedforward=distillation.feedforward)
    if distillation.effective_top_k is not None and distillation.effective_top_k > size:
        raise ConfigError(
            f"distillation.top_k is {distillation.effective_top_k:,}, but the teacher's vocabulary "
            f"has only {size:,} tokens. Choose at most {size:,}."
        )
