"""Cross-entropy per token: native/cross_entropy.c on a CPU, forward and backward.

The plain twin is `nn.functional.cross_entropy`, which stores the logarithm of the softmax, reads it
twice, and fills the gradient with zeros first.

Shapes: N tokens, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchlm.kernels.cpu import native

_LEAST_LOGITS = 2**18  # below which another thread does not pay


def token_losses(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Return loss_N, for what has no `misfit`: see select.py."""
    loss_N: Tensor = _CrossEntropy.apply(logits_NV, targets_N)
    return loss_N


def misfit(logits_NV: Tensor, targets_N: Tensor) -> str | None:
    """Return why the kernel does not take these, None if it does.

    Plain, in main memory, rows of whole vectors.
    """
    reason = native.misfit(logits_NV) or native.misfit(targets_N, dtype=torch.int64)
    if reason is not None:
        return reason
    if targets_N.shape != logits_NV.shape[:1] or not logits_NV.numel():
        return "other shapes, or no logits"
    if logits_NV.shape[1] % native.WIDTH or not logits_NV.is_contiguous():
        return "no whole vectors, or not contiguous"
    return None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        targets_N = targets_N.contiguous()
        rows, width = logits_NV.shape
        loss_N, kept_2N = logits_NV.new_empty(rows), logits_NV.new_empty(2, rows)
        wrong = native.library().cross_entropy(
            logits_NV.data_ptr(), targets_N.data_ptr(), loss_N.data_ptr(), kept_2N.data_ptr(),
            rows, width, native.threads_for(logits_NV.numel(), _LEAST_LOGITS),
        )  # fmt: skip
        if wrong < rows:
            raise IndexError(f"Target {int(targets_N[wrong])} is out of bounds of {width} logits.")
        ctx.save_for_backward(logits_NV, targets_N, kept_2N)
        return loss_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits_NV, targets_N, kept_2N = ctx.saved_tensors
        dloss_N, dlogits_NV = gradients[0].contiguous(), torch.empty_like(logits_NV)
        native.library().cross_entropy_backward(
            logits_NV.data_ptr(), targets_N.data_ptr(), kept_2N.data_ptr(), dloss_N.data_ptr(),
            dlogits_NV.data_ptr(), *logits_NV.shape,
            native.threads_for(logits_NV.numel(), _LEAST_LOGITS),
        )  # fmt: skip
        return dlogits_NV, None
