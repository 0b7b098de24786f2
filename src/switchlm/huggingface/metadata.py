"""What a model folder holds beside the weights and the shape: how outputs begin and end, and what
the model was trained on.

generation_config.json   settings of transformers' `generate`, kept as they are. Its ids of the
                         start and the ends are obeyed, as transformers does.
config.json              `switchlm_training`: the `data` and `finetune` sections of the run, without
                         the places of its texts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from switchlm.errors import CheckpointError
from switchlm.huggingface.weights import FLOATING, read_json
from switchlm.model.config import ModelConfig

GENERATION_CONFIG = "generation_config.json"
TRAINING_KEY = "switchlm_training"

_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
# Settings that change no output, and values with which the others change none.
_SILENT = (*_IDS, "transformers_version", "_from_model_config", "use_cache", "early_stopping")
_NEUTRAL: dict[str, Any] = {
    "max_length": 20,
    "min_length": 0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "diversity_penalty": 0.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
    "assistant_lookbehind": 10,
    "target_lookbehind": 10,
}


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """generation: the content of generation_config.json.
    training: sections `data` and `finetune` of the run that trained the model.
    dtype: the number format that config.json states; None: none.
    end_ids: all ids that end outputs by config.json, where it has a list of them.
    """

    generation: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    end_ids: tuple[int, ...] = ()


def read_metadata(folder: Path, values: Mapping[str, Any]) -> Metadata:
    """Read the metadata of a model folder; values: its config.json."""
    generation: dict[str, Any] = {}
    if (folder / GENERATION_CONFIG).is_file():
        generation = read_json(folder, GENERATION_CONFIG)
    training = values.get(TRAINING_KEY, {})
    if not isinstance(training, Mapping) or not all(
        isinstance(section, Mapping) for section in training.values()
    ):
        raise CheckpointError(f"{TRAINING_KEY} in config.json must hold sections of settings.")
    dtype = values.get("dtype", values.get("torch_dtype"))
    known = [one for one in FLOATING if str(one) == f"torch.{dtype}"]
    return Metadata(
        generation=generation,
        training=training,
        dtype=next(iter(known), None),
        end_ids=_tokens("eos_token_id", values.get("eos_token_id")),
    )


def token_ids(
    pad: Any, ends: Any, start: Any, bos: Any, generation: Mapping[str, Any], vocabulary_size: int
) -> dict[str, Any]:
    """Return the fields of ModelConfig that are ids of special tokens.

    pad, ends, start, bos: pad_token_id, eos_token_id (or a list), decoder_start_token_id and
        bos_token_id of config.json.

    As in transformers, config.json decides where the inputs of training begin, and
    generation_config.json where outputs begin and end; what it lacks is taken from config.json.
    """
    pad_id = 0 if pad is None else _token("pad_token_id", pad)
    start_id = pad_id if start is None else _token("decoder_start_token_id", start)
    end_ids = _tokens("eos_token_id", ends) or (1,)
    firsts = {
        f"decoder_start_token_id of {GENERATION_CONFIG}": generation.get("decoder_start_token_id"),
        f"bos_token_id of {GENERATION_CONFIG}": generation.get("bos_token_id"),
        "decoder_start_token_id": start,
        "bos_token_id": bos,
    }
    given = [_token(name, value) for name, value in firsts.items() if value is not None]
    first_id = given[0] if given else pad_id
    lasts = _tokens(f"eos_token_id of {GENERATION_CONFIG}", generation.get("eos_token_id"))
    # An id beyond the vocabulary is never generated.
    generated = tuple(one for one in lasts or end_ids if one < vocabulary_size) or end_ids[:1]
    return {
        "pad_id": pad_id,
        "end_id": end_ids[0],
        "decoder_start_id": None if start_id == pad_id else start_id,
        "generation_start_id": None if first_id == start_id else first_id,
        "generation_end_ids": () if generated == end_ids[:1] else generated,
    }


def _tokens(name: str, value: Any) -> tuple[int, ...]:
    """Return the ids of an id or a list, each once; none for None."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(_token(name, one) for one in values))


def _token(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise CheckpointError(f"{name} is {str(value)[:80]!r}; a token id is an integer from 0 on.")
    return value


def unused_settings(generation: Mapping[str, Any]) -> str | None:
    """Return a sentence about settings of generation_config.json without effect here, or None."""
    named = [
        f"{name}={str(value)[:60]}"
        for name, value in generation.items()
        if name not in _SILENT
        and value not in (None, False, [], {}, "")
        and value != _NEUTRAL.get(name)
    ]
    if not named:
        return None
    return (
        f"{GENERATION_CONFIG} sets {', '.join(named)}, which have no effect here: outputs are "
        "greedy, and options choose beams, sampling and lengths."
    )


def end_values(config: ModelConfig, kept: Metadata) -> dict[str, Any]:
    """Return the end token of config.json to write: all where the folder read has several."""
    several = len(kept.end_ids) > 1 and kept.end_ids[0] == config.end_id
    return {"eos_token_id": list(kept.end_ids) if several else config.end_id}


def kept_values(config: ModelConfig, kept: Metadata) -> dict[str, Any]:
    """Return what config.json is to have of the folder read, beside the model."""
    training = {TRAINING_KEY: dict(kept.training)} if kept.training else {}
    return {**end_values(config, kept), **training}


def generation_values(config: ModelConfig, kept: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of generation_config.json to write; kept: that of the folder read."""
    ends, pad = list(config.end_ids), kept.get("pad_token_id")
    ids = {
        "decoder_start_token_id": config.first_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": config.pad_id if pad is None else pad,  # fills rows after their end
    }
    return {**kept, **ids}
