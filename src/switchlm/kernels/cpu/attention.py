"""Attention in main memory, three kernels for three situations.

Their plain twin is `nn.functional.scaled_dot_product_attention`, whose fused kernel gives no
gradient of a bias on a CPU, and whose fallback passes more than a dozen times over all scores.

`biased_attention`: training, any shape, with a bias that learns. Some rows of the batch go through
every step while their scores are in the cache, and each thread has rows of its own, so that none
waits for another.
`small_attention`: training of small heads on short sequences, where PyTorch's products take several
times as long as their arithmetic; native/attention.c, forward and backward. The scores of some
queries of one head are made, used and forgotten while they are in the cache; for backward two
numbers per query are kept.
`decode_attention`: one query per head, as in decoding; native/one_query.c, once over keys and
values. What a row gets depends on no other row, and not on how many masked places follow.

All give the same bits with any number of threads.

Shapes: B batch, H heads, Q queries, M keys and values (memory), K head width, N = B * H products,
G groups of rows, W = H * K.
"""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchlm import _torch
from switchlm.kernels.cpu import threads
from switchlm.kernels.cpu.native import misfit as native_misfit
from switchlm.kernels.cpu.native import native

MOST_GROUPS = 16  # each sums its own gradient of the bias; no more threads than groups
CACHED_SCORES = 2**18  # of one block of rows: 1 MiB


def biased_misfit(
    query_BHQK: Tensor, key_BHMK: Tensor, value_BHMK: Tensor, bias: Tensor | None
) -> str | None:
    """Return why `biased_attention` does not take these, None if it does.

    Plain tensors, float32, in main memory, and a bias that learns.
    """
    if bias is None or not bias.requires_grad:
        return "no bias learns"
    if type(query_BHQK) is not Tensor or torch.compiler.is_compiling():
        return "traced, or not plain tensors"
    if not query_BHQK.is_cpu or not bias.is_cpu:
        return "not in main memory"
    if not query_BHQK.dtype == bias.dtype == torch.float32:
        return f"it takes float32, not {query_BHQK.dtype} and {bias.dtype}"
    return None


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

    rows: of the batch.
    scores_a_row: H * Q * M.
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

        threads.parallel_for(attend, groups.parts())
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
                    _torch.softmax_backward_(dscore_NQM, weight_NQM[at])
                    torch.bmm(dscore_NQM, key_NKM[at].mT, out=dquery_NQK[at])
                    torch.bmm(query_NQK[at].mT, dscore_NQM, out=dkey_NKM[at])
                    into = dbias[group : group + 1] if shared else dbias[row:last]
                    into += dscore_NQM.unflatten(0, (-1, heads)).sum_to_size(into.shape)

        threads.parallel_for(differentiate, groups.parts())
        dquery, dkey, dvalue = (
            x.unflatten(0, (groups.rows, heads)) for x in (dquery_NQK, dkey_NKM.mT, dvalue_NMK)
        )
        return dquery, dkey, dvalue, dbias.sum(0, keepdim=True) if shared else dbias


def _rows(bias: Tensor, first: int, end: int) -> Tensor:
    return bias if bias.shape[0] == 1 else bias[first:end]


_WIDTH = 16  # head widths come in multiples of it: whole vectors on every processor
_LEAST_NUMBERS = 2**16  # of keys below which waking a thread does not pay


