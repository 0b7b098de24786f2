"""The reference grouped matmul and feed-forward network, and the activations of experts.

One matmul per expert, in a loop: every fast kernel is tested against it, gradients too.

Shapes: R rows, D in, F out, E experts.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

Activation = Literal["relu", "gelu"]
Map = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[Activation, Map] = {
    "relu": nn.functional.relu,
    "gelu": partial(nn.functional.gelu, approximate="tanh"),
}


def grouped_matmul(x_RD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """Multiply consecutive runs of rows with their expert's matrix.

    The first counts_E[0] rows belong to expert 0, the next counts_E[1] to expert 1, and so on. Rows
    past the sum of the counts (dropped tokens) give zeros.

    x_RD, weight_EDF: one floating dtype.
    counts_E: int64.

    Returns y_RF.
    """
    pieces = []
    start = 0
    for weight_DF, count in zip(weight_EDF.unbind(0), counts_E.tolist(), strict=True):
        pieces.append(x_RD[start : start + count] @ weight_DF)
        start += count
    pieces.append(x_RD.new_zeros(x_RD.shape[0] - start, weight_EDF.shape[2]))
    return torch.cat(pieces)


def feed_forward(
    x: Tensor, up: Map, gate: Map | None, down: Map, activation: Activation, dropout: float
) -> Tensor:
    """Return down(act(up(x))), or down(act(gate(x)) * up(x)) when gated (Shazeer 2020).

    up, gate, down: the linear maps.
    dropout: on the intermediate activation.
    """
    activate = ACTIVATIONS[activation]
    hidden = up(x)
    hidden = activate(hidden) if gate is None else activate(gate(x)) * hidden
    return down(nn.functional.dropout(hidden, dropout, dropout > 0))


def activate(inner: Tensor, activation: Activation, workspace: Tensor | None = None) -> Tensor:
    """Return the activated rows: ReLU in place, GELU (tanh, T5 v1.1) in `workspace`, or new.

    ReLU may overwrite its input: its gradient can be computed from its output.
    """
    if activation == "relu":
        return inner.clamp_min_(0)
    if workspace is None:
        workspace = torch.empty_like(inner)
    return torch.ops.aten.gelu.out(inner, approximate="tanh", out=workspace)


def activate_backward_(gradient: Tensor, inner: Tensor, activation: Activation) -> None:
    """Turn the gradient of the activated rows into that of the inner ones, in place."""
    if activation == "relu":
        torch.ops.aten.threshold_backward.grad_input(gradient, inner, 0, grad_input=gradient)
    else:
        torch.ops.aten.gelu_backward.grad_input(
            gradient, inner, approximate="tanh", grad_input=gradient
        )
