"""Matmul of few rows with large matrices, as in decoding: as fast as memory can be read.

By native/small_batch.c, whose result for a row does not depend on the other rows: so decoding gives
an output the same bits whatever the other outputs are (generation/decode.py). Each function has a
plain twin: `nn.functional.linear`, `reference.grouped_matmul`, and the matrices of quantised.py.

Shapes: R rows, K inputs, N outputs, E experts, B blocks of 64 outputs, G groups of inputs.
"""

from functools import cache

import torch
from torch import Tensor, nn

from switchlm import _torch
from switchlm.kernels.cpu import native

# Of all experts together. Up to here these are faster than PyTorch in float32 and 4 bits (measured
# at 768 x 3072), up to 16 in bfloat16; but a step of decoding needs one kernel for any number.
MOST_ROWS = 64
MOST_ROWS_OF_INT8 = 32  # sums are exact, so PyTorch's operator gives the same bits
_WIDTH = 32  # inputs and outputs come in multiples of it: whole vectors on every processor
_LEAST_BYTES = 2**18  # of weights below which another thread does not pay
# As in small_batch.c.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NK, _KN = {dtype: i for i, dtype in enumerate(_DTYPES)}, {d: 3 + i for i, d in enumerate(_DTYPES)}
_INT8_NK, _INT4_BLOCKS = 6, 7
_TOO_MANY = 2


def misfit(x_RK: Tensor, *weights: Tensor) -> str | None:
    """Return why the kernel does not take these, None if it does.

    Few rows in main memory, and no gradient is needed. PyTorch's operators run under autocast,
    while tracing and in a dispatch mode.
    """
    if torch.is_grad_enabled():
        return "a gradient is needed"
    if x_RK.dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, not {x_RK.dtype}"
    if not is_small(x_RK, MOST_ROWS):
        return "many rows, or rows that are not plain, in main memory and of whole vectors"
    for weight in weights:
        if weight.dtype != x_RK.dtype or type(weight) not in (Tensor, nn.Parameter):
            return "weights of another dtype, or not plain"
        if not weight.is_cpu or not weight.is_contiguous():
            return "weights that are not contiguous in main memory"
        # Of two dims, only the last one is inputs.
        if any(width % _WIDTH for width in weight.shape[1:]):
            return "weights of no whole vectors"
    return "autocast is on" if torch.is_autocast_enabled("cpu") else None


def is_small(x_RK: Tensor, most: int) -> bool:
    """Whether there are at most `most` rows, plain, in main memory, and the library exists."""
    return (
        not torch.compiler.is_compiling()
        and type(x_RK) is Tensor
        and x_RK.is_cpu
        and 0 < x_RK.numel() <= most * x_RK.shape[-1]
        and x_RK.shape[-1] % _WIDTH == 0
        and not _torch.has_dispatch_mode()
        and native.native().library is not None
    )


def linear(x: Tensor, weight_NK: Tensor) -> Tensor:
    """Return x w^T over the last dim, for what has no `misfit`."""
    outputs, inputs = weight_NK.shape
    x_RK = x.reshape(-1, inputs)
    counts_1, shape = _one(len(x_RK)), (inputs, outputs, 0)
    y_RN = _matmul(_NK[weight_NK.dtype], x_RK, weight_NK, None, counts_1, shape)
    return y_RN.view(*x.shape[:-1], outputs)


def grouped_matmul(x_RK: Tensor, weight_EKN: Tensor, counts_E: Tensor) -> Tensor:
    """Return y_RN as `reference.grouped_matmul` does, for what has no `misfit`."""
    shape = (*weight_EKN.shape[1:], 0)
    return _matmul(_KN[weight_EKN.dtype], x_RK, weight_EKN, None, counts_E, shape)


def int8_matmul(x_RK: Tensor, codes_NK: Tensor, scale_N: Tensor) -> Tensor:
    """Return what an `Int8Matrix` does, for rows that are few (`is_small`)."""
    outputs, inputs = codes_NK.shape
    counts_1 = _one(x_RK.shape[0])
    return _matmul(_INT8_NK, x_RK, codes_NK, scale_N, counts_1, (inputs, outputs, 0))


def int4_matmul(x_RK: Tensor, codes_BKJ: Tensor, scale_GN2: Tensor) -> Tensor:
    """Return what an `Int4Matrix` does, for rows that are few (`is_small`).

    The outputs that pad the last block are included.
    """
    groups, outputs, _ = scale_GN2.shape
    inputs = codes_BKJ.shape[1]
    shape = (inputs, outputs, inputs // groups)
    return _matmul(_INT4_BLOCKS, x_RK, codes_BKJ, scale_GN2, _one(x_RK.shape[0]), shape)


@cache
def _one(rows: int) -> Tensor:
    """Return the counts of a single matrix."""
    return torch.tensor([rows], device="cpu")


def _matmul(
    layout: int,
    x_RK: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    counts_E: Tensor,
    shape: tuple[int, int, int],
) -> Tensor:
    """Return y_RN, in the dtype of x.

    shape: inputs, outputs, and inputs per group of 4 bits.
    """
    assert weight.is_contiguous(), "read as one block of memory"
    assert x_RK.shape[1] == shape[0], f"rows of {x_RK.shape[1]} for {shape[0]} inputs"
    assert counts_E.dtype == torch.int64
    assert counts_E.is_contiguous()
    rows, experts = x_RK.shape[0], counts_E.shape[0]
    x32_RK = x_RK.float().contiguous()
    y_RN = x32_RK.new_empty(rows, shape[1])
    size = weight.nbytes // experts
    failed = native.library().small_batch_matmul(
        layout, weight.data_ptr(), None if scale is None else scale.data_ptr(), size, *shape,
        x32_RK.data_ptr(), y_RN.data_ptr(), rows, counts_E.data_ptr(), experts,
        native.threads_for(size, _LEAST_BYTES),
    )  # fmt: skip
    assert failed != _TOO_MANY, f"experts have more than the {rows} rows of the input"
    if failed:
        raise MemoryError(f"No memory left to multiply {rows} rows.")
    return y_RN.to(x_RK.dtype)
