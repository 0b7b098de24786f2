"""What a model was trained with: lengths of rows, masking, and templates of tasks.

A run writes these settings into its model's folder, where saving, converting and compressing keep
them; commands that measure a model take them as defaults, so that a run, its model and copies of it
are measured alike. Places of texts are not among them.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from switchlm.config import from_mapping, to_mapping
from switchlm.data.config import DataConfig
from switchlm.data.pretraining.span_corruption import Noise
from switchlm.huggingface.load import load_metadata
from switchlm.huggingface.metadata import Metadata
from switchlm.model.transformer import SwitchTransformer
from switchlm.recipes.config import sections_of_run
from switchlm.recipes.finetune_config import FinetuneConfig

# Settings that describe the texts of one run, and not how a model reads any text.
_OF_TEXTS = ("sources", "tokenizer", "vocabulary_size", "held_out_share", "max_documents")
_OF_TASKS = ("columns", "input_length", "target_length", "batch_size", "pack", "truncate_targets")


def trained_with(name: str | Path) -> dict[str, dict[str, Any]]:
    """Return the sections `data` and `finetune` that a model was trained with, as far as known.

    name: a run, whose own configuration counts and has the places of its texts too, a model folder,
        or a name on the hub.
    """
    folder = Path(name)
    found = {key: dict(value) for key, value in load_metadata(name).training.items()}
    own = sections_of_run(folder)
    if not own and folder.name == "model":  # of a run of an earlier version
        own = _without_places(sections_of_run(folder.parent))
    return found | {key: own[key] for key in ("data", "finetune") if own.get(key)}


def metadata_of(
    model: SwitchTransformer, data: DataConfig | None, finetune: FinetuneConfig | None = None
) -> Metadata:
    """Return the metadata to save with a model that was trained on text or on tasks.

    A model that was fine-tuned keeps the settings of the text that it was trained on before.
    """
    before: Metadata = model.metadata or Metadata()
    sections = {"data": to_mapping(data)} if data else {}
    if finetune is not None:
        sections["finetune"] = to_mapping(finetune)
    training = {**before.training, **_without_places(sections)}
    return dataclasses.replace(before, training=training)


def _without_places(sections: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    data, tasks = sections.get("data") or {}, sections.get("finetune") or {}
    found = {
        "data": {key: value for key, value in data.items() if key not in _OF_TEXTS},
        "finetune": {key: value for key, value in tasks.items() if key in _OF_TASKS},
    }
    return {key: section for key, section in found.items() if section}


def lengths(
    sections: Mapping[str, Any], input_length: int | None = None, target_length: int | None = None
) -> tuple[int, int]:
    """Return the lengths of rows of inputs and targets, those of the training if not given.

    sections: what `trained_with` returns; without any, the lengths are those of DataConfig.
    """
    own = sections.get("finetune") or sections.get("data") or {}
    inputs = input_length or own.get("input_length") or DataConfig.input_length
    if target_length is None and inputs == own.get("input_length"):
        target_length = own.get("target_length")
    if target_length is None:  # of masked text
        data = from_mapping(DataConfig, sections.get("data", {}), "data")
        noise = Noise(density=data.noise_density, mean_span=data.mean_span)
        raw = np.array([noise.raw_length(inputs)])
        target_length = int(noise.corrupted_lengths(raw)[1][0])
    return inputs, target_length


def describe_text(sections: Mapping[str, Any], config: DataConfig) -> dict[str, Any]:
    """Return the settings that a loss on text depends on.

    config: of the text that is read.
    """
    data = {"data": to_mapping(config)}
    inputs, targets = lengths(data)
    return {
        "input_length": inputs,
        "target_length": targets,
        "noise_density": config.noise_density,
        "mean_span": config.mean_span,
        "pack": config.pack,
        "batch_size": config.batch_size,
        "as_trained": bool(sections.get("data")),
    }
