"""The activations of experts on a CPU, in place or into memory that is there already."""

from typing import Literal

import torch
from torch import Tensor

Activation = Literal["relu", "gelu"]


def activate(inner: Tensor, activation: Activation, room: Tensor | None = None) -> Tensor:
    """Return the activated rows: ReLU in place, GELU (the tanh form of T5 v1.1) in `room`, or new.

    ReLU may forget its input: its gradient reads the same from its output.
    """
    if activation == "relu":
        return inner.clamp_min_(0)
    if room is None:
        room = torch.empty_like(inner)
    return torch.ops.aten.gelu.out(inner, approximate="tanh", out=room)


def activate_backward_(gradient: Tensor, inner: Tensor, activation: Activation) -> None:
    """Turn the gradient of the activated rows into that of the inner ones, in place."""
    if activation == "relu":
        torch.ops.aten.threshold_backward.grad_input(gradient, inner, 0, grad_input=gradient)
    else:
        torch.ops.aten.gelu_backward.grad_input(
            gradient, inner, approximate="tanh", grad_input=gradient
        )
