"""The fused Switch feed-forward in Triton: two kernels forward, at most five backward.

The first matmul gathers tokens and activates, the second applies gates and scatters: permuted
tokens and the outputs of every row, which separate kernels write and read again, are never stored.
Kept for the backward pass: R x F numbers for a ReLU (its output) or a GELU (its input), twice that
where gated. Backward itself needs R x F more for a ReLU, twice that for a GELU, three times where
gated.

Shapes: N tokens, K assignments per token, A = N * K assignments, R = A rows, D d_model, F d_ff,
E experts.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchlm.kernels.gpu.backward import hidden_gradients, weight_gradient
from switchlm.kernels.gpu.forward import Hidden, hidden_rows, scatter_matmul
from switchlm.kernels.gpu.tiles import Tiles, lay_out
from switchlm.kernels.permute import ExpertOrder
from switchlm.kernels.reference import Activation


def switch_feedforward(
    x_ND: Tensor,
    weight_A: Tensor,
    order: ExpertOrder,
    up_EDF: Tensor,
    down_EFD: Tensor,
    activation: Activation = "relu",
    gate_EDF: Tensor | None = None,
) -> Tensor:
    """Return y_ND: each token's experts applied to it, times their weights: see select.py.

    All of one dtype, bfloat16 or float32; at least one token.
    """
    inner_EDF, linear_EDF = (up_EDF, None) if gate_EDF is None else (gate_EDF, up_EDF)
    inputs = (x_ND, weight_A.float(), inner_EDF, linear_EDF, down_EFD)
    y_ND: Tensor
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        y_ND = _SwitchFeedForward.apply(*inputs, order, activation)
    else:
        y_ND, _, _ = _forward(*inputs, order, activation, keep=False)
    return y_ND


def _forward(
    x_ND: Tensor,
    weight_A: Tensor,
    inner_EDF: Tensor,
    linear_EDF: Tensor | None,
    down_EFD: Tensor,
    order: ExpertOrder,
    activation: Activation,
    keep: bool,
) -> tuple[Tensor, Hidden, Tiles]:
    inner_EDF = inner_EDF.contiguous()
    linear_EDF = None if linear_EDF is None else linear_EDF.contiguous()
    tiles = lay_out(order.counts_E, order.assignment_R.shape[0])
    hidden = hidden_rows(
        x_ND.contiguous(), inner_EDF, linear_EDF, order.assignment_R, tiles, activation, keep
    )
    y_AD = scatter_matmul(hidden.middle_RF, down_EFD, order.assignment_R, tiles, weight_A)
    return _by_token(y_AD, x_ND.shape[0]), hidden, tiles


def _by_token(y_AD: Tensor, num_tokens: int) -> Tensor:
    """Return y_ND: the sum of a token's assignments."""
    return y_AD if y_AD.shape[0] == num_tokens else y_AD.unflatten(0, (num_tokens, -1)).sum(1)


class _SwitchFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_A: Tensor,
        inner_EDF: Tensor,
        linear_EDF: Tensor | None,
        down_EFD: Tensor,
        order: ExpertOrder,
        activation: Activation,
    ) -> Tensor:
        inputs = (x_ND, weight_A, inner_EDF, linear_EDF, down_EFD)
        y_ND, hidden, tiles = _forward(*inputs, order, activation, keep=True)
        ctx.save_for_backward(
            *inputs, order.assignment_R, hidden.middle_RF if hidden.inner_RF is None else None,
            hidden.inner_RF, hidden.linear_RF,
        )  # fmt: skip
        ctx.tiles, ctx.activation = tiles, activation
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_A, inner_EDF, linear_EDF, down_EFD, assignment_R, *rows = ctx.saved_tensors
        tiles, needs = ctx.tiles, ctx.needs_input_grad
        dy_ND = gradients[0].contiguous()
        x_ND, inner_EDF, down_EFD = (t.contiguous() for t in (x_ND, inner_EDF, down_EFD))
        hidden, dweight_A = hidden_gradients(
            dy_ND, weight_A, down_EFD, Hidden(*rows), assignment_R, tiles, ctx.activation
        )
        dinner_RF, dlinear_RF = hidden.inner_RF, hidden.linear_RF
        assert dinner_RF is not None
        dx_ND = dinner_EDF = dlinear_EDF = ddown_EFD = None
        if needs[4]:
            ddown_EFD = weight_gradient(
                hidden.middle_RF, dy_ND, assignment_R, tiles, down_EFD.dtype, weight_A
            )
        if needs[2]:
            dinner_EDF = weight_gradient(x_ND, dinner_RF, assignment_R, tiles, inner_EDF.dtype)
        if needs[3] and dlinear_RF is not None:
            dlinear_EDF = weight_gradient(x_ND, dlinear_RF, assignment_R, tiles, inner_EDF.dtype)
        if needs[0]:
            more = None
            if dlinear_RF is not None:
                more = (dlinear_RF, linear_EDF.contiguous().mT)
            dx_AD = scatter_matmul(dinner_RF, inner_EDF.mT, assignment_R, tiles, more=more)
            dx_ND = _by_token(dx_AD, x_ND.shape[0])
        return dx_ND, dweight_A, dinner_EDF, dlinear_EDF, ddown_EFD, None, None
