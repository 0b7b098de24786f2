"""transformers' key-value cache as ours: it keeps what our decoder computes.

Beam search reorders it and assisted decoding crops it, both from outside.
"""

from typing import Any

import torch
from torch import Tensor

from switchlm.errors import ConfigError
from switchlm.model.attention import KeysValues, KeyValueStore
from switchlm.model.transformer import Stack


class LayerOf:
    """The self-attention of one layer of a cache; see model.attention.KeyValueStore."""

    def __init__(self, cache: Any, layer: int) -> None:
        self.cache = cache
        self.layer = layer

    def update(self, key_BHQK: Tensor, value_BHQK: Tensor) -> KeysValues:
        """Add the new ones and return all."""
        keys_BHMK, values_BHMK = self.cache.update(key_BHQK, value_BHQK, self.layer)
        return keys_BHMK, values_BHMK


class TheirCache:
    """A DecodingCache (see model/transformer.py) over an EncoderDecoderCache that grows.

    The keys and values of cross-attention are computed when the cache sees its first token, and
    kept in it. Raises ConfigError for caches of a fixed length.
    """

    def __init__(self, cache: Any, decoder: Stack, encoded_BSD: Tensor) -> None:
        own, cross = cache.self_attention_cache, cache.cross_attention_cache
        if getattr(cache, "is_compileable", False):
            raise ConfigError(
                f"A {type(own).__name__} of a fixed length is not supported here: leave "
                "cache_implementation out."
            )
        layers = range(len(decoder.blocks))
        self.length: int = cache.get_seq_length()
        self.device = encoded_BSD.device
        self.self_attention: list[KeyValueStore] = [LayerOf(own, layer) for layer in layers]
        if not cache.is_updated.get(0):
            for layer, (keys, values) in enumerate(decoder.memories(encoded_BSD)):
                cross.update(keys, values, layer)
                cache.is_updated[layer] = True
        self.cross_attention: list[KeysValues] = [
            (cross.layers[layer].keys, cross.layers[layer].values) for layer in layers
        ]

    def positions(self, num_new: int) -> tuple[Tensor, Tensor]:
        """Return the positions of the new tokens, [T], and of all keys there will be, [M]."""
        places_M = torch.arange(self.length + num_new, device=self.device)
        return places_M[self.length :], places_M
