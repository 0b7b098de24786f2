"""Cross-entropy per token: native/cross_entropy.c on a CPU, forward and backward.

PyTorch writes the logarithm of the softmax and reads it again twice, and fills a gradient with
zeros first. The plain twin is `nn.functional.cross_entropy`.

Shapes: N tokens, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from switchlm.kernels.cpu.native import native, readable

_WIDTH = 16  # whole vectors on every processor
_LEAST_LOGITS = 2**18  # below which waking a thread does not pay


def token_losses(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Return loss_N, float32: the negative log likelihood of each target, in nats.

    logits_NV: float32.
    targets_N: int64; where it is -100, the loss is zero.
    """
    if fits(logits_NV, targets_N):
        loss_N: Tensor = _CrossEntropy.apply(logits_NV, targets_N)
        return loss_N
    return nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")


def fits(logits_NV: Tensor, targets_N: Tensor) -> bool:
    """Whether the native kernel takes these: plain, in main memory, rows of whole vectors."""
    return (
        readable(logits_NV)
        and readable(targets_N, dtype=torch.int64)
        and targets_N.shape == logits_NV.shape[:1]
        and logits_NV.numel() > 0
        and logits_NV.shape[1] % _WIDTH == 0
        and logits_NV.is_contiguous()
    )


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        library = native().library
        assert library is not None
        targets_N = targets_N.contiguous()
        rows, width = logits_NV.shape
        loss_N, kept_2N = logits_NV.new_empty(rows), logits_NV.new_empty(2, rows)
        wrong = library.cross_entropy(
            logits_NV.data_ptr(), targets_N.data_ptr(), loss_N.data_ptr(), kept_2N.data_ptr(),
            rows, width, _threads(logits_NV),
        )  # fmt: skip
        if wrong < rows:
            raise IndexError(f"Target {int(targets_N[wrong])} is out of bounds of {width} logits.")
        ctx.save_for_backward(logits_NV, targets_N, kept_2N)
        return loss_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits_NV, targets_N, kept_2N = ctx.saved_tensors
        library = native().library
        assert library is not None
        dloss_N, dlogits_NV = gradients[0].contiguous(), torch.empty_like(logits_NV)
        library.cross_entropy_backward(
            logits_NV.data_ptr(), targets_N.data_ptr(), kept_2N.data_ptr(), dloss_N.data_ptr(),
            dlogits_NV.data_ptr(), *logits_NV.shape, _threads(logits_NV),
        )  # fmt: skip
        return dlogits_NV, None


def _threads(logits_NV: Tensor) -> int:
    """Return how many threads share the rows; it changes no bit of the result."""
    enough = logits_NV.numel() >= _LEAST_LOGITS
    return torch.get_num_threads() if native().threads and enough else 1