def decode_misfit(
    query_BH1K: Tensor, key_BHMK: Tensor, value_BHMK: Tensor, bias: Tensor | None
) -> str | None:
    """Return why `decode_attention` does not take these, None if it does.

    One query, in main memory, and nobody wants gradients.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return "gradients are wanted, or somebody traces"
    if query_BH1K.shape[2] != 1 or not query_BH1K.is_cpu:
        return "more than one query, or not in main memory"
    if not query_BH1K.dtype == key_BHMK.dtype == value_BHMK.dtype:
        return "several dtypes"
    if query_BH1K.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, not {query_BH1K.dtype}"
    if query_BH1K.shape[3] % _WIDTH:
        return "heads of no whole vectors"
    if key_BHMK.stride() != value_BHMK.stride() or key_BHMK.stride(3) != 1:
        return "keys and values that do not lie alike, or not in rows"
    if not type(query_BH1K) is type(key_BHMK) is type(value_BHMK) is Tensor:
        return "not plain tensors"
    if bias is not None and not (type(bias) is Tensor and bias.is_cpu):
        return "a bias that is not plain, in main memory"
    if _torch.is_watched():
        return "somebody watches operators"
    return None if native().library is not None else native().reason


def decode_attention(
    query_BH1K: Tensor, key_BHMK: Tensor, value_BHMK: Tensor, bias: Tensor | None
) -> Tensor:
    """Return softmax(q k^T + bias) v, [B, 1, H * K], for what `fits`.

    bias: [1 or B, 1 or H, 1, M]. Softmax and sums in float32, whatever the dtype.
    """
    batch, heads, places, width = key_BHMK.shape
    built = native()
    assert built.library is not None, built.reason
    query32 = query_BH1K.float().contiguous()
    y_B1W = query32.new_empty(batch, 1, heads * width)
    bias_at, bias_strides = None, (0, 0, 0)
    if bias is not None:
        bias = bias.float()
        bias_at = bias.data_ptr()
        row, head, _, place = bias.stride()
        bias_strides = (row * (bias.shape[0] > 1), head * (bias.shape[1] > 1), place)
    failed = built.library.one_query(
        key_BHMK.dtype == torch.bfloat16,
        query32.data_ptr(),
        key_BHMK.data_ptr(),
        value_BHMK.data_ptr(),
        bias_at,
        y_B1W.data_ptr(),
        batch,
        heads,
        places,
        width,
        *key_BHMK.stride()[:3],
        *bias_strides,
        torch.get_num_threads() if built.threads and key_BHMK.numel() >= _LEAST_NUMBERS else 1,
    )
    if failed:
        raise MemoryError(f"No memory left to attend to {places} places.")
    return y_B1W.to(query_BH1K.dtype)


LARGEST_WIDTH, MOST_SCORES = 128, 2**20  # of a head: as measured; twice as fast at all of them
_MOST_GROUPS, _ROWS_OF_A_GROUP = 16, 8  # each sums its own gradient of the bias
_LEAST_SCORES = 2**16  # below which waking a thread does not pay
_NOTHING = (0, 0, 0, 0)


def small_misfit(
    query_BHQK: Tensor, key_BHMK: Tensor, value_BHMK: Tensor, bias: Tensor | None
) -> str | None:
    """Return why `small_attention` does not take these, None if it does.

    Plain tensors, float32, in main memory, and small. Under autocast, a tracer or a mode that
    watches operators, PyTorch's own are the right ones.
    """
    tensors = (query_BHQK, key_BHMK, value_BHMK, *(() if bias is None else (bias,)))
    reason = native_misfit(*tensors)
    if reason is not None:
        return reason
    if query_BHQK.shape[3] > LARGEST_WIDTH:
        return "wide heads"
    if query_BHQK.shape[2] * key_BHMK.shape[2] > MOST_SCORES or not all(
        x.numel() > 0 for x in tensors
    ):
        return "many scores, or none"
    if (
        key_BHMK.shape != value_BHMK.shape
        or query_BHQK.shape[:2] != key_BHMK.shape[:2]
        or query_BHQK.shape[3] != key_BHMK.shape[3]
        or not (bias is None or _agrees(bias, query_BHQK, key_BHMK))
    ):
        return "shapes that do not agree"
    return "autocast is on" if torch.is_autocast_enabled("cpu") else None


def _agrees(bias: Tensor, query_BHQK: Tensor, key_BHMK: Tensor) -> bool:
    """Whether the bias is of a documented shape."""
    batch, heads, queries, _ = query_BHQK.shape
    return (
        bias.dim() == 4
        and bias.shape[0] in (1, batch)
        and bias.shape[1] in (1, heads)
        and (bias.shape[2] == queries or (bias.shape[2] == 1 and not bias.requires_grad))
        and bias.shape[3] == key_BHMK.shape[2]
    )


def small_attention(
    query_BHQK: Tensor, key_BHMK: Tensor, value_BHMK: Tensor, bias: Tensor | None
) -> Tensor:
    """Return softmax(q k^T + bias) v, [B, Q, W], with gradients of all four, for what `fits`.

    bias: [1 or B, 1 or H, Q, M], or none. Queries, keys and values are read where they lie, and
        their gradients lie in memory as [B, Q or M, H, K].
    """
    tensors = (query_BHQK, key_BHMK, value_BHMK, *(() if bias is None else (bias,)))
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        y_BQW: Tensor = _SmallAttention.apply(query_BHQK, key_BHMK, value_BHMK, bias)
        return y_BQW
    inputs = _neighbours(query_BHQK, key_BHMK, value_BHMK, bias)
    return _forward(*inputs)[0]


def _neighbours(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the inputs, with the numbers of a place, and the biases of a query, side by side."""
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    if bias is not None and bias.stride(3) != 1:
        bias = bias.contiguous()
    return query, key, value, bias


