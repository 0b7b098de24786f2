"""Linear maps that PyTorch is slow at on a CPU: small ones, and 16 bits without instructions.

BLAS libraries pack their factors first, which takes longer than the arithmetic where a matrix has
some thousand numbers, however many rows there are: `linear` is native/gemm.c, forward and backward.

On a processor without instructions for 16-bit numbers PyTorch multiplies one after the other,
twenty to a hundred times as slowly as in float32: `upcast_linear` converts the factors to float32
first. Sums are then in float32, and the result is rounded once, as by processors with such
instructions.

The plain twin of both is `nn.functional.linear`. Shapes: R rows, K inputs, N outputs.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from switchlm import _torch
from switchlm.kernels.cpu import native

LARGEST = 2**14  # numbers of a matrix: as measured, at least twice as fast as PyTorch up to it
MOST_WORK = 2**25  # multiply-adds above which PyTorch's threads pay


def misfit(x: Tensor, weight_NK: Tensor) -> str | None:
    """Return why `linear` does not take these, None if it does.

    Float32, in main memory, small, and a gradient is needed. The number of threads plays no part,
    so it changes no result. PyTorch's operators run under autocast, while tracing and in a dispatch
    mode.
    """
    if not torch.is_grad_enabled():
        return "no gradient is needed"
    reason = native.misfit(x, weight_NK)
    if reason is not None:
        return reason
    if weight_NK.numel() > LARGEST or not 0 < x.numel() * weight_NK.shape[0] <= MOST_WORK:
        return "not small"
    if x.shape[-1] != weight_NK.shape[1] or any(width % native.WIDTH for width in weight_NK.shape):
        return "other widths, or no whole vectors"
    if not (x.is_contiguous() and weight_NK.is_contiguous()):
        return "not contiguous"
    return "autocast is on" if torch.is_autocast_enabled("cpu") else None


def linear(x: Tensor, weight_NK: Tensor) -> Tensor:
    """Return x w^T over the last dim, for what has no `misfit`."""
    y: Tensor = _Linear.apply(x, weight_NK)
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_NK)
        outputs, inputs = weight_NK.shape
        y = x.new_empty(*x.shape[:-1], outputs)
        weight_KN = weight_NK.t().contiguous()
        _matmul(x, (inputs, 1), weight_KN, y, (x.numel() // inputs, inputs, outputs))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_NK = ctx.saved_tensors
        dy = gradients[0].contiguous()
        outputs, inputs = weight_NK.shape
        rows = x.numel() // inputs
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        if dx is not None:
            _matmul(dy, (outputs, 1), weight_NK, dx, (rows, outputs, inputs))
        dweight_NK = torch.empty_like(weight_NK) if ctx.needs_input_grad[1] else None
        if dweight_NK is not None:
            _matmul(dy, (1, outputs), x, dweight_NK, (outputs, rows, inputs))
        return dx, dweight_NK


def _matmul(
    a: Tensor, strides: tuple[int, int], b_KN: Tensor, y_MN: Tensor, shape: tuple[int, int, int]
) -> None:
    """Write a [M, K], whose strides are given, times b into y.

    shape: M, K, N.
    """
    width = shape[2]
    native.library().gemm(
        a.data_ptr(), *strides, b_KN.data_ptr(), width, y_MN.data_ptr(), width, *shape, 0, 0
    )


DTYPES = (torch.bfloat16, torch.float16)


@cache
def is_slow(dtype: torch.dtype) -> bool:
    """Whether PyTorch is slow at matmul in this dtype in main memory, on this machine."""
    return dtype in DTYPES and not _torch.has_fast_matmul(dtype)


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that nn.functional.linear would multiply x in."""
    device = x.device.type
    casts = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if casts else x.dtype


def upcast_misfit(x: Tensor, weight_NK: Tensor) -> str | None:
    """Return why `upcast_linear` is not the faster one for x, None if it is."""
    if not x.is_cpu or torch.compiler.is_compiling():
        return "not in main memory, or traced"
    dtype = matmul_dtype(x)
    return None if is_slow(dtype) else f"matmul in {dtype} is fast here"


def upcast_linear(x: Tensor, weight_NK: Tensor) -> Tensor:
    """Return nn.functional.linear(x, w), with gradients, computed in float32."""
    dtype = matmul_dtype(x)
    with torch.autocast("cpu", enabled=False):
        wide = nn.functional.linear(x.to(dtype).float(), weight_NK.to(dtype).float())
        return wide.to(dtype)
