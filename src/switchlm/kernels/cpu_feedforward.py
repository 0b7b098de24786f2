"""A whole expert in one go: up, activation and down, while its hidden rows are still in the cache.

Three separate calls write and read all hidden rows of all experts again and again, and pass over
them once more for the activation and its gradient. Here each expert runs to its end before the next
begins; its output and its weight gradients are written once.

Shapes: R rows, D d_model, F d_ff, E experts.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchlm.kernels import workers
from switchlm.kernels.cpu import weight_gradient
from switchlm.kernels.workers import Plan, Run

Activation = Literal["relu", "gelu"]


@dataclass(frozen=True)
class _Weights:
    """inner meets the activation: `up`, or `gate` where gated, which then has `linear` = `up`."""

    inner_EDF: Tensor
    linear_EDF: Tensor | None
    down_EFD: Tensor


@dataclass(frozen=True)
class _Hidden:
    """What backward needs of the hidden rows: all of them, or one expert's at a time without it.

    inner_RF is stored activated where the activation allows it (ReLU: its gradient and itself read
    the same from its output).
    """

    inner_RF: Tensor
    linear_RF: Tensor | None


def _activate(inner: Tensor, activation: Activation, out: Tensor) -> Tensor:
    """Return the activated rows: in place for ReLU, in `out` otherwise."""
    if activation == "relu":
        return inner.clamp_min_(0)
    return torch.ops.aten.gelu.out(inner, approximate="tanh", out=out)


def _activate_backward(gradient: Tensor, inner: Tensor, activation: Activation) -> None:
    """Turn the gradient of the activated rows into that of the inner ones, in place."""
    if activation == "relu":
        torch.ops.aten.threshold_backward.grad_input(gradient, inner, 0, grad_input=gradient)
    else:
        torch.ops.aten.gelu_backward.grad_input(
            gradient, inner, approximate="tanh", grad_input=gradient
        )


def _forward(
    x_RD: Tensor, weights: _Weights, plan: Plan, activation: Activation, hidden: _Hidden | None
) -> Tensor:
    """Return y_RD. Fills `hidden`, or forgets each expert's hidden rows when there is none."""
    rows, width = x_RD.shape[0], weights.inner_EDF.shape[2]
    y_RD = x_RD.new_empty(rows, weights.down_EFD.shape[2])
    y_RD[plan.total :].zero_()
    gated = weights.linear_EDF is not None

    def run(part: list[Run]) -> None:
        most = max((end - start for _, start, end in part), default=0)
        spare = [x_RD.new_empty(most, width) for _ in range(1 + (1 + gated) * (hidden is None))]
        for expert, start, end in part:
            x = x_RD[start:end]
            scratch = spare[0][: end - start]
            inner = spare[1][: end - start] if hidden is None else hidden.inner_RF[start:end]
            torch.mm(x, weights.inner_EDF[expert], out=inner)
            middle = _activate(inner, activation, out=scratch)
            if weights.linear_EDF is not None:
                if hidden is None or hidden.linear_RF is None:
                    linear = spare[2][: end - start]
                else:
                    linear = hidden.linear_RF[start:end]
                torch.mm(x, weights.linear_EDF[expert], out=linear)
                middle = torch.mul(middle, linear, out=scratch)
            torch.mm(middle, weights.down_EFD[expert], out=y_RD[start:end])

    workers.share(run, plan.parts)
    return y_RD


