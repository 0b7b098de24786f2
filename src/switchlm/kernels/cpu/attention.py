"""Attention in main memory, in C.

The plain twin is `nn.functional.scaled_dot_product_attention`, whose fused kernel gives no gradient
of a bias on a CPU, and whose fallback passes more than a dozen times over all scores.

`attention`: training, and many queries; native/attention.c, forward and backward. The scores of a
block of queries of one head stay in the cache and are not stored; two numbers per query are kept
for the backward pass.
`decode_attention`: one query per head, as in decoding; native/decode_attention.c, in one pass over
keys and values. A row's result depends neither on other rows nor on masked places after its own.

Both give the same bits with any number of threads.

Shapes: B batch, H heads, Q queries, M keys and values (memory), K head width, W = H * K.
"""

import ctypes
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchlm import _torch
from switchlm.kernels.cpu import native

_LEAST_NUMBERS = 2**16  # of keys below which another thread does not pay
_DECODED = (torch.float32, torch.bfloat16, torch.float16)  # in the order of decode_attention.c


def decode_misfit(
    query_BH1K: Tensor, key_BHMK: Tensor, value_BHMK: Tensor, bias: Tensor | None
) -> str | None:
    """Return why `decode_attention` does not take these, None if it does.

    One query, in main memory, and no gradient is needed.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return "a gradient is needed, or traced"
    if query_BH1K.shape[2] != 1 or not query_BH1K.is_cpu:
        return "more than one query, or not in main memory"
    if not query_BH1K.dtype == key_BHMK.dtype == value_BHMK.dtype:
        return "several dtypes"
    if query_BH1K.dtype not in _DECODED:
        return f"it takes float32, bfloat16 and float16, not {query_BH1K.dtype}"
    if query_BH1K.shape[3] % native.WIDTH:
        return "heads of no whole vectors"
    if key_BHMK.stride() != value_BHMK.stride() or key_BHMK.stride(3) != 1:
        return "keys and values of different strides, or not in rows"
    if not type(query_BH1K) is type(key_BHMK) is type(value_BHMK) is Tensor:
        return "not plain tensors"
    if bias is not None and not (type(bias) is Tensor and bias.is_cpu):
        return "a bias that is not plain, in main memory"
    if _torch.has_dispatch_mode():
        return "in a dispatch mode"
    return None if native.native().library is not None else native.native().reason


def decode_attention(
    query_BH1K: Tensor, key_BHMK: Tensor, value_BHMK: Tensor, bias: Tensor | None
) -> Tensor:
    """Return softmax(q k^T + bias) v, [B, 1, H * K], for what has no `decode_misfit`.

    bias: [1 or B, 1 or H, 1, M]. Softmax and sums in float32, whatever the dtype.
    """
    batch, heads, places, width = key_BHMK.shape
    query32 = query_BH1K.float().contiguous()
    y_B1W = query32.new_empty(batch, 1, heads * width)
    bias_at, bias_strides = None, (0, 0, 0)
    if bias is not None:
        bias = bias.float()
        bias_at = bias.data_ptr()
        row, head, _, place = bias.stride()
        bias_strides = (row * (bias.shape[0] > 1), head * (bias.shape[1] > 1), place)
    failed = native.library().decode_attention(
        _DECODED.index(key_BHMK.dtype),
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
        native.threads_for(key_BHMK.numel(), _LEAST_NUMBERS),
    )
    if failed:
        raise MemoryError(f"No memory left to attend to {places} places.")
    return y_B1W.to(query_BH1K.dtype)


def narrow_misfit(
    query_BH1K: Tensor, key_BHMK: Tensor, value_BHMK: Tensor, bias: Tensor | None
) -> str | None:
    """Return why `narrow_attention` does not take these, None if it does.

    One query in 16 bits, where no gradient is needed.
    """
    if torch.is_grad_enabled() or query_BH1K.shape[2] != 1:
        return "a gradient is needed, or more than one query"
    if query_BH1K.dtype not in _DECODED[1:] or torch.is_autocast_enabled("cpu"):
        return "not in 16 bits, or autocast is on"
    return native.misfit(query_BH1K, key_BHMK, value_BHMK, dtype=query_BH1K.dtype)


def narrow_attention(
    query_BH1K: Tensor, key_BHMK: Tensor, value_BHMK: Tensor, bias: Tensor | None
) -> Tensor:
    """Return what `decode_attention` does, for heads of no whole vectors, by `attention`."""
    wide = (query_BH1K.float(), key_BHMK.float(), value_BHMK.float())
    return attention(*wide, None if bias is None else bias.float()).to(query_BH1K.dtype)


_MOST_GROUPS, _ROWS_PER_GROUP = 16, 8  # each group sums its own gradient of the bias
_LEAST_SCORES = 2**16  # below which another thread does not pay
_NULL = (0, 0, 0, 0)


def misfit(
    query_BHQK: Tensor, key_BHMK: Tensor, value_BHMK: Tensor, bias: Tensor | None
) -> str | None:
    """Return why `attention` does not take these, None if it does.

    Plain tensors, float32, in main memory. PyTorch's operators run under autocast, while tracing
    and in a dispatch mode.
    """
    tensors = (query_BHQK, key_BHMK, value_BHMK, *(() if bias is None else (bias,)))
    reason = native.misfit(*tensors)
    if reason is not None:
        return reason
    if not all(x.numel() > 0 for x in tensors):
        return "no scores"
    if (
        key_BHMK.shape != value_BHMK.shape
        or query_BHQK.shape[:2] != key_BHMK.shape[:2]
        or query_BHQK.shape[3] != key_BHMK.shape[3]
        or not (bias is None or _bias_fits(bias, query_BHQK, key_BHMK))
    ):
        return "shapes that do not agree"
    return "autocast is on" if torch.is_autocast_enabled("cpu") else None


def _bias_fits(bias: Tensor, query_BHQK: Tensor, key_BHMK: Tensor) -> bool:
    """Whether the bias is of a documented shape."""
    batch, heads, queries, _ = query_BHQK.shape
    return (
        bias.dim() == 4
        and bias.shape[0] in (1, batch)
        and bias.shape[1] in (1, heads)
        and (bias.shape[2] == queries or (bias.shape[2] == 1 and not bias.requires_grad))
        and bias.shape[3] == key_BHMK.shape[2]
    )


def attention(
    query_BHQK: Tensor, key_BHMK: Tensor, value_BHMK: Tensor, bias: Tensor | None
) -> Tensor:
    """Return softmax(q k^T + bias) v, [B, Q, W], with gradients, for what has no `misfit`.

    Queries, keys and values are not copied; their gradients are in memory as [B, Q or M, H, K].

    bias: [1 or B, 1 or H, Q, M], or None.
    """
    tensors = (query_BHQK, key_BHMK, value_BHMK, bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        y_BQW: Tensor = _Attention.apply(*tensors)
        return y_BQW
    return _forward(*_last_dim_contiguous(*tensors))[0]


def _last_dim_contiguous(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the inputs with their last dim contiguous."""
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
    places = (*map(_heads, (query, key, value, _split(y_BQW, heads))), *[_NULL] * 4)
    _call(query, key, bias, places, kept_2BHQ, None)
    return y_BQW, kept_2BHQ


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        query, key, value, bias = _last_dim_contiguous(query, key, value, bias)
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
    return math.ceil(batch / min(math.ceil(batch / _ROWS_PER_GROUP), _MOST_GROUPS))


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
    of_bias, group = _NULL, _group(batch)
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
    failed = native.library().attention(
        (ctypes.c_int64 * len(numbers))(*numbers),
        places[-1] != _NULL,
        native.threads_for(batch * heads * queries * keys, _LEAST_SCORES),
    )
    if failed:
        raise MemoryError(f"No memory left to attend to {keys} places.")
