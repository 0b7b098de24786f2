"""The configuration of a fine-tuning run: the paper's settings, a YAML file, dotted overrides."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from switchlm.config import check_choices, from_mapping, override
from switchlm.data.config import LONGEST
from switchlm.data.tasks.mixture import TaskOptions
from switchlm.errors import ConfigError
from switchlm.files import Report
from switchlm.huggingface.load import load_config
from switchlm.model.config import ModelConfig
from switchlm.parallel.mesh import MeshConfig
from switchlm.recipes.config import build_config, merge_sections, to_sections
from switchlm.training.config import KernelsConfig, TrainingConfig
from switchlm.training.optimizer import Trainable

DROPOUT, EXPERT_DROPOUT = 0.1, 0.4  # the last row of Table 4


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """The `finetune` section: the model, the tasks, and the part of the model that is trained.

    model: a run, a model folder, or a name on the hub.
    tasks: names of tasks or of mixtures, or paths of JSONL, TSV or CSV files; several are mixed in
        proportion to their tokens, and have equal weight in the score.
    data: the folder or file of the named tasks; None reads the hub.
    columns: how to read your own file, and whether to skip empty examples.
    train_split, validation_split: the splits to train on, and to score on.
    input_length, target_length: the most tokens in a row, the end token included. Rows are as long
        as the longest of their batch needs.
    batch_size: rows in the batch of a step.
    pack: put several short examples into a row, so that a step learns from more of them.
    truncate_targets: cut targets that are too long instead of refusing them.
    evaluation_examples: score on at most this number of examples of each task, spread evenly over
        its split; None takes all.
    patience: number of evaluations without a better score after which the run ends; None is never.
    trainable: `all`, `non-expert`, `expert` or `router` parameters.
    lora_rank, lora_alpha: with a rank only low-rank adapters train (model/lora.py), scaled by
        lora_alpha / lora_rank.
    """

    model: str = ""
    tasks: tuple[str, ...] = ()
    data: str | None = None
    columns: TaskOptions = field(default_factory=TaskOptions)
    train_split: str = "train"
    validation_split: str = "validation"
    input_length: int = 512
    target_length: int = 128
    batch_size: int = 32
    pack: bool = False
    truncate_targets: bool = False
    evaluation_examples: int | None = None
    patience: int | None = None
    trainable: Trainable = "all"
    lora_rank: int | None = None
    lora_alpha: float = 16.0

    def __post_init__(self) -> None:
        check_choices(self, "finetune")
        if not self.model:
            raise ConfigError("There is no model to fine-tune: name one with --model.")
        if not self.tasks:
            raise ConfigError("There is no task to fine-tune on: name one with --task.")
        for name, least, most in (
            ("input_length", 2, LONGEST),
            ("target_length", 2, LONGEST),
            ("batch_size", 1, 2**20),
            ("evaluation_examples", 1, 2**62),
            ("patience", 1, 2**31),
            ("lora_rank", 1, 2**16),
        ):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ConfigError(f"finetune.{name} must lie in [{least}, {most}], got {value}.")
        if self.lora_alpha <= 0:
            raise ConfigError(f"finetune.lora_alpha must be positive, got {self.lora_alpha}.")
        if self.lora_rank is not None and self.trainable != "all":
            raise ConfigError(
                f"finetune.lora_rank is {self.lora_rank}, so only adapters train, but "
                f"finetune.trainable is {self.trainable!r}: set one or the other."
            )


@dataclass(frozen=True, kw_only=True)
class FinetuneRun:
    """The configuration of a fine-tuning run. The model's shape is the checkpoint's."""

    finetune: FinetuneConfig
    model: ModelConfig
    training: TrainingConfig
    mesh: MeshConfig = field(default_factory=MeshConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)

    def __post_init__(self) -> None:
        if self.training.evaluate_every is None:
            raise ConfigError(
                "training.evaluate_every is null, but a fine-tuning run keeps the model of the "
                "best score: set it to a number of steps; the paper takes 200."
            )


def paper_training(lora: bool = False) -> TrainingConfig:
    """Return the settings of section 4.1: T5's optimizer and rate, evaluation every 200 steps.

    lora: take AdamW; adapters start at zero, where Adafactor's relative steps are too small.
    """
    return TrainingConfig(
        steps=16_000,
        learning_rate=1e-3,
        schedule="constant",
        warmup_steps=0,
        optimizer="adamw" if lora else "adafactor",
        evaluate_every=200,
        checkpoint_every=200,
    )


def finetune_run(
    values: Mapping[str, Any],
    *,
    stated: Mapping[str, Any],
    overrides: Sequence[str] = (),
    report: Report | None = None,
) -> FinetuneRun:
    """Resolve a configuration: the paper's settings, then a file, then what is stated.

    values: sections as in a YAML file.
    stated: fields of the `finetune` section.
    overrides: dotted.

    Raises ConfigError for invalid values, such as a shape other than the model's.
    """
    sections = merge_sections(values, {"finetune": stated} if stated else {})
    sections = override(sections, overrides)
    finetune = from_mapping(FinetuneConfig, sections.get("finetune", {}), "finetune")
    checkpoint = load_config(finetune.model, report=report, to_train=True)
    default = FinetuneRun(
        finetune=finetune,
        model=dataclasses.replace(checkpoint, dropout=DROPOUT, expert_dropout=EXPERT_DROPOUT),
        training=paper_training(lora=finetune.lora_rank is not None),
    )
    config = build_config(FinetuneRun, merge_sections(to_sections(default), sections))
    _refuse_another_shape(config.model, checkpoint)
    return config


def _refuse_another_shape(model: ModelConfig, checkpoint: ModelConfig) -> None:
    """Raise ConfigError for a model that differs in more than dropout and routing."""
    free = ("dropout", "expert_dropout", "router")
    for one in dataclasses.fields(ModelConfig):
        found, saved = getattr(model, one.name), getattr(checkpoint, one.name)
        if one.name not in free and found != saved:
            raise ConfigError(
                f"model.{one.name} is {found}, but the model to fine-tune has {saved}. Of the "
                f"model only {', '.join(free[:2])} and the router can be set."
            )
    for decoder in (False, True):
        layers = range(model.num_decoder_layers if decoder else model.num_encoder_layers)
        if any(
            model.is_sparse(layer, decoder=decoder) != checkpoint.is_sparse(layer, decoder=decoder)
            for layer in layers
        ):
            raise ConfigError(
                f"router.mode is {model.router.mode!r}, which puts Switch layers where the model "
                f"to fine-tune has dense ones; leave it at {checkpoint.router.mode!r}."
            )
