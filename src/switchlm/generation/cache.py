"""The keys and values that decoding reads again at every step (the KV cache).

Memory grows with what is generated: when the buffers are full, their length is doubled, up to the
longest output that was asked for. The causal mask hides positions not yet written.

Shapes: B batch, T new tokens, M positions, H heads, K head width.
"""

import torch
from torch import Tensor

from switchlm.model.attention import KeysValues, KeyValueStore

LEAST = 64  # positions of the first buffers


class LayerStore:
    """The keys and values of one layer's self-attention, [B, H, M, K].

    position_T: where `update` writes; set by the cache.
    """

    def __init__(self, keys_BHMK: Tensor, values_BHMK: Tensor, position_T: Tensor) -> None:
        self.keys_BHMK = keys_BHMK
        self.values_BHMK = values_BHMK
        self.position_T = position_T

    def update(self, key_BHTK: Tensor, value_BHTK: Tensor) -> KeysValues:
        """Write new keys and values in place; return all M, those not yet written included."""
        self.keys_BHMK.index_copy_(2, self.position_T, key_BHTK)
        self.values_BHMK.index_copy_(2, self.position_T, value_BHTK)
        return self.keys_BHMK, self.values_BHMK


class CacheRows:
    """A DecodingCache (see model/transformer.py) of some rows, whose next positions are set."""

    def __init__(
        self, own: list[LayerStore], cross: list[KeysValues], position_T: Tensor, all_M: Tensor
    ) -> None:
        self.self_attention: list[KeyValueStore] = list(own)
        self.cross_attention = cross
        self._positions = position_T, all_M

    def positions(self, num_new: int) -> tuple[Tensor, Tensor]:
        """Return the positions of the new tokens, [T], and of all keys, [M]."""
        assert num_new == len(self._positions[0]), "the cache was advanced by another number"
        return self._positions


class GrowingCache:
    """A DecodingCache for outputs of up to `max_length` tokens. All rows have the same position.

    cross_attention: the encoder's keys and values per layer, [B, H, S, K].
    """

    def __init__(self, cross_attention: list[KeysValues], max_length: int) -> None:
        self.cross_attention = cross_attention
        self.max_length = max_length
        self.length = 0
        sample = cross_attention[0][0]
        batch, heads, _, width = sample.shape
        shape = (batch, heads, min(LEAST, max_length), width)
        nowhere = torch.empty(0, dtype=torch.int64, device=sample.device)
        self._stores = [
            LayerStore(sample.new_zeros(shape), sample.new_zeros(shape), nowhere)
            for _ in cross_attention
        ]
        self.self_attention: list[KeyValueStore] = list(self._stores)
        self._all_M = torch.arange(shape[2], device=sample.device)
        self._new_T = nowhere

    def positions(self, num_new: int) -> tuple[Tensor, Tensor]:
        """Advance by `num_new` tokens; return their positions, [T], and those of all keys, [M]."""
        self.advance(num_new)
        return self._new_T, self._all_M

    def advance(self, num_new: int) -> None:
        """Make room for `num_new` tokens, where the next call of the model writes."""
        end = self.length + num_new
        assert end <= self.max_length, "the cache is full"
        if end > len(self._all_M):
            self._grow(min(max(2 * len(self._all_M), end), self.max_length))
        self._new_T = self._all_M[self.length : end]
        self.length = end
        for store in self._stores:
            store.position_T = self._new_T

    def rows(self, rows: slice) -> CacheRows:
        """Return the cache of these rows, to be called after `advance`."""
        own = [
            LayerStore(store.keys_BHMK[rows], store.values_BHMK[rows], self._new_T)
            for store in self._stores
        ]
        cross = [(keys[rows], values[rows]) for keys, values in self.cross_attention]
        return CacheRows(own, cross, self._new_T, self._all_M)

    def reorder(self, row_B: Tensor) -> None:
        """Replace the self-attention of each row by that of row `row_B`, int64, for beam search.

        The rows of a prompt have the same encoder output, so cross-attention is not reordered.
        """
        for store in self._stores:
            for kept in (store.keys_BHMK, store.values_BHMK):
                kept[:, :, : self.length] = kept[:, :, : self.length].index_select(0, row_B)

    def _grow(self, length: int) -> None:
        for store in self._stores:
            store.keys_BHMK = _longer(store.keys_BHMK, length)
            store.values_BHMK = _longer(store.values_BHMK, length)
        self._all_M = torch.arange(length, device=self._all_M.device)


def _longer(kept_BHMK: Tensor, length: int) -> Tensor:
    batch, heads, filled, width = kept_BHMK.shape
    longer = kept_BHMK.new_zeros(batch, heads, length, width)
    longer[:, :, :filled] = kept_BHMK
    return longer
