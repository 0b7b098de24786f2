"""What the router sees in training: its input, disturbed so that experts get tried (appendix C)."""

import torch
from torch import Tensor, nn


def explore(x_ND: Tensor, kind: str, rate: float) -> Tensor:
    """Return what the router sees in training.

    `jitter` multiplies every element with U(1 - rate, 1 + rate), in float32; `input_dropout` drops
    elements with that rate; other kinds act elsewhere and leave the input alone.
    """
    if rate == 0 or kind not in ("jitter", "input_dropout"):
        return x_ND
    if kind == "input_dropout":
        return nn.functional.dropout(x_ND, rate)
    noise_ND = torch.empty_like(x_ND, dtype=torch.float32).uniform_(1 - rate, 1 + rate)
    return x_ND.float() * noise_ND
