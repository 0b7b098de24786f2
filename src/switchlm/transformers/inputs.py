"""The inputs of forward, checked: ids or embeddings, masks as segments, what to return."""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from switchlm.errors import ConfigError
from switchlm.model.attention import masked
from switchlm.model.transformer import StackInputs
from switchlm.transformers.stacks import Wanted


def one_of(ids: Tensor | None, embeddings: Tensor | None, names: str) -> Tensor:
    """Return the ids or the embeddings. Raises ConfigError unless one of them is given."""
    if ids is not None and embeddings is not None:
        raise ConfigError(f"Ids and embeddings are both given: pass one of {names}.")
    given = embeddings if ids is None else ids
    if given is None:
        raise ConfigError(f"There are neither {names.replace(', ', ' nor ')}.")
    return given


def segments_of(mask: Tensor | None, name: str) -> Tensor | None:
    """Return segments, int32 [B, S], of a mask of any dtype that is zero at padding."""
    if mask is not None and mask.dim() != 2:
        raise ConfigError(
            f"{name} must be of shape [batch, length], got {list(mask.shape)}: it says where "
            "padding is."
        )
    return None if mask is None else (mask != 0).int()


def check_length(segments: Tensor | None, length: int, name: str) -> None:
    """Raise ConfigError for a mask of another length."""
    if segments is not None and segments.shape[1] != length:
        raise ConfigError(
            f"{name} has {segments.shape[1]} columns for {length} tokens, those in the cache "
            "included."
        )


def with_mask(inputs: StackInputs, mask_B1TM: Tensor) -> StackInputs:
    """Return the inputs with a mask of every query and key: bool, or added to the scores."""
    if mask_B1TM.shape[-2:] != inputs.bias.shape[-2:]:
        raise ConfigError(
            f"decoder_attention_mask is for {list(mask_B1TM.shape[-2:])} queries and keys; there "
            f"are {list(inputs.bias.shape[-2:])}."
        )
    if mask_B1TM.dtype == torch.bool:
        return dataclasses.replace(inputs, bias=masked(inputs.bias, mask_B1TM))
    return dataclasses.replace(inputs, bias=inputs.bias + mask_B1TM)


def wanted_of(
    config: PreTrainedConfig,
    attentions: bool | None,
    hidden_states: bool | None,
    router_logits: bool | None,
) -> Wanted:
    """Return what to return besides the last state; None is as the configuration says."""

    def chosen(name: str, value: bool | None) -> bool:
        value = getattr(config, name, None) if value is None else value
        if value not in (None, True, False):
            raise ConfigError(f"{name} is true or false here, got {value!r}.")
        return bool(value)

    return Wanted(
        attentions=chosen("output_attentions", attentions),
        hidden_states=chosen("output_hidden_states", hidden_states),
        # Those of a dense model are none.
        router_logits=chosen("output_router_logits", router_logits)
        and bool(getattr(config, "num_experts", 0)),
    )


def returned(output: Any, config: PreTrainedConfig, return_dict: bool | None) -> Any:
    """Return an output of transformers, as a tuple if return_dict is false."""
    if return_dict is None:
        return_dict = getattr(config, "return_dict", True)
    return output if return_dict else output.to_tuple()
