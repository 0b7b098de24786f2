"""T5's layer norm: root mean square, no mean, no bias."""

import torch
from torch import Tensor, nn

from switchlm.kernels.norm import rms_norm


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang & Sennrich 2019), the mean square always in float32.

    Takes and returns [..., D] in the input's dtype.
    """

    def __init__(self, d_model: int, epsilon: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x.float(), self.weight.float(), self.epsilon).to(x.dtype)
