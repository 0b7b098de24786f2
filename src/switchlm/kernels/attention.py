"""Attention with a bias that learns, in main memory: a few rows at a time, each on one core.

No fused kernel gives the gradient of a bias on a CPU, and the fallback of
`scaled_dot_product_attention` passes more than a dozen times over all scores. Here some rows of the
batch go through every step while their scores are in the cache, and each thread has rows of its
own, so that none waits for another. The result has the same bits with any number of threads.

Shapes: B batch, H heads, Q queries, M keys and values (memory), K head width, N = B * H products,
G groups of rows.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchlm.kernels import workers
from switchlm.kernels.workers import Run

GROUPS = 16  # each sums its own gradient of the bias; no more threads than groups
CACHED_SCORES = 2**18  # of one block of rows: 1 MiB
LEAST_SCORES = 2**20  # of the batch; below, waking a thread does not pay


def fits(query_BHQK: Tensor, bias: Tensor) -> bool:
    """Whether `biased_attention` takes such tensors: plain ones, float32, in main memory."""
    plain = type(query_BHQK) is Tensor and not torch.compiler.is_compiling()
    in_memory = query_BHQK.device.type == bias.device.type == "cpu"
    return plain and in_memory and query_BHQK.dtype == bias.dtype == torch.float32


def biased_attention(
    query_BHQK: Tensor, key_BHMK: Tensor, value_BHMK: Tensor, bias: Tensor
) -> Tensor:
    """Return softmax(q k^T + bias) v, [B, H, Q, K], with gradients of all four.

    bias: [1 or B, 1 or H, Q, M]. All float32, on a CPU.
    """
    y_BHQK: Tensor = _BiasedAttention.apply(query_BHQK, key_BHMK, value_BHMK, bias)
    return y_BHQK


class _BiasedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        rows, heads, queries = query.shape[:3]
        query_NQK, key_NMK, value_NMK = (x.flatten(0, 1) for x in (query, key, value))
        weight_NQM = query_NQK.new_empty(rows * heads, queries, key.shape[2])
        y_NQK = torch.empty_like(query_NQK)

        def attend(part: list[Run]) -> None:
            for _, first, end in part:
                for row, last in _blocks(first, end, weight_NQM.shape, heads):
                    at = slice(row * heads, last * heads)
                    score_NQM = weight_NQM[at]
                    torch.bmm(query_NQK[at], key_NMK[at].mT, out=score_NQM)
                    score_NQM.unflatten(0, (-1, heads)).add_(_rows(bias, row, last))
                    torch.softmax(score_NQM, -1, out=score_NQM)
                    torch.bmm(score_NQM, value_NMK[at], out=y_NQK[at])

        workers.share(attend, _parts(rows, weight_NQM.numel()))
        ctx.save_for_backward(query_NQK, key_NMK, value_NMK, weight_NQM, y_NQK)
        ctx.bias_shape = bias.shape
        ctx.rows, ctx.heads = rows, heads
        return y_NQK.unflatten(0, (rows, heads))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        query_NQK, key_NMK, value_NMK, weight_NQM, y_NQK = ctx.saved_tensors
        rows, heads = ctx.rows, ctx.heads
        dy_NQK = gradients[0].flatten(0, 1)
        # Softmax's gradient is weight * (dweight - sum of weight * dweight), and that sum is dy y.
        mean_NQ1 = (dy_NQK * y_NQK).sum(-1, keepdim=True)
        dquery_NQK, dkey_NMK, dvalue_NMK = (
            torch.empty_like(x) for x in (query_NQK, key_NMK, value_NMK)
        )
        shared = ctx.bias_shape[0] == 1
        dbias = query_NQK.new_zeros(GROUPS if shared else rows, *ctx.bias_shape[1:])

        def differentiate(part: list[Run]) -> None:
            for group, first, end in part:
                for row, last in _blocks(first, end, weight_NQM.shape, heads):
                    at = slice(row * heads, last * heads)
                    torch.bmm(weight_NQM[at].mT, dy_NQK[at], out=dvalue_NMK[at])
                    dscore_NQM = torch.bmm(dy_NQK[at], value_NMK[at].mT)
                    dscore_NQM.sub_(mean_NQ1[at]).mul_(weight_NQM[at])
                    torch.bmm(dscore_NQM, key_NMK[at], out=dquery_NQK[at])
                    torch.bmm(dscore_NQM.mT, query_NQK[at], out=dkey_NMK[at])
                    into = dbias[group : group + 1] if shared else dbias[row:last]
                    into += dscore_NQM.unflatten(0, (-1, heads)).sum_to_size(into.shape)

        workers.share(differentiate, _parts(rows, weight_NQM.numel()))
        dquery, dkey, dvalue = (
            x.unflatten(0, (rows, heads)) for x in (dquery_NQK, dkey_NMK, dvalue_NMK)
        )
        return dquery, dkey, dvalue, dbias.sum(0, keepdim=True) if shared else dbias


def _parts(rows: int, scores: int) -> list[list[Run]]:
    """Return what each thread takes: (group, first row, end row)."""
    size = max(-(-rows // GROUPS), 1)
    groups = [
        (group, first, min(first + size, rows)) for group, first in enumerate(range(0, rows, size))
    ]
    threads = min(torch.get_num_threads(), len(groups))
    if threads < 2 or scores < LEAST_SCORES:
        return [groups]
    return [groups[thread::threads] for thread in range(threads)]


def _blocks(first: int, end: int, weight_shape: torch.Size, heads: int) -> list[tuple[int, int]]:
    """Return (row, end) of the blocks whose scores fit the cache."""
    scores_a_row = heads * weight_shape[1] * weight_shape[2]
    size = max(CACHED_SCORES // max(scores_a_row, 1), 1)
    return [(row, min(row + size, end)) for row in range(first, end, size)]


def _rows(bias: Tensor, first: int, end: int) -> Tensor:
    return bias if bias.shape[0] == 1 else bias[first:end]
