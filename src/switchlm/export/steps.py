"""The two programs of a model: its encoder, and a step of its decoder. Tensors in, tensors out.

The KV cache is an input and an output of the step, of the longest output's length; places from
`position` on may hold anything. `greedy` decodes with the two and numpy only: its source is part of
the README.md of every exported folder.

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
from switchlm.export.static_switch import Method, StaticSwitch, gathered, padded_to, tiled
from switchlm.huggingface.config import family_of
from switchlm.huggingface.names import entries
from switchlm.model.attention import Attention, KeysValues, KeyValueStore
from switchlm.model.config import ModelConfig
from switchlm.model.switch import SwitchFeedForward
from switchlm.model.transformer import Stack, SwitchTransformer

# Names of the inputs with their dynamic dims, and of the outputs.
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
    """tokens_BS (int64) and mask_BS (bool, false at padding) to the memory of the decoder."""

    def __init__(self, model: SwitchTransformer, attentions: Iterable[Attention]) -> None:
        """attentions: the decoder's cross-attention, whose keys and values are computed here."""
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
    """One token per row to the logits of the next one, and the cache with the token in it."""

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
        position: int64 scalar, the number of tokens before.
        mask_BS: of the encoder.
        cross_keys_LBHSK, cross_values_LBHSK: from the encoder.
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
            cross_keys_LBHSK,  # only its device is read: keys and values are in the cache
            input_segments_BS=mask_BS.long(),
            cache=_Cache([*stores], memories, position.view(1), place_M),
        )
        keys = torch.stack([store.keys_BHMK for store in stores])
        values = torch.stack([store.values_BHMK for store in stores])
        return output.logits_BTV[:, -1], keys, values


@dataclass
class _Store:
    """A layer's keys and values, replaced instead of written in place."""

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

    capacity_factor: of the encoder's experts, which drop tokens past it; None is dropless, as the
        decoder always is.

    Raises ConfigError for layers, and CheckpointError for weights, that cannot be exported.
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
    encoder_method = tiled if capacity_factor is None else padded_to(capacity_factor)
    first, second = _copy(model), _copy(model)
    attentions = [block.cross_attention for block in first.decoder.layers]
    # Each program keeps only what it needs.
    del first.decoder, first.head, second.encoder
    _replace(first.encoder, encoder_method)
    _replace(second.decoder, gathered)
    encoder = Encoder(first, [attention for attention in attentions if attention is not None])
    return encoder.eval(), DecoderStep(second).eval()


def _copy(model: SwitchTransformer) -> SwitchTransformer:
    """Return a copy of the model in float32 that shares weights that are float32 already."""
    shared = {
        id(parameter): nn.Parameter(parameter.data, requires_grad=False)
        for parameter in model.parameters()
        if parameter.dtype == torch.float32
    }
    return copy.deepcopy(model, shared).float().requires_grad_(False)


def _replace(stack: Stack, method: Method) -> None:
    for block in stack.layers:
        if isinstance(block.feedforward, SwitchFeedForward):
            block.feedforward = StaticSwitch(block.feedforward, method)  # type: ignore[assignment]


def examples(config: ModelConfig) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return inputs of the two programs; all dynamic dims differ."""
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
    about: dict[str, Any],
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
    token, output = about["start_id"], []
    for position in range(max_new_tokens):
        logits, keys, values = step(
            np.array([[token]]), np.array(position), mask, cross_keys, cross_values, keys, values
        )
        if not np.isfinite(logits[0]).all():
            raise FloatingPointError("the model's output is not finite")
        token = int(logits[0].argmax())
        if token in about["end_ids"]:
            break
        output.append(token)
    return output
