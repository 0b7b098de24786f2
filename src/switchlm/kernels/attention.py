"""Attention with a bias that learns, in main memory: a few rows at a time, each on one core.

No fused kernel gives the gradient of a bias on a CPU, and the fallback of
`scaled_dot_product_attention` passes more than a dozen times over all scores. Here some rows of the
batch go through every step while their scores are in the cache, and each thread has rows of its
own, so that none waits for another. The result has the same bits with any number of threads.

Shapes: B batch, H heads, Q queries, M keys and values (memory), K head width, N = B * H products,
G groups of rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchlm.kernels import workers

MOST_GROUPS = 16  # each sums its own gradient of the bias; no more threads than groups
CACHED_SCORES = 2**18  # of one block of rows: 1 MiB


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


@dataclass(frozen=True)
class _Groups:
    """Rows of the batch in groups, as many as fill the cache, whatever the number of threads.

    rows: of the batch. scores_a_row: H * Q * M.
    """

    rows: int
    scores_a_row: int

    @property
    def size(self) -> int:
        """Rows of a group; the last may have fewer."""
        wanted = self.rows * self.scores_a_row // CACHED_SCORES
        return max(math.ceil(self.rows / min(max(wanted, 1), MOST_GROUPS)), 1)

    @property
    def number(self) -> int:
        return math.ceil(self.rows / self.size)

    def parts(self) -> list[list[int]]:
        """Return the groups of each thread."""
        threads = max(min(torch.get_num_threads(), self.number), 1)
        return [list(range(thread, self.number, threads)) for thread in range(threads)]

    def blocks(self, group: int) -> list[tuple[int, int]]:
        """Return (first row, end row) of the blocks of a group whose scores fit the cache."""
        first, end = group * self.size, min((group + 1) * self.size, self.rows)
        step = max(CACHED_SCORES // max(self.scores_a_row, 1), 1)
        return [(row, min(row + step, end)) for row in range(first, end, step)]


class _BiasedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        rows, heads, queries = query.shape[:3]
        query_NQK, key_NKM, value_NMK = (x.flatten(0, 1) for x in (query, key.mT, value))
        weight_NQM = query_NQK.new_empty(rows * heads, queries, key.shape[2])
        y_NQK = torch.empty_like(query_NQK)
        groups = _Groups(rows, heads * queries * key.shape[2])

        def attend(part: Sequence[int]) -> None:
            for group in part:
                for row, last in groups.blocks(group):
                    at = slice(row * heads, last * heads)
                    score_NQM = weight_NQM[at]
                    torch.bmm(query_NQK[at], key_NKM[at], out=score_NQM)
                    score_NQM.unflatten(0, (-1, heads)).add_(_rows(bias, row, last))
                    torch.softmax(score_NQM, -1, out=score_NQM)
                    torch.bmm(score_NQM, value_NMK[at], out=y_NQK[at])

        workers.share(attend, groups.parts())
        ctx.save_for_backward(query_NQK, key_NKM, value_NMK, weight_NQM)
        ctx.bias_shape = bias.shape
        ctx.groups = groups
        ctx.heads = heads
        return y_NQK.unflatten(0, (rows, heads))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        query_NQK, key_NKM, value_NMK, weight_NQM = ctx.saved_tensors
        groups, heads = ctx.groups, ctx.heads
        dy_NQK = gradients[0].flatten(0, 1)
        dquery_NQK, dkey_NKM, dvalue_NMK = (
            torch.empty_like(x) for x in (query_NQK, key_NKM, value_NMK)
        )
        shared = ctx.bias_shape[0] == 1
        sums = groups.number if shared else groups.rows
        dbias = query_NQK.new_zeros(sums, *ctx.bias_shape[1:])

        def differentiate(part: Sequence[int]) -> None:
            for group in part:
                for row, last in groups.blocks(group):
                    at = slice(row * heads, last * heads)
                    torch.bmm(weight_NQM[at].mT, dy_NQK[at], out=dvalue_NMK[at])
                    dscore_NQM = torch.bmm(dy_NQK[at], value_NMK[at].mT)
                    _softmax_backward_(dscore_NQM, weight_NQM[at])
                    torch.bmm(dscore_NQM, key_NKM[at].mT, out=dquery_NQK[at])
                    torch.bmm(query_NQK[at].mT, dscore_NQM, out=dkey_NKM[at])
                    into = dbias[group : group + 1] if shared else dbias[row:last]
                    into += dscore_NQM.unflatten(0, (-1, heads)).sum_to_size(into.shape)

        workers.share(differentiate, groups.parts())
        dquery, dkey, dvalue = (
            x.unflatten(0, (groups.rows, heads)) for x in (dquery_NQK, dkey_NKM.mT, dvalue_NMK)
        )
        return dquery, dkey, dvalue, dbias.sum(0, keepdim=True) if shared else dbias


def _rows(bias: Tensor, first: int, end: int) -> Tensor:
    return bias if bias.shape[0] == 1 else bias[first:end]


def _softmax_backward_(gradient_NQM: Tensor, weight_NQM: Tensor) -> None:
    """Turn the gradient of softmax's output into that of its input, in place, in one pass."""
    torch.ops.aten._softmax_backward_data.out(
        gradient_NQM, weight_NQM, -1, weight_NQM.dtype, grad_input=gradient_NQM
    )
