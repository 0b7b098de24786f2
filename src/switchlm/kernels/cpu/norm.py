"""RMSNorm on a CPU, in one pass each way: native/norm.c.

The plain twin is `nn.functional.rms_norm`, which is several operators on a CPU, forward and
backward.

Shapes: R rows, D width.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchlm.kernels.cpu import native, small_batch

_GROUP = 256  # rows per gradient of the weight, as in norm.c
_LEAST_NUMBERS = 2**16  # below which another thread does not pay


def small_batch_misfit(x: Tensor, weight_D: Tensor) -> str | None:
    """Return why these are not the few rows of a decoding step, None if they are.

    A cheaper check than `misfit`, which would take longer than the norm of one row.
    """
    if _needs_autograd():
        return "a gradient is needed, or autocast is on"
    small = small_batch.is_small(x, small_batch.MOST_ROWS)
    return None if small else "many rows, or not plain ones in main memory of whole vectors"


def misfit(x: Tensor, weight_D: Tensor) -> str | None:
    """Return why norm.c does not take these, None if it does.

    Float32 rows of whole vectors, one after the other.
    """
    reason = native.misfit(x, weight_D)
    if reason is not None:
        return reason
    if x.shape[-1:] != weight_D.shape or x.shape[-1] % native.WIDTH or not x.numel():
        return "other widths, no whole vectors, or no rows"
    contiguous = x.is_contiguous() and weight_D.is_contiguous()
    return None if contiguous else "not contiguous"


def rms_norm(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + epsilon) * weight, for what has no `misfit`."""
    if not _needs_autograd():
        return _forward(x.contiguous(), weight_D.contiguous(), epsilon, None)
    y: Tensor = _RMSNorm.apply(x, weight_D, epsilon)
    return y


def _needs_autograd() -> bool:
    return torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")


def _forward(x: Tensor, weight_D: Tensor, epsilon: float, scale_R: Tensor | None) -> Tensor:
    """Return the norm of x [..., D], and write the scale of each row if that is needed."""
    width, numbers = x.shape[-1], x.numel()
    y = torch.empty_like(x)
    native.library().rms_norm(
        x.data_ptr(), weight_D.data_ptr(), y.data_ptr(),
        None if scale_R is None else scale_R.data_ptr(),
        numbers // width, width, epsilon, native.threads_for(numbers, _LEAST_NUMBERS),
    )  # fmt: skip
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        scale_R = x.new_empty(x.numel() // x.shape[-1])
        y = _forward(x, weight_D, epsilon, scale_R)
        ctx.save_for_backward(x, weight_D, scale_R)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, scale_R = ctx.saved_tensors
        dy, dx = gradients[0].contiguous(), torch.empty_like(x)
        rows, width = len(scale_R), x.shape[-1]
        dweight_GD = x.new_empty(math.ceil(rows / _GROUP), width)
        native.library().rms_norm_backward(
            dy.data_ptr(), x.data_ptr(), weight_D.data_ptr(), scale_R.data_ptr(),
            dx.data_ptr(), dweight_GD.data_ptr(), rows, width,
            native.threads_for(x.numel(), _LEAST_NUMBERS),
        )  # fmt: skip
        # A view of the first group would keep all of them in memory.
        return dx, dweight_GD[0].clone() if len(dweight_GD) > 1 else dweight_GD[0], None
