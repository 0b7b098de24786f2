"""T5 attention: no scaling of the scores, a learned bias by relative position, masks by segment.

Shapes: B batch, Q queries, M keys and values (memory), D d_model, H heads, K head width.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from switchlm import _torch
from switchlm.errors import DataError
from switchlm.kernels.cpu.memory import available_bytes
from switchlm.kernels.select import attention
from switchlm.model.config import ModelConfig
from switchlm.model.layers import Linear, local
from switchlm.model.routing import Routing
from switchlm.model.switch import SwitchProjection

CHECKED = 2**30  # bytes of a bias from which it is compared with the memory that is left
_PER_PLACE = 24  # bytes of distance, bucket and mask

KeysValues = tuple[Tensor, Tensor]
Memory = Tensor | KeysValues
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


class KeyValueStore(Protocol):
    """The KV cache of a layer, [B, H, M, K]."""

    def update(self, key_BHQK: Tensor, value_BHQK: Tensor) -> KeysValues:
        """Append new keys and values and return all."""
        ...


class RelativeBias(nn.Module):
    """A bias per head for each bucket of relative distance (Raffel et al. 2020).

    Half the buckets hold exact small distances; the others grow with the logarithm of the distance
    up to `max_distance`. In a decoder all buckets are for the past.
    """

    def __init__(self, buckets: int, heads: int, max_distance: int, bidirectional: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(buckets, heads))
        self.max_distance = max_distance
        self.bidirectional = bidirectional

    def forward(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Return the bias [1 or B, H, Q, M] of this process's heads, for int64 positions.

        query_positions: [Q] or [B, Q].
        key_positions: [M].
        """
        check_memory(
            8 * self.weight.shape[1] + _PER_PLACE, query_positions[..., None], key_positions
        )
        distance = key_positions - query_positions[..., None]
        bias = nn.functional.embedding(self.bucket(distance), local(self.weight)).movedim(-1, -3)
        return bias if bias.dim() == 4 else bias[None]

    def bucket(self, distance: Tensor) -> Tensor:
        """Return the bucket of each distance, key position minus query position."""
        buckets = self.weight.shape[0]
        offset = torch.zeros_like(distance)
        if self.bidirectional:
            buckets //= 2
            offset = (distance > 0).long() * buckets
            distance = distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = buckets // 2
        ratio = torch.log(distance.clamp(min=1).float() / exact)
        far = exact + (ratio / math.log(self.max_distance / exact) * (buckets - exact)).long()
        return offset + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))


def check_memory(size: int, *shapes: Tensor) -> None:
    """Raise DataError if a bias cannot fit in main memory, and a copy of it in another order.

    It is refused before anything is allocated, since systems end a process that takes too much.

    size: bytes per number of what the shapes give.
    shapes: tensors that broadcast to [..., queries, keys].
    """
    traced = torch.compiler.is_compiling() or _torch.has_dispatch_mode()
    if traced or not shapes[0].is_cpu:
        return
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in shapes))
    needed = math.prod(shape) * size
    if needed < CHECKED:
        return
    available = available_bytes()
    if available is not None and needed > available:
        raise DataError(
            f"Sequences of {shape[-1]:,} tokens need {needed / 1e9:.1f} GB for the bias of "
            f"attention, which grows with the square of the length, but only {available / 1e9:.1f} "
            "GB of memory are free. Take shorter inputs, or fewer at a time."
        )


def segment_mask(query_segments_BQ: Tensor, key_segments_BM: Tensor) -> Tensor:
    """Return bool [B, 1, Q, M], true where a query may attend to a key.

    Real tokens attend to the real tokens of their segment. Padding (segment 0) attends to every
    real token, as in implementations that mask keys only; its outputs are never used.
    """
    query, key = query_segments_BQ[:, None, :, None], key_segments_BM[:, None, None, :]
    return ((query == key) | (query == 0)) & (key != 0)


