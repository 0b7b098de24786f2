"""The configuration of a distillation: who teaches whom, from what start, by which loss."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from switchlm.checkpoint.huggingface import load_config
from switchlm.checkpoint.run_folder import RunFolder
from switchlm.checkpoint.transplant import FeedForwardSource, check_fit
from switchlm.config import from_mapping, override, read_yaml, to_mapping
from switchlm.errors import ConfigError, nearest
from switchlm.model.config import ModelConfig
from switchlm.model.presets import PRESETS, preset
from switchlm.recipes.config import RunConfig, run_config
from switchlm.recipes.start import check_stated, open_tokenizer

SETTINGS = "distillation.yaml"  # in the run's folder, beside config.yaml
_SECTION = "distillation"
_TOP_K = 32


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """The section `distillation`, which stands in a file of its own.

    teacher: a run, a model folder, or a name on the hub. student: `dense`, the teacher's twin of
        equal FLOPs; a preset; or a model like the teacher, which then starts from its own weights.
    baseline: a dense model that was trained without a teacher, or its held-out loss in nats.
    start: from the teacher's weights wherever they fit (all but the experts, for a dense student),
        or `random`. feedforward: what the networks in place of the teacher's experts start from:
        `random`, the `mean` of the experts, or the `most_used` one over load_batches of the data.
    hard_weight, soft_weight, temperature: see training/distillation.py.
    top_k: the teacher names so many words of each target; None names all. cache_logits: a folder
        that keeps what it says; top_k is 32 then, unless stated.
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
        """The model that the student is, if it is one and not an architecture."""
        return None if self.student in ("dense", *PRESETS) else self.student

    def __post_init__(self) -> None:
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
        for name in ("load_batches", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"distillation.{name} must be at least 1, got {value}.")


@dataclass(frozen=True, kw_only=True)
class DistillRun:
    """A distillation, and the run of its student."""

    distillation: DistillationConfig
    run: RunConfig


def configure(
    *,
    teacher: str,
    student: str = "dense",
    sources: Sequence[str] = (),
    overrides: Sequence[str] = (),
    **settings: Any,
) -> DistillRun:
    """Resolve a new distillation.

    sources: text; none takes the teacher's own, if it is a run. overrides: dotted, of any section,
    `distillation` too. settings: more of that section. The shape of the batches is that of the
    teacher's run; the vocabulary is always the teacher's.
    """
    values = {"teacher": teacher, "student": student, **settings}
    distillation = _distillation(values, overrides)
    taught_as = load_config(teacher, report=lambda line: None)
    trained = RunFolder(Path(teacher)).config
    base = run_config(values=read_yaml(trained)) if trained.is_file() else RunConfig()
    base = RunConfig(model=_student(distillation.student, taught_as), data=base.data)
    run = run_config(base, sources=sources, overrides=_others(overrides))
    _check(distillation, taught_as, run)
    tokenizer = open_tokenizer(teacher, "teacher")
    if run.data.tokenizer != base.data.tokenizer:
        check_stated(run.data.tokenizer, tokenizer, f"the teacher {teacher!r}")
    return DistillRun(distillation=distillation, run=run)


def resumed(out: Path, overrides: Sequence[str] = (), **settings: Any) -> DistillRun:
    """Return the distillation that was begun in a folder, some settings changed."""
    folder = RunFolder(out)
    values = {**read_yaml(out / SETTINGS), **settings}
    run = run_config(values=read_yaml(folder.config), overrides=_others(overrides))
    return DistillRun(distillation=_distillation(values, overrides), run=run)


def _distillation(values: dict[str, Any], overrides: Sequence[str]) -> DistillationConfig:
    own = [one for one in overrides if one.startswith(f"{_SECTION}.")]
    values = override({_SECTION: values}, own)[_SECTION]
    config = from_mapping(DistillationConfig, to_mapping(values), _SECTION)
    if config.cache_logits is not None and config.top_k is None:
        return dataclasses.replace(config, top_k=_TOP_K)
    return config


def _others(overrides: Sequence[str]) -> list[str]:
    return [one for one in overrides if not one.startswith(f"{_SECTION}.")]


def _student(name: str, teacher: ModelConfig) -> ModelConfig:
    if name == "dense":
        return teacher.dense_twin()
    if name in PRESETS:
        return dataclasses.replace(
            preset(name),
            vocabulary_size=teacher.vocabulary_size,
            pad_id=teacher.pad_id,
            end_id=teacher.end_id,
        )
    if not Path(name).exists() and "/" not in name:
        raise ConfigError(
            f"The student {name!r} is no preset and no folder.{nearest(name, ['dense', *PRESETS])}"
        )
    return load_config(name, report=lambda line: None)


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
    if distillation.top_k is not None and distillation.top_k > size:
        raise ConfigError(
            f"distillation.top_k is {distillation.top_k:,}, but the teacher's vocabulary has only "
            f"{size:,} tokens. Choose at most so many."
        )
