"""Attention of one query a head, as in decoding: native/one_query.c, once over keys and values.

PyTorch's kernel for it takes longer to set out than to compute. The plain twin is
`nn.functional.scaled_dot_product_attention`. What a row gets depends on no other row, and not on
how many masked places follow.

Shapes: B batch, H heads, M keys and values (memory), K head width.
"""

import torch
from torch import Tensor

from switchlm.kernels.native import native

_WIDTH = 16  # head widths come in multiples of it: whole vectors on every processor
_LEAST_NUMBERS = 2**16  # of keys below which waking a thread does not pay


def fits(query_BH1K: Tensor, key_BHMK: Tensor, value_BHMK: Tensor, bias: Tensor | None) -> bool:
    """Whether `one_query` takes these: one query, in main memory, and nobody wants gradients."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and query_BH1K.shape[2] == 1
        and query_BH1K.is_cpu
        and query_BH1K.dtype == key_BHMK.dtype == value_BHMK.dtype
        and query_BH1K.dtype in (torch.float32, torch.bfloat16)
        and query_BH1K.shape[3] % _WIDTH == 0
        and key_BHMK.stride() == value_BHMK.stride()
        and key_BHMK.stride(3) == 1
        and type(query_BH1K) is type(key_BHMK) is type(value_BHMK) is Tensor
        and (bias is None or (type(bias) is Tensor and bias.is_cpu))
        and not torch._C._len_torch_dispatch_stack()
        and native().library is not None
    )


def one_query(
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
