"""The key-value cache of decoding: allocated once, the same shapes at every step.

Each layer's self-attention writes the new keys and values into buffers as long as the longest
output; places not yet written lie in the future, which the causal mask hides. The encoder's keys
and values for cross-attention are computed once.

Shapes: B batch, H heads, T new tokens, M places, S source, K head width, D d_model.
"""

import torch
from torch import Tensor

from switchlm.model.attention import KeysValues, KeyValueStore
from switchlm.model.transformer import SwitchTransformer


class LayerStore:
    """The keys and values of one layer's self-attention, [B, H, M, K].

    position_T: where `update` writes; the cache moves it.
    """

    def __init__(self, keys_BHMK: Tensor, values_BHMK: Tensor) -> None:
        self.keys_BHMK = keys_BHMK
        self.values_BHMK = values_BHMK
        self.position_T = torch.empty(0, dtype=torch.int64)

    def update(self, key_BHTK: Tensor, value_BHTK: Tensor) -> KeysValues:
        """Write the new ones in place and return all M, those still empty included."""
        self.keys_BHMK.index_copy_(2, self.position_T, key_BHTK)
        self.values_BHMK.index_copy_(2, self.position_T, value_BHTK)
        return self.keys_BHMK, self.values_BHMK


class StaticCache:
    """A DecodingCache (see model/transformer.py) for outputs of up to `max_length` tokens.

    encoded_BSD: the encoder's output, for cross-attention. All rows stand at the same position.
    """

    def __init__(self, model: SwitchTransformer, encoded_BSD: Tensor, max_length: int) -> None:
        config = model.config
        self.cross_attention = model.decoder.memories(encoded_BSD)
        like = self.cross_attention[0][0]
        shape = (encoded_BSD.shape[0], config.num_heads, max_length, config.d_kv)
        self._stores = [
            LayerStore(like.new_zeros(shape), like.new_zeros(shape)) for _ in self.cross_attention
        ]
        self.self_attention: list[KeyValueStore] = list(self._stores)
        self._places_M = torch.arange(max_length, device=encoded_BSD.device)
        self.length = 0

    def positions(self, num_new: int) -> tuple[Tensor, Tensor]:
        """Make room for `num_new` tokens; return their positions [T] and those of all keys [M]."""
        end = self.length + num_new
        assert end <= self._places_M.numel(), "the cache is full"
        position_T = self._places_M[self.length : end]
        self.length = end
        for store in self._stores:
            store.position_T = position_T
        return position_T, self._places_M

    def reorder(self, row_B: Tensor) -> None:
        """Let every row go on from the self-attention of another, `row_B`, int64, as beams do.

        The rows of one prompt look at one encoder output, so cross-attention stays where it is.
        """
        for store in self._stores:
            for kept in (store.keys_BHMK, store.values_BHMK):
                kept[:, :, : self.length] = kept[:, :, : self.length].index_select(0, row_B)
