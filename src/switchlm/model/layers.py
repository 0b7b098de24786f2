"""Layers of T5 that dense and sparse models share: linear, RMSNorm, dense feed-forward."""

from typing import cast

import torch
from torch import Tensor, nn

from switchlm.config import check_choice
from switchlm.kernels.reference import feed_forward
from switchlm.kernels.select import linear, rms_norm
from switchlm.model.config import Activation


class FeedForward(nn.Module):
    """One feed-forward network, see `feed_forward`. No biases."""

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        activation: Activation = "relu",
        gated: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.up = Linear(d_model, d_ff)
        self.gate = Linear(d_model, d_ff) if gated else None
        self.down = Linear(d_ff, d_model)
        check_choice(activation, Activation, "activation")
        self.activation = activation
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        down = self._wide_down if x.dtype == torch.float16 else self.down
        return feed_forward(x, self.up, self.gate, down, self.activation, dropout)

    def _wide_down(self, hidden: Tensor) -> Tensor:
        """Apply `down`, in float32 if its weights are: its outputs are too large for float16."""
        wide = self.down.weight.dtype == torch.float32
        return cast(Tensor, self.down(hidden.float() if wide else hidden))


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang & Sennrich 2019), the mean square always in float32.

    Takes and returns [..., D] in the input's dtype; float16 weights return float16, since the
    residual stream of such models may be float32 (see FeedForward).
    """

    def __init__(self, d_model: int, epsilon: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.float16 if self.weight.dtype == torch.float16 else x.dtype
        return rms_norm(x.float(), self.weight.float(), self.epsilon).to(dtype)


class Linear(nn.Linear):
    """y = x w^T over the last dim, as nn.Linear without bias, by the fastest kernel."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


def local(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor that this process holds; any other tensor as it is.

    For sharded parameters (DTensor), which receive the gradients.
    """
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else cast(Tensor, to_local())