def _forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return y_BQW, and what backward needs of softmax: [2, B, H, Q], see attention.c."""
    batch, heads, queries, width = query.shape
    y_BQW = query.new_empty(batch, queries, heads * width)
    kept_2BHQ = query.new_empty(2, batch, heads, queries)
    places = (*map(_heads, (query, key, value, _split(y_BQW, heads))), *[_NOTHING] * 4)
    _call(query, key, bias, places, kept_2BHQ, None)
    return y_BQW, kept_2BHQ


class _SmallAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        query, key, value, bias = _neighbours(query, key, value, bias)
        y_BQW, kept_2BHQ = _forward(query, key, value, bias)
        ctx.save_for_backward(query, key, value, bias, y_BQW, kept_2BHQ)
        return y_BQW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, y_BQW, kept_2BHQ = ctx.saved_tensors
        batch, heads, _, width = query.shape
        changes = tuple(
            x.new_empty(batch, x.shape[2], heads, width).transpose(1, 2)
            for x in (query, key, value)
        )
        dbias = None
        if ctx.needs_input_grad[3]:
            groups = batch if bias.shape[0] > 1 else math.ceil(batch / _group(batch))
            dbias = bias.new_empty(groups, *bias.shape[1:])
        dy_BQW = gradients[0].contiguous()
        outputs = (_split(y_BQW, heads), _split(dy_BQW, heads))
        places = tuple(map(_heads, (query, key, value, *outputs, *changes)))
        _call(query, key, bias, places, kept_2BHQ, dbias)
        if dbias is not None and bias.shape[0] == 1:
            for group in dbias[1:]:
                dbias[0] += group
            dbias = dbias[:1]
        return *changes, dbias


def _group(batch: int) -> int:
    """Return the rows of the batch that share a bias and are one task."""
    return math.ceil(batch / min(math.ceil(batch / _ROWS_OF_A_GROUP), _MOST_GROUPS))


def _split(x_BQW: Tensor, heads: int) -> Tensor:
    return x_BQW.unflatten(2, (heads, -1)).transpose(1, 2)


def _heads(x_BHSK: Tensor) -> tuple[int, ...]:
    """Return the `Heads` of attention.c."""
    return x_BHSK.data_ptr(), *x_BHSK.stride()[:3]


def _call(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    places: tuple[tuple[int, ...], ...],
    kept_2BHQ: Tensor,
    dbias: Tensor | None,
) -> None:
    """Run attention.c, backward where there are gradients.

    places: `Heads`, in the order there.
    """
    batch, heads, queries, width = query.shape
    keys = key.shape[2]
    of_bias, group = _NOTHING, _group(batch)
    if bias is not None:
        row, head, query_stride, _ = (
            stride * (size > 1) for size, stride in zip(bias.shape, bias.stride(), strict=True)
        )
        of_bias = bias.data_ptr(), row, head, query_stride
    if dbias is not None and bias is not None and bias.shape[0] > 1:
        group = 1
    shared = heads if dbias is not None and dbias.shape[1] == 1 else 1
    numbers = (
        *(batch, heads, queries, keys, width, group, shared),
        *(number for place in places for number in place),
        *of_bias,
        *(part.data_ptr() for part in kept_2BHQ),
        0 if dbias is None else dbias.data_ptr(),
    )
    built = native()
    assert built.library is not None, built.reason
    scores = batch * heads * queries * keys
    failed = built.library.attention(
        (ctypes.c_int64 * len(numbers))(*numbers),
        places[-1] != _NOTHING,
        torch.get_num_threads() if built.threads and scores >= _LEAST_SCORES else 1,
    )
    if failed:
        raise MemoryError(f"No memory left to attend to {keys} places.")
