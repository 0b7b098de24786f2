"""The KV cache of transformers as the DecodingCache of our decoder.

Beam search in transformers reorders that cache, and assisted decoding crops it.

Shapes: B batch, Q new tokens, M places of the cache, H heads, K head width, S source, D d_model.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from switchlm.errors import ConfigError
from switchlm.model.attention import KeysValues, KeyValueStore
from switchlm.model.transformer import Stack


def new_cache(config: Any) -> EncoderDecoderCache:
    """Return an empty cache that grows."""
    return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))


class TransformersLayerStore:
    """The self-attention of one layer of a cache; see model.attention.KeyValueStore."""

    def __init__(self, cache: Any, layer: int) -> None:
        self.cache = cache
        self.layer = layer

    def update(self, key_BHQK: Tensor, value_BHQK: Tensor) -> KeysValues:
        """Append the new keys and values and return all."""
        keys_BHMK, values_BHMK = self.cache.update(key_BHQK, value_BHQK, self.layer)
        return keys_BHMK, values_BHMK


class TransformersCache:
    """A DecodingCache (see model/transformer.py) in an EncoderDecoderCache of transformers.

    The keys and values of cross-attention are computed at the first token and stored in it. Caches
    that grow and caches of a fixed length both work.

    num_places: M, once `num_new` tokens are added.

    Raises ConfigError for another cache, and for more tokens than one of a fixed length holds.
    """

    def __init__(self, cache: Any, decoder: Stack, encoded_BSD: Tensor, num_new: int) -> None:
        if not isinstance(cache, EncoderDecoderCache):
            raise ConfigError(
                f"The cache of an encoder-decoder is an EncoderDecoderCache, got a "
                f"{type(cache).__name__}: pass EncoderDecoderCache(DynamicCache(), DynamicCache())."
            )
        own, cross = cache.self_attention_cache, cache.cross_attention_cache
        layers = range(len(decoder.blocks))
        self.device = encoded_BSD.device
        self.length = int(cache.get_seq_length())
        self.num_places = self.length + num_new
        if own.is_compileable:
            most = int(own.get_max_length())
            if self.num_places > most:
                raise ConfigError(
                    f"The cache has {most} places, too few for {self.num_places} tokens: make a "
                    "longer one, or leave cache_implementation out."
                )
            self.num_places = most
        self.self_attention: list[KeyValueStore] = [
            TransformersLayerStore(own, layer) for layer in layers
        ]
        if not cache.is_updated.get(0):
            for layer, (keys, values) in enumerate(decoder.memories(encoded_BSD)):
                cross.update(keys, values, layer)
                cache.is_updated[layer] = True
        # One of a fixed length may be longer than the source.
        source = encoded_BSD.shape[1]
        kept: list[Any] = [cross.layers[layer] for layer in layers]
        self.cross_attention: list[KeysValues] = [
            (one.keys[:, :, :source], one.values[:, :, :source]) for one in kept
        ]

    def positions(self, num_new: int) -> tuple[Tensor, Tensor]:
        """Return the positions of the new tokens, [T], and of all places, [M]."""
        positions_M = torch.arange(self.num_places, device=self.device)
        return positions_M[self.length : self.length + num_new], positions_M