def _backward(
    dy_RD: Tensor,
    x_RD: Tensor,
    weights: _Weights,
    hidden: _Hidden,
    plan: Plan,
    activation: Activation,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, inner, linear and down, those that `needs` asks for."""
    gated = weights.linear_EDF is not None
    dx_RD = x_RD.new_empty(x_RD.shape) if needs[0] else None
    if dx_RD is not None:
        dx_RD[plan.total :].zero_()
    dinner_EDF, dlinear_EDF, ddown_EFD = (
        weight_gradient(weight, plan) if weight is not None and needed else None
        for weight, needed in zip(
            (weights.inner_EDF, weights.linear_EDF, weights.down_EFD), needs[1:], strict=True
        )
    )

    def run(part: list[Run]) -> None:
        most = max((end - start for _, start, end in part), default=0)
        spare = [x_RD.new_empty(most, weights.inner_EDF.shape[2]) for _ in range(2 + gated)]
        for expert, start, end in part:
            x, dy = x_RD[start:end], dy_RD[start:end]
            gradient, scratch = spare[0][: end - start], spare[1][: end - start]
            inner = hidden.inner_RF[start:end]
            torch.mm(dy, weights.down_EFD[expert].t(), out=gradient)
            middle = inner if activation == "relu" else _activate(inner, activation, scratch)
            if hidden.linear_RF is not None:
                linear = hidden.linear_RF[start:end]
                dlinear = spare[2][: end - start]
                torch.mul(gradient, middle, out=dlinear)
                gradient.mul_(linear)
                middle = torch.mul(middle, linear, out=scratch)
            if ddown_EFD is not None:
                torch.mm(middle.t(), dy, out=ddown_EFD[expert])
            _activate_backward(gradient, inner, activation)
            if dinner_EDF is not None:
                torch.mm(x.t(), gradient, out=dinner_EDF[expert])
            if dlinear_EDF is not None:
                torch.mm(x.t(), dlinear, out=dlinear_EDF[expert])
            if dx_RD is None:
                continue
            dx = dx_RD[start:end]
            torch.mm(gradient, weights.inner_EDF[expert].t(), out=dx)
            if weights.linear_EDF is not None:
                dx.addmm_(dlinear, weights.linear_EDF[expert].t())

    workers.share(run, plan.parts)
    return dx_RD, dinner_EDF, dlinear_EDF, ddown_EFD


class _ExpertFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        inner_EDF: Tensor,
        linear_EDF: Tensor | None,
        down_EFD: Tensor,
        plan: Plan,
        activation: Activation,
    ) -> Tensor:
        shape = (x_RD.shape[0], inner_EDF.shape[2])
        linear_RF = None if linear_EDF is None else x_RD.new_empty(shape)
        hidden = _Hidden(x_RD.new_empty(shape), linear_RF)
        weights = _Weights(inner_EDF, linear_EDF, down_EFD)
        y_RD = _forward(x_RD, weights, plan, activation, hidden)
        ctx.save_for_backward(
            x_RD, inner_EDF, linear_EDF, down_EFD, hidden.inner_RF, hidden.linear_RF
        )
        ctx.plan, ctx.activation = plan, activation
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, inner_EDF, linear_EDF, down_EFD, inner_RF, linear_RF = ctx.saved_tensors
        weights = _Weights(inner_EDF, linear_EDF, down_EFD)
        hidden = _Hidden(inner_RF, linear_RF)
        dy_RD = gradients[0].contiguous()
        needs = ctx.needs_input_grad[:4]
        wanted = _backward(dy_RD, x_RD, weights, hidden, ctx.plan, ctx.activation, needs)
        return *wanted, None, None


def expert_feedforward(
    x_RD: Tensor,
    counts_E: Tensor,
    up_EDF: Tensor,
    down_EFD: Tensor,
    activation: Activation = "relu",
    gate_EDF: Tensor | None = None,
) -> Tensor:
    """Return each row's expert applied to it: see select.py."""
    weights = _Weights(up_EDF, None, down_EFD)
    if gate_EDF is not None:
        weights = _Weights(gate_EDF, up_EDF, down_EFD)
    plan = workers.plan(
        counts_E.tolist(), x_RD.shape[0], weights.inner_EDF.shape[1] * weights.inner_EDF.shape[2]
    )
    inputs = (x_RD, weights.inner_EDF, weights.linear_EDF, weights.down_EFD)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        y_RD: Tensor = _ExpertFeedForward.apply(*inputs, plan, activation)
        return y_RD
    return _forward(x_RD, weights, plan, activation, None)
