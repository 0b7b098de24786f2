"""The root mean square norm in one pass each way, for a CPU: native/norm.c.

PyTorch, the plain twin, has one kernel for it on a GPU; on a CPU it takes the formula apart, and
autograd again.

Shapes: R rows, D width.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchlm.kernels.cpu import native, small_batch

_GROUP = 256  # rows that norm.c sums together
_LEAST_NUMBERS = 2**16  # below which waking a thread does not pay


def few_rows_misfit(x: Tensor, weight_D: Tensor) -> str | None:
    """Return why x is not normed as in decoding, where autograd's wrapping takes the longest."""
    if _wants_autograd():
        return "gradients are wanted, or autocast is on"
    few = small_batch.few(x, small_batch.MOST_ROWS[torch.float32])
    return None if few else "many rows, or not plain ones in main memory of whole vectors"


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
    """Return x / sqrt(mean(x^2) + epsilon) * weight by norm.c, for what has no `misfit`."""
    if not _wants_autograd():
        return _forward(x, weight_D, epsilon)[0]
    y: Tensor = _RMSNorm.apply(x, weight_D, epsilon)
    return y


def _wants_autograd() -> bool:
    return torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")


def _forward(x: Tensor, weight_D: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return the norm of x [..., D], and scale_R, by norm.c."""
    width = x.shape[-1]
    y, scale_R = torch.empty_like(x), x.new_empty(x.numel() // width)
    native.library().norm(
        x.data_ptr(), weight_D.data_ptr(), y.data_ptr(), scale_R.data_ptr(),
        len(scale_R), width, epsilon, native.threads_for(x.numel(), _LEAST_NUMBERS),
    )  # fmt: skip
    return y, scale_R


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        y, scale_R = _forward(x, weight_D, epsilon)
        ctx.save_for_backward(x, weight_D, scale_R)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, scale_R = ctx.saved_tensors
        dy, dx = gradients[0].contiguous(), torch.empty_like(x)
        rows, width = len(scale_R), x.shape[-1]
        dweight_GD = x.new_empty(math.ceil(rows / _GROUP), width)
        native.library().norm_backward(
            dy.data_ptr(), x.data_ptr(), weight_D.data_ptr(), scale_R.data_ptr(),
            dx.data_ptr(), dweight_GD.data_ptr(), rows, width,
            native.threads_for(x.numel(), _LEAST_NUMBERS),
        )  # fmt: skip
        # A view of the first group would keep them all in memory.
        return dx, dweight_GD[0].clone() if len(dweight_GD) > 1 else dweight_GD[0], None
