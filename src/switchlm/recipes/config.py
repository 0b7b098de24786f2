"""The configuration of a run: all sections, from a preset, a YAML file and dotted overrides.

Also loads the models that a run starts from, whose tokenizers must exist and agree.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from switchlm.config import from_mapping, override, to_mapping
from switchlm.data.config import DataConfig
from switchlm.data.text.tokenizer import Tokenizer, Vocabulary
from switchlm.errors import CheckpointError, ConfigError
from switchlm.files import Report
from switchlm.huggingface.load import load, load_tokenizer
from switchlm.model.config import ModelConfig, upgrade_model_section
from switchlm.model.presets import preset as find_preset
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.mesh import MeshConfig
from switchlm.recipes.start import settings_of_run
from switchlm.training.config import KernelsConfig, TrainingConfig
from switchlm.training.run_folder import RunFolder

Config = TypeVar("Config")
# Fields of the vocabulary: of a tokenizer and of a model, and of a model alone.
_OF_TOKENIZER = ("vocabulary_size", "pad_id", "end_id")
_OF_MODEL = ("decoder_start_id", "generation_start_id", "generation_end_ids")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The configuration of a run. In YAML the router is a section of its own.

    The size of the vocabulary is the tokenizer's, whatever the preset has.

    init_from: the model whose weights and vocabulary the run starts from: a run, a model folder, or
        a name on the hub.
    """

    model: ModelConfig = field(default_factory=lambda: find_preset("tiny"))
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    init_from: str | None = None


def run_config(
    base: RunConfig | None = None,
    *,
    preset: str | None = None,
    values: Mapping[str, Any] | None = None,
    sources: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> RunConfig:
    """Resolve a configuration: base, then preset, then values, then sources and overrides.

    preset: a model, and the settings that it comes with (presets.yaml); `tiny` if neither a base
        nor a model is given.
    values: sections as in a YAML file, which may name a `preset` of its own.

    Raises ConfigError for invalid values.
    """
    resolved = to_sections(base or RunConfig())
    stated = dict(values or {})
    named = stated.pop("preset", None)
    preset = preset or named
    if preset is None and base is None and "model" not in stated:
        preset = "tiny"
    if preset is not None:
        resolved.update(_split_router(to_mapping(find_preset(preset))))
        resolved = merge_sections(resolved, settings_of(preset))
    resolved = merge_sections(resolved, stated)
    if sources:
        resolved["data"]["sources"] = list(sources)
    return from_sections(override(resolved, overrides))


def settings_of(preset: str) -> dict[str, Any]:
    """Return the sections of a run that a preset comes with, its dense twin's alike."""
    text = files("switchlm.recipes").joinpath("presets.yaml").read_text(encoding="utf-8")
    settings: dict[str, Any] = yaml.safe_load(text).get(preset.removeprefix("dense-"), {})
    return settings


def merge_sections(sections: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return sections updated, key by key, with those of `stated`."""
    result = dict(sections)
    for name, content in stated.items():
        if isinstance(content, Mapping) and isinstance(result.get(name), Mapping):
            result[name] = {**result[name], **content}
        else:
            result[name] = content
    return result


def to_sections(config: Any) -> dict[str, Any]:
    """Return plain mappings as in YAML, the router in a section of its own.

    config: RunConfig, or another configuration of a run that has a `model`.
    """
    values = to_mapping(config)
    return {**_split_router(values.pop("model")), **values}


def from_sections(values: dict[str, Any]) -> RunConfig:
    """Build a configuration from the sections that `to_sections` returns."""
    return build_config(RunConfig, values)


def build_config(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Build a configuration that has a `model` from sections, of which the router is one."""
    values = dict(values)
    model = values.pop("model", {})
    if not isinstance(model, dict):
        raise ConfigError(f"The section 'model' must be a mapping, got {model!r}.")
    model = upgrade_model_section(model)
    if "router" in values:
        model = {**model, "router": values.pop("router")}
    return from_mapping(cls, {"model": model, **values})


def with_vocabulary(config: RunConfig, other: Tokenizer | ModelConfig) -> RunConfig:
    """Return the configuration with the vocabulary and special tokens of a tokenizer or model."""
    names = _OF_TOKENIZER if isinstance(other, Tokenizer) else (*_OF_TOKENIZER, *_OF_MODEL)
    ids = {name: getattr(other, name) for name in names}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **ids))


def vocabulary_of(model: ModelConfig) -> Vocabulary:
    """Return the vocabulary of a model, that its tokenizer has to have."""
    return Vocabulary(size=model.vocabulary_size, pad_id=model.pad_id, end_id=model.end_id)


def wire_dtype(config: RunConfig) -> torch.dtype | None:
    """Return the dtype in which sharded weights are gathered; None for their own."""
    return None if config.training.precision == "float32" else torch.bfloat16


def sections_of_run(folder: Path) -> dict[str, Any]:
    """Return the sections of a run's config.yaml; none where the folder is no run."""
    return settings_of_run(RunFolder(folder))


def load_with_tokenizer(
    name: str,
    role: str,
    report: Report,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[SwitchTransformer, Tokenizer]:
    """Load a model and its tokenizer; raises CheckpointError if it has none.

    role: of the model in the run, for the error.
    """
    model, tokenizer = load(name, device=device, dtype=dtype, report=report)
    return model, require_tokenizer(tokenizer, name, role)


def open_tokenizer(name: str, role: str) -> Tokenizer:
    """Load the tokenizer of a model; raises CheckpointError if it has none."""
    return require_tokenizer(load_tokenizer(name, report=lambda line: None), name, role)


def require_tokenizer(tokenizer: Tokenizer | None, name: str, role: str) -> Tokenizer:
    """Return the tokenizer; raises CheckpointError if it is None."""
    if tokenizer is None:
        raise CheckpointError(
            f"The {role} {name!r} has no tokenizer.json and no spiece.model, so text cannot be "
            "turned into its tokens. "
            "Copy the one it was trained with into its folder."
        )
    return tokenizer


def check_vocabulary(own: Tokenizer, other: Tokenizer, own_name: str, other_name: str) -> None:
    """Raise CheckpointError unless both have the same vocabulary."""
    mine, theirs = (one.backend.get_vocab(with_added_tokens=True) for one in (own, other))
    if mine == theirs:
        return
    example = sorted(mine.items() ^ theirs.items())[0][0]
    raise CheckpointError(
        f"{other_name} and {own_name} have different vocabularies ({len(theirs):,} and "
        f"{len(mine):,} tokens; {example!r} is not the same in both), so their token ids do "
        "not mean the same. Take models that were trained with one tokenizer."
    )


def check_stated(stated: str, own: Tokenizer, own_name: str) -> None:
    """Raise an error unless `data.tokenizer`, as stated, is the vocabulary of the weights."""
    if stated == "unigram":
        raise ConfigError(
            "data.tokenizer is 'unigram', a vocabulary to be trained, but the vocabulary is that "
            f"of {own_name}. Leave data.tokenizer out."
        )
    other = Tokenizer.bytes() if stated == "bytes" else Tokenizer.load(Path(stated))
    check_vocabulary(own, other, own_name, f"data.tokenizer {stated!r}")


def _split_router(model: dict[str, Any]) -> dict[str, Any]:
    model = dict(model)
    router = model.pop("router")
    return {"model": model, "router": router}
