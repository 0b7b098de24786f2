"""The root mean square norm in half the passes over memory, for a CPU.

PyTorch has one kernel for it on a GPU; on a CPU it takes the formula apart, and autograd again.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from switchlm.kernels import few_rows


def rms_norm(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + epsilon) * weight, the mean over the last dim; all float32."""
    plain = type(x) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()
    if not plain or x.device.type != "cpu":
        return nn.functional.rms_norm(x, weight_D.shape, weight_D, epsilon)
    if not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
        # In decoding, where rows are few, autograd's wrapping takes longer than the sums.
        if few_rows.few(x, few_rows.MOST_ROWS[torch.float32]):
            return few_rows.rms_norm(x, weight_D, epsilon)
        return _normalised(x, weight_D, epsilon)[0]
    y: Tensor = _RMSNorm.apply(x, weight_D, epsilon)
    return y


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
