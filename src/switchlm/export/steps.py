"""The two programs of a model: its encoder, and a step of its decoder. Tensors in, tensors out.

The KV cache is an input and an output of the step, as long as the caller wants outputs to become;
places from `position` on may hold anything. `greedy` decodes with the two in numpy alone; its
source is part of the README.md of every exported folder, so it needs nothing of this package.

Shapes: B batch, S source, M places of the cache, L decoder layers, H heads, K head width,
D d_model, V vocabulary.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from switchlm.errors import CheckpointError, ConfigError
from switchlm.export.static_switch import StaticSwitch, Way, gathered, padded_to, tiled
from switchlm.huggingface.config import family_of
from switchlm.huggingface.names import entries
from switchlm.model.attention import Attention, KeysValues, KeyValueStore
from switchlm.model.config import ModelConfig
from switchlm.model.switch import SwitchFeedForward
from switchlm.model.transformer import Stack, SwitchTransformer

# Names of the inputs, with the names of their dims that a caller chooses; and of the outputs.
_ROW, _MEMORY, _CACHE = (
    {0: "batch", 1: "source"},
    {1: "batch", 3: "source"},
    {1: "batch", 3: "places"},
)
Names = dict[str, dict[int, str]]
ENCODER_INPUTS: Names = {"tokens": _ROW, "mask": _ROW}
ENCODER_OUTPUTS = ("encoded", "cross_keys", "cross_values")
STEP_INPUTS: Names = {
    "token": {0: "batch"},
    "position": {},
    "mask": _ROW,
    "cross_keys": _MEMORY,
    "cross_values": _MEMORY,
    "keys": _CACHE,
    "values": _CACHE,
}
STEP_OUTPUTS = ("logits", "new_keys", "new_values")
SIGNATURES = ((ENCODER_INPUTS, ENCODER_OUTPUTS), (STEP_INPUTS, STEP_OUTPUTS))


class Encoder(nn.Module):
    """tokens_BS (int64) and mask_BS (bool, false at padding) to what the decoder attends to."""

    def __init__(self, model: SwitchTransformer, attentions: Iterable[Attention]) -> None:
        """attentions: the decoder's cross-attention, of which keys and values are made here."""
        super().__init__()
        self.model = model
        self.attentions = nn.ModuleList(attentions)

    def forward(self, tokens_BS: Tensor, mask_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return encoded_BSD, and the keys and values of cross-attention, both [L, B, H, S, K]."""
        encoded_BSD, _ = self.model.encode(tokens_BS, mask_BS.long())
        attentions = [cast(Attention, attention) for attention in self.attentions]
        memories = [attention.keys_values(encoded_BSD) for attention in attentions]
        keys, values = zip(*memories, strict=True)
        return encoded_BSD, torch.stack(keys), torch.stack(values)


class DecoderStep(nn.Module):
    """One token a row, to the logits of the next and the cache with this one in it."""

    def __init__(self, model: SwitchTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        token_B1: Tensor,
        position: Tensor,
        mask_BS: Tensor,
        cross_keys_LBHSK: Tensor,
        cross_values_LBHSK: Tensor,
        keys_LBHMK: Tensor,
        values_LBHMK: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits_BV, keys_LBHMK, values_LBHMK.

        token_B1: int64, the padding token at first.
        position: int64 scalar, how many came before.
        mask_BS: the encoder's, and so are cross_*.
        """
        place_M = torch.arange(keys_LBHMK.shape[3], device=token_B1.device)
        here_M1 = (place_M == position)[:, None]
        stores = [
            _Store(key, value, here_M1)
            for key, value in zip(keys_LBHMK.unbind(0), values_LBHMK.unbind(0), strict=True)
        ]
        memories = list(zip(cross_keys_LBHSK.unbind(0), cross_values_LBHSK.unbind(0), strict=True))
        output = self.model.decode(
            token_B1,
            cross_keys_LBHSK,  # of which the decoder, given its keys and values, asks the device
            input_segments_BS=mask_BS.long(),
            cache=_Cache([*stores], memories, position.view(1), place_M),
        )
        keys = torch.stack([store.keys_BHMK for store in stores])
        values = torch.stack([store.values_BHMK for store in stores])
        return output.logits_BTV[:, -1], keys, values


@dataclass
class _Store:
    """A layer's keys and values, replaced instead of written to."""

    keys_BHMK: Tensor
    values_BHMK: Tensor
    here_M1: Tensor

    def update(self, key_BH1K: Tensor, value_BH1K: Tensor) -> KeysValues:
        self.keys_BHMK = torch.where(self.here_M1, key_BH1K, self.keys_BHMK)
        self.values_BHMK = torch.where(self.here_M1, value_BH1K, self.values_BHMK)
        return self.keys_BHMK, self.values_BHMK


@dataclass
class _Cache:
    """A DecodingCache of one step."""

    self_attention: list[KeyValueStore]
    cross_attention: list[KeysValues]
    here_1: Tensor
    place_M: Tensor

    def positions(self, num_new: int) -> tuple[Tensor, Tensor]:
        assert num_new == 1
        return self.here_1, self.place_M


def programs(
    model: SwitchTransformer, capacity_factor: float | None = None
) -> tuple[Encoder, DecoderStep]:
    """Return the two programs of a model, with static shapes and the model's own weights.

    capacity_factor: of the encoder's experts, which then drop tokens past it; without it nothing is
        dropped. The decoder never drops.

    Raises ConfigError for layers that have no such form, and CheckpointError for weights that have
    none.
    """
    config = model.config
    if config.num_experts and (config.attention_experts or config.router.selection != "token"):
        what = (
            "Switch layers in attention (model.attention_experts)"
            if config.attention_experts
            else f"router.selection={config.router.selection}"
        )
        raise ConfigError(
            f"A model with {what} cannot be exported; it can be served and converted."
        )
    if {entry.name for entry in entries(config, family_of(config))} != model.state_dict().keys():
        raise CheckpointError(
            "A model that was compressed or adapted cannot be exported: export the one it was made "
            "from; `switchlm convert` merges adapters in."
        )
    if capacity_factor is not None and not capacity_factor >= 0.01:
        raise ConfigError(f"A capacity factor is at least 0.01, got {capacity_factor}.")
    encoder_way = tiled if capacity_factor is None else padded_to(capacity_factor)
    first, second = _copy(model), _copy(model)
    attentions = [block.cross_attention for block in first.decoder.layers]
    # Each program keeps no more than it needs.
    del first.decoder, first.head, second.encoder
    _replace(first.encoder, encoder_way)
    _replace(second.decoder, gathered)
    encoder = Encoder(first, [attention for attention in attentions if attention is not None])
    return encoder.eval(), DecoderStep(second).eval()


def _copy(model: SwitchTransformer) -> SwitchTransformer:
    """Return another model in float32, to be taken apart; it shares what is float32 already."""
    shared = {
        id(parameter): nn.Parameter(parameter.data, requires_grad=False)
        for parameter in model.parameters()
        if parameter.dtype == torch.float32
    }
    return copy.deepcopy(model, shared).float().requires_grad_(False)


def _replace(stack: Stack, way: Way) -> None:
    for block in stack.layers:
        if isinstance(block.feedforward, SwitchFeedForward):
            block.feedforward = StaticSwitch(block.feedforward, way)  # type: ignore[assignment]


def examples(config: ModelConfig) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return inputs of the two programs; no two dims that a caller chooses are equal."""
    batch, source, places = 2, 37, 11
    mask_BS = torch.ones(batch, source, dtype=torch.bool)
    layers, heads, width = config.num_decoder_layers, config.num_heads, config.d_kv
    tokens_BS = torch.full((batch, source), config.end_id)
    memory = torch.zeros(layers, batch, heads, source, width)
    cache = torch.zeros(layers, batch, heads, places, width)
    step = (
        tokens_BS[:, :1],
        torch.tensor(3),
        mask_BS,
        memory,
        memory.clone(),
        cache,
        cache.clone(),
    )
    return (tokens_BS, mask_BS), step


Program = Callable[..., Sequence[np.ndarray]]


def greedy(
    encode: Program,
    step: Program,
    tokens: list[int],
    about: dict[str, int],
    max_new_tokens: int,
) -> list[int]:
    """Return the tokens that follow from a prompt, without the end token.

    tokens: the prompt, which ends with the end token.
    about: what export.json says.
    """
    mask = np.ones((1, len(tokens)), dtype=bool)
    _, cross_keys, cross_values = encode(np.array([tokens]), mask)
    shape = (about["layers"], 1, about["heads"], max_new_tokens, about["width"])
    keys = values = np.zeros(shape, dtype=np.float32)
    token, output = about["pad_id"], []
    for position in range(max_new_tokens):
        logits, keys, values = step(
            np.array([[token]]), np.array(position), mask, cross_keys, cross_values, keys, values
        )
        token = int(logits[0].argmax())
        if token == about["end_id"]:
            break
        output.append(token)
    return output
