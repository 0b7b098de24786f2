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

from switchlm.kernels import buffers, workers
from switchlm.kernels.cpu import weight_gradient
from switchlm.kernels.workers import Plan

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


class _Spare:
    """Room for one expert's hidden rows at a time, as often as it is asked for: stays in cache."""

    def __init__(self, like: Tensor, weights: _Weights, plan: Plan, experts: list[int]) -> None:
        most = max((plan.sizes[e] for e in experts), default=0)
        self._like = like
        self._shape = (most, weights.inner_EDF.shape[2])
        self._rooms: dict[int, Tensor] = {}

    def __call__(self, room: int, rows: int) -> Tensor:
        if room not in self._rooms:
            self._rooms[room] = self._like.new_empty(self._shape)
        return self._rooms[room].narrow(0, 0, rows)


def _activate(inner: Tensor, activation: Activation, spare: _Spare, rows: int) -> Tensor:
    """Return the activated rows: in place for ReLU, in room 1 otherwise."""
    if activation == "relu":
        return inner.clamp_min_(0)
    return torch.ops.aten.gelu.out(inner, approximate="tanh", out=spare(1, rows))


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
    y_RD = plan.empty(x_RD, weights.down_EFD.shape[2])
    x_E, y_E = plan.pieces(x_RD), plan.pieces(y_RD)
    inner_weight_E, down_E = weights.inner_EDF.unbind(), weights.down_EFD.unbind()
    linear_weight_E = () if weights.linear_EDF is None else weights.linear_EDF.unbind()
    inner_E = () if hidden is None else plan.pieces(hidden.inner_RF)
    linear_E = () if hidden is None or hidden.linear_RF is None else plan.pieces(hidden.linear_RF)

    def run(experts: list[int]) -> None:
        spare = _Spare(x_RD, weights, plan, experts)
        for e in experts:
            x, rows = x_E[e], plan.sizes[e]
            inner = torch.mm(x, inner_weight_E[e], out=inner_E[e] if inner_E else spare(0, rows))
            middle = _activate(inner, activation, spare, rows)
            if linear_weight_E:
                linear = linear_E[e] if linear_E else spare(2, rows)
                torch.mm(x, linear_weight_E[e], out=linear)
                middle = torch.mul(middle, linear, out=spare(1, rows))
            torch.mm(middle, down_E[e], out=y_E[e])

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
    dx_RD = plan.empty(x_RD, x_RD.shape[1]) if needs[0] else None
    dinner_EDF, dlinear_EDF, ddown_EFD = (
        weight_gradient(weight, plan) if weight is not None and needed else None
        for weight, needed in zip(
            (weights.inner_EDF, weights.linear_EDF, weights.down_EFD), needs[1:], strict=True
        )
    )
    x_E, dy_E, inner_E = plan.pieces(x_RD.t(), 1), plan.pieces(dy_RD), plan.pieces(hidden.inner_RF)
    linear_E = () if hidden.linear_RF is None else plan.pieces(hidden.linear_RF)
    dx_E = () if dx_RD is None else plan.pieces(dx_RD)
    dinner_E, dlinear_E, ddown_E = (
        () if gradient is None else gradient.unbind()
        for gradient in (dinner_EDF, dlinear_EDF, ddown_EFD)
    )
    inner_weight_E, down_E = weights.inner_EDF.mT.unbind(), weights.down_EFD.mT.unbind()
    linear_weight_E = () if weights.linear_EDF is None else weights.linear_EDF.mT.unbind()

    def run(experts: list[int]) -> None:
        spare = _Spare(x_RD, weights, plan, experts)
        for e in experts:
            x, dy, inner, rows = x_E[e], dy_E[e], inner_E[e], plan.sizes[e]
            gradient = torch.mm(dy, down_E[e], out=spare(0, rows))
            middle = inner if activation == "relu" else _activate(inner, activation, spare, rows)
            if linear_E:
                dlinear = torch.mul(gradient, middle, out=spare(2, rows))
                gradient.mul_(linear_E[e])
                middle = torch.mul(middle, linear_E[e], out=spare(1, rows))
            if ddown_E:
                torch.mm(middle.t(), dy, out=ddown_E[e])
            _activate_backward(gradient, inner, activation)
            if dinner_E:
                torch.mm(x, gradient, out=dinner_E[e])
            if dlinear_E:
                torch.mm(x, dlinear, out=dlinear_E[e])
            if dx_E:
                torch.mm(gradient, inner_weight_E[e], out=dx_E[e])
                if linear_weight_E:
                    dx_E[e].addmm_(dlinear, linear_weight_E[e])

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
        linear_RF = None if linear_EDF is None else buffers.empty(shape, x_RD.dtype)
        hidden = _Hidden(buffers.empty(shape, x_RD.dtype), linear_RF)
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
