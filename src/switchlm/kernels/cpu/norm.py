"""The root mean square norm in one pass each way, for a CPU.

PyTorch has one kernel for it on a GPU; on a CPU it takes the formula apart, and autograd again.
native/norm.c does it at once; what it does not take, a few operators do in half the passes.

Shapes: R rows, D width.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from switchlm.kernels.cpu import small_batch
from switchlm.kernels.cpu.native import misfit as native_misfit
from switchlm.kernels.cpu.native import native

_WIDTH = 16  # rows come in multiples of it: whole vectors on every processor
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
    reason = native_misfit(x, weight_D)
    if reason is not None:
        return reason
    if x.shape[-1:] != weight_D.shape or x.shape[-1] % _WIDTH or not x.numel():
        return "other widths, no whole vectors, or no rows"
    contiguous = x.is_contiguous() and weight_D.is_contiguous()
    return None if contiguous else "not contiguous"


def plain_misfit(x: Tensor, weight_D: Tensor) -> str | None:
    """Return why a few operators are not the fastest here, None if they are."""
    if type(x) not in (Tensor, nn.Parameter) or torch.compiler.is_compiling():
        return "traced, or no plain tensor"
    return None if x.is_cpu else "not in main memory"


def native_rms_norm(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + epsilon) * weight by norm.c, for what has no `misfit`."""
    if not _wants_autograd():
        return _forward(x, weight_D, epsilon)[0]
    y: Tensor = _OnePass.apply(x, weight_D, epsilon)
    return y


def plain_rms_norm(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """Return the same by a few operators, for what has no `plain_misfit`."""
    if not _wants_autograd():
        return _normalised(x, weight_D, epsilon)[0]
    y: Tensor = _RMSNorm.apply(x, weight_D, epsilon)
    return y


def _wants_autograd() -> bool:
    return torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")


def _forward(x: Tensor, weight_D: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return the norm of x [..., D], and scale_R, for what `fits`."""
    library = native().library
    assert library is not None
    width = x.shape[-1]
    y, scale_R = torch.empty_like(x), x.new_empty(x.numel() // width)
    library.norm(
        x.data_ptr(), weight_D.data_ptr(), y.data_ptr(), scale_R.data_ptr(),
        len(scale_R), width, epsilon, _threads(x),
    )  # fmt: skip
    return y, scale_R


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if native().threads and x.numel() >= _LEAST_NUMBERS else 1


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        y, scale_R = _forward(x, weight_D, epsilon)
        ctx.save_for_backward(x, weight_D, scale_R)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, scale_R = ctx.saved_tensors
        library = native().library
        assert library is not None
        dy, dx = gradients[0].contiguous(), torch.empty_like(x)
        rows, width = len(scale_R), x.shape[-1]
        dweight_GD = x.new_empty(math.ceil(rows / _GROUP), width)
        library.norm_backward(
            dy.data_ptr(), x.data_ptr(), weight_D.data_ptr(), scale_R.data_ptr(),
            dx.data_ptr(), dweight_GD.data_ptr(), rows, width, _threads(x),
        )  # fmt: skip
        # A view of the first group would keep them all in memory.
        return dx, dweight_GD[0].clone() if len(dweight_GD) > 1 else dweight_GD[0], None


def _normalised(x: Tensor, weight_D: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return the norm of x [..., D], and the scale [..., 1] that it multiplied by."""
    mean = torch.linalg.vecdot(x, x).div_(x.shape[-1])
    scale = mean.add_(epsilon).rsqrt_().unsqueeze(-1)
    return (x * scale).mul_(weight_D), scale


class _RMSNorm(torch.autograd.Function):
    """Shapes: N rows, D width. Autocast is off: it would take the sums in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            x_ND = x.reshape(-1, x.shape[-1])
            y_ND, scale_N1 = _normalised(x_ND, weight_D, epsilon)
            ctx.save_for_backward(x_ND, scale_N1, weight_D)
            return y_ND.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x_ND, scale_N1, weight_D = ctx.saved_tensors
        dy_ND = gradients[0].reshape(x_ND.shape)
        with torch.autocast("cpu", enabled=False):
            product_ND = dy_ND * x_ND
            dweight_D = torch.mv(product_ND.mT, scale_N1[:, 0])
            # Through the mean: -x * scale^3 * mean(dy * weight * x).
            share_N1 = torch.mv(product_ND, weight_D)[:, None]
            share_N1.mul_(scale_N1.square()).div_(-x_ND.shape[1])
            dx_ND = (dy_ND * weight_D).addcmul_(x_ND, share_N1).mul_(scale_N1)
        return dx_ND.view(gradients[0].shape), dweight_D, None
