"""Products of few rows with large matrices, as in decoding: as fast as memory can be read.

The work is done by native/few_rows.c, whose results for a row do not depend on the rows beside it.
Each function here has a plain twin: `nn.functional.linear`, `reference.grouped_matmul`, and the
matrices of quantised.py.

Shapes: R rows, K inputs, N outputs, E experts, B blocks of 64 outputs, G groups of inputs.
"""

from functools import cache

import torch
from torch import Tensor, nn

from switchlm import _torch
from switchlm.kernels.cpu import native

# Up to where these products are the faster ones; measured at 768 x 3072.
MOST_ROWS = {torch.float32: 64, torch.bfloat16: 16}
MOST_ROWS_OF_EXPERTS = 64  # of all together, of which each has some
MOST_ROWS_OF_INT8, MOST_ROWS_OF_INT4 = 32, 64
_WIDTH = 64  # inputs and outputs come in multiples of it: whole vectors on every processor
_LEAST_BYTES = 2**18  # of weights below which waking a thread does not pay
# As in few_rows.c.
_FLOAT32_NK, _BFLOAT16_NK, _FLOAT32_KN, _BFLOAT16_KN, _INT8_NK, _INT4_BLOCKS = range(6)
_TOO_MANY = 2
_NK = {torch.float32: _FLOAT32_NK, torch.bfloat16: _BFLOAT16_NK}
_KN = {torch.float32: _FLOAT32_KN, torch.bfloat16: _BFLOAT16_KN}


def misfit(x_RK: Tensor, *weights: Tensor) -> str | None:
    """Return why these may not be multiplied here, None if they may.

    Few rows in main memory, and nobody wants gradients. Under autocast, a tracer or a mode that
    watches operators, PyTorch's own are the right ones.
    """
    if torch.is_grad_enabled():
        return "gradients are wanted"
    if x_RK.dtype not in MOST_ROWS:
        return f"it takes float32 and bfloat16, not {x_RK.dtype}"
    if not few(x_RK, MOST_ROWS[x_RK.dtype] if weights[0].dim() == 2 else MOST_ROWS_OF_EXPERTS):
        return "many rows, or rows that are not plain, in main memory and of whole vectors"
    for weight in weights:
        if weight.dtype != x_RK.dtype or type(weight) not in (Tensor, nn.Parameter):
            return "weights of another dtype, or not plain"
        if not weight.is_cpu or not weight.is_contiguous():
            return "weights that are not contiguous in main memory"
        # Of two dims, only the last are inputs.
        if any(width % _WIDTH for width in weight.shape[1:]):
            return "weights of no whole vectors"
    return "autocast is on" if torch.is_autocast_enabled("cpu") else None


def few(x_RK: Tensor, most: int) -> bool:
    """Whether there are at most so many rows, plain, in main memory, and a library for them."""
    return (
        not torch.compiler.is_compiling()
        and type(x_RK) is Tensor
        and x_RK.is_cpu
        and 0 < x_RK.numel() <= most * x_RK.shape[-1]
        and x_RK.shape[-1] % _WIDTH == 0
        and not _torch.has_dispatch_mode()
        and native.native().library is not None
    )


def linear(x_RK: Tensor, weight_NK: Tensor) -> Tensor:
    """Return x w^T, [R, N], for what has no `misfit`."""
    outputs, inputs = weight_NK.shape
    counts_1 = _one(x_RK.shape[0])
    return _product(_NK[weight_NK.dtype], x_RK, weight_NK, None, counts_1, (inputs, outputs, 0))


def grouped_matmul(x_RK: Tensor, weight_EKN: Tensor, counts_E: Tensor) -> Tensor:
    """Return y_RN as `reference.grouped_matmul` does, for what has no `misfit`."""
    shape = (*weight_EKN.shape[1:], 0)
    return _product(_KN[weight_EKN.dtype], x_RK, weight_EKN, None, counts_E, shape)


def int8_matmul(x_RK: Tensor, codes_NK: Tensor, scale_N: Tensor) -> Tensor:
    """Return the product with an `Int8Matrix`, rows rounded alike, for rows that are `few`."""
    outputs, inputs = codes_NK.shape
    counts_1 = _one(x_RK.shape[0])
    return _product(_INT8_NK, x_RK, codes_NK, scale_N, counts_1, (inputs, outputs, 0))


def int4_matmul(x_RK: Tensor, codes_BKJ: Tensor, scale_GN2: Tensor) -> Tensor:
    """Return the product with an `Int4Matrix`, rows rounded alike, for rows that are `few`.

    Outputs that only fill up the last block come along.
    """
    groups, outputs, _ = scale_GN2.shape
    inputs = codes_BKJ.shape[1]
    shape = (inputs, outputs, inputs // groups)
    return _product(_INT4_BLOCKS, x_RK, codes_BKJ, scale_GN2, _one(x_RK.shape[0]), shape)


def rms_norm(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """Return what `norm.rms_norm` does, for float32 rows that are `few`."""
    x, weight_D = x.contiguous(), weight_D.contiguous()
    y = torch.empty_like(x)
    width = x.shape[-1]
    native.library().rms_norm(
        x.data_ptr(), weight_D.data_ptr(), y.data_ptr(), x.numel() // width, width, epsilon
    )
    return y


@cache
def _one(rows: int) -> Tensor:
    """Return the counts of a single matrix."""
    return torch.tensor([rows], device="cpu")


def _product(
    form: int,
    x_RK: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    counts_E: Tensor,
    shape: tuple[int, int, int],
) -> Tensor:
    """Return y_RN, in the dtype of x.

    shape: inputs, outputs and, of 4 bits, inputs in a group.
    """
    assert weight.is_contiguous(), "its numbers are read one after the other"
    assert x_RK.shape[1] == shape[0], f"rows of {x_RK.shape[1]} for {shape[0]} inputs"
    assert counts_E.dtype == torch.int64
    assert counts_E.is_contiguous()
    rows, experts = x_RK.shape[0], counts_E.shape[0]
    x32_RK = x_RK.float().contiguous()
    y_RN = x32_RK.new_empty(rows, shape[1])
    size = weight.nbytes // experts
    failed = native.library().few_rows(
        form,
        weight.data_ptr(),
        None if scale is None else scale.data_ptr(),
        size,
        *shape,
        x32_RK.data_ptr(),
        y_RN.data_ptr(),
        rows,
        counts_E.data_ptr(),
        experts,
        native.threads_for(size, _LEAST_BYTES),
    )
    assert failed != _TOO_MANY, f"experts have more than the {rows} rows of the input"
    if failed:
        raise MemoryError(f"No memory left to multiply {rows} rows.")
    return y_RN.to(x_RK.dtype)