def masked(bias: Tensor, allowed: Tensor | None) -> Tensor:
    """Return the bias with a very low number where attention is not allowed.

    The number is finite in the bias's dtype, so that a query that may attend to nothing gives the
    mean of all values instead of NaN.
    """
    if allowed is None:
        return bias
    check_memory(8, bias, allowed)
    half = bias.dtype == torch.float16
    return torch.where(allowed, bias, torch.finfo(torch.float16 if half else torch.bfloat16).min)


def heads(x_BQW: Tensor, d_kv: int) -> Tensor:
    """Return x_BHQK, with the heads of this process."""
    return x_BQW.unflatten(2, (-1, d_kv)).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention with dense projections.

    attend: from queries, keys, values, bias and dropout to the values; replaced to see the weights.
    """

    def __init__(self, d_model: int, num_heads: int, d_kv: int, dropout: float = 0.0) -> None:
        super().__init__()
        width = num_heads * d_kv
        self.query = Linear(d_model, width)
        self.key = Linear(d_model, width)
        self.value = Linear(d_model, width)
        self.output = Linear(width, d_model)
        self.d_kv = d_kv
        self.dropout = dropout
        self.attend: Attend = attention

    def keys_values(self, memory_BMD: Tensor) -> KeysValues:
        """Return key_BHMK and value_BHMK of the memory."""
        return heads(self.key(memory_BMD), self.d_kv), heads(self.value(memory_BMD), self.d_kv)

    def forward(
        self,
        x_BQD: Tensor,
        bias: Tensor | None,
        *,
        memory: Memory | None = None,
        store: KeyValueStore | None = None,
        mask_BQ: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """Return (y_BQD, ()).

        bias: [1 or B, 1 or H, Q, M], added to the scores.
        memory: another sequence, or its keys and values (cross-attention); None is self-attention,
            to the past in `store` too.
        """
        query_BQW = self.query(x_BQD)
        if memory is None:
            memory = self.keys_values(x_BQD)
            if store is not None:
                memory = store.update(*memory)
        elif isinstance(memory, Tensor):
            memory = self.keys_values(memory)
        return _attend(self, query_BQW, memory, bias), ()


class SwitchAttention(nn.Module):
    """Self-attention whose projections are Switch layers (appendix A).

    One Switch layer makes the queries; another makes the keys, which serve as values too. See
    Attention for `attend`.
    """

    def __init__(self, config: ModelConfig, causal: bool) -> None:
        super().__init__()
        width = config.num_heads * config.d_kv
        self.query, self.key_value = (
            SwitchProjection(
                config.d_model,
                width,
                config.num_experts,
                router=config.router,
                initialisation=config.initialisation,
                causal=causal,
            )
            for _ in range(2)
        )
        self.output = Linear(width, config.d_model)
        self.d_kv = config.d_kv
        self.dropout = config.dropout
        self.attend: Attend = attention

    def forward(
        self,
        x_BQD: Tensor,
        bias: Tensor | None,
        *,
        store: KeyValueStore | None = None,
        mask_BQ: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """Return (y_BQD, the routing of queries and of keys); see Attention.forward."""
        query_BQW, query_routing = self.query(x_BQD, mask_BQ)
        shared_BQW, shared_routing = self.key_value(x_BQD, mask_BQ)
        shared_BHQK = heads(shared_BQW, self.d_kv)
        memory = (shared_BHQK, shared_BHQK)
        if store is not None:
            memory = store.update(*memory)
        return _attend(self, query_BQW, memory, bias), (query_routing, shared_routing)


def _attend(
    layer: Attention | SwitchAttention, query_BQW: Tensor, memory: KeysValues, bias: Tensor | None
) -> Tensor:
    """Return y_BQD: attention of the queries to the memory, and the output projection."""
    dropout = layer.dropout if layer.training else 0.0
    query_BHQK = heads(query_BQW, layer.d_kv)
    y_BQD: Tensor = layer.output(layer.attend(query_BHQK, *memory, bias, dropout))
    return y_BQD
