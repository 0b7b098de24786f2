"""The configuration of a run: all sections, from a preset, a YAML file and dotted overrides."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from switchlm.config import from_mapping, override, to_mapping
from switchlm.data.config import DataConfig
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import ConfigError
from switchlm.model.config import ModelConfig, upgrade_model_section
from switchlm.model.presets import preset as find_preset
from switchlm.parallel.mesh import MeshConfig
from switchlm.training.config import KernelsConfig, TrainingConfig

Config = TypeVar("Config")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run. In YAML the router stands in a section of its own.

    The size of the vocabulary is the tokenizer's; what a preset says of it is replaced.

    init_from: the model whose weights and vocabulary the run starts with: a run, a model folder, or
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

    values: sections as they stand in a YAML file, which may name a `preset` of its own.

    Raises ConfigError for whatever does not fit.
    """
    resolved = to_sections(base or RunConfig())
    stated = dict(values or {})
    named = stated.pop("preset", None)
    preset = preset or named
    if preset is not None:
        resolved.update(_split_router(to_mapping(find_preset(preset))))
    resolved = put_over(resolved, stated)
    if sources:
        resolved["data"]["sources"] = list(sources)
    return from_sections(override(resolved, overrides))


def put_over(sections: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return sections with what is stated of each in the place of what they had."""
    result = dict(sections)
    for name, content in stated.items():
        if isinstance(content, Mapping) and isinstance(result.get(name), Mapping):
            result[name] = {**result[name], **content}
        else:
            result[name] = content
    return result


def to_sections(config: Any) -> dict[str, Any]:
    """Return plain mappings as they stand in YAML, the router in a section of its own.

    config: RunConfig, or another configuration of a run that has a `model`.
    """
    values = to_mapping(config)
    return {**_split_router(values.pop("model")), **values}


def from_sections(values: dict[str, Any]) -> RunConfig:
    """Build a configuration from what `to_sections` gives."""
    return build_config(RunConfig, values)


def build_config(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Build a configuration that has a `model` from sections, the router being one of them."""
    values = dict(values)
    model = values.pop("model", {})
    if not isinstance(model, dict):
        raise ConfigError(f"The section 'model' must be a mapping, got {model!r}.")
    model = upgrade_model_section(model)
    if "router" in values:
        model = {**model, "router": values.pop("router")}
    return from_mapping(cls, {"model": model, **values})


def with_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> RunConfig:
    """Return the configuration with the tokenizer's vocabulary and special tokens."""
    model = dataclasses.replace(
        config.model,
        vocabulary_size=tokenizer.vocabulary_size,
        pad_id=tokenizer.pad_id,
        end_id=tokenizer.end_id,
    )
    return dataclasses.replace(config, model=model)


def _split_router(model: dict[str, Any]) -> dict[str, Any]:
    model = dict(model)
    router = model.pop("router")
    return {"model": model, "router": router}
