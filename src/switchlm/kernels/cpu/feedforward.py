"""The expert feed-forward on a CPU: up, activation and down while hidden rows are in the cache.

Three separate calls write and read the hidden rows of all experts several times. Here each expert
is finished before the next begins; its output and its weight gradients are written once.

Shapes: R rows, D d_model, F d_ff, E experts, P pieces (see grouped.py).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchlm.kernels.cpu import memory, threads
from switchlm.kernels.cpu.grouped import Schedule, Sums, matmul_into, schedule_for, weight_gradient
from switchlm.kernels.cpu.memory import Workspace, keep
from switchlm.kernels.reference import Activation, activate, activate_backward_

# Stacked: the weight before the activation (`up`, or `gate` where gated), `up` where gated, `down`.
Weights = tuple[Tensor, Tensor | None, Tensor]
# Hidden rows kept for the backward pass, of both factors where gated: before the activation, or
# after a ReLU, whose gradient can be computed from its output.
Hidden = tuple[Tensor, Tensor | None]


def _forward(
    x_RD: Tensor,
    weights: Weights,
    schedule: Schedule,
    activation: Activation,
    hidden: Hidden | None,
) -> Tensor:
    """Return y_RD. Fills `hidden`; None keeps no hidden rows."""
    inner_EDF, linear_EDF, down_EFD = weights
    inner_RF, linear_RF = hidden or (None, None)
    y_RD = schedule.empty(x_RD, down_EFD.shape[2])
    y = Sums(schedule, y_RD)
    x_P = schedule.rows(x_RD)
    inner_weight_P, linear_weight_P = (schedule.columns(w, 1) for w in (inner_EDF, linear_EDF))
    down_P = schedule.columns(down_EFD, 0)
    inner_P, linear_P = schedule.rows(inner_RF, cut=True), schedule.rows(linear_RF, cut=True)

    def compute(p: int, workspace: Workspace) -> None:
        x = workspace.filled("x", x_P[p])
        rows, width = x.shape[0], down_P[p].shape[0]

        def multiply(name: str, weight_P: list[Tensor], stored_P: list[Tensor]) -> Tensor:
            if not stored_P:
                return matmul_into(x, weight_P[p], workspace(name, rows, width))
            return matmul_into(x, weight_P[p], workspace.output_for(name, stored_P[p], rows))

        inner = multiply("inner", inner_weight_P, inner_P)
        separate = None if activation == "relu" else workspace("middle", rows, width)
        middle = activate(inner, activation, separate)
        if inner_P:
            keep(inner, inner_P[p])
        if linear_weight_P:
            linear = multiply("linear", linear_weight_P, linear_P)
            middle = torch.mul(middle, linear, out=workspace("middle", rows, width))
            if linear_P:
                keep(linear, linear_P[p])
        keep(
            matmul_into(middle, down_P[p], workspace.output_for("y", y.out_P[p], rows)), y.out_P[p]
        )

    def run(part: Sequence[int]) -> None:
        workspace = Workspace(x_RD)
        for p in part:
            compute(p, workspace)

    threads.parallel_for(run, schedule.parts)
    y.add_up()
    return y_RD


def _backward(
    dy_RD: Tensor,
    x_RD: Tensor,
    weights: Weights,
    hidden: Hidden,
    schedule: Schedule,
    activation: Activation,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, inner, linear and down; None where not in `needs`."""
    (inner_EDF, linear_EDF, down_EFD), (inner_RF, linear_RF) = weights, hidden
    dx_RD = schedule.empty(x_RD, x_RD.shape[1]) if needs[0] else None
    dinner_EDF, dlinear_EDF, ddown_EFD = (
        weight_gradient(weight, schedule) if weight is not None and needed else None
        for weight, needed in zip(weights, needs[1:], strict=True)
    )
    dx = None if dx_RD is None else Sums(schedule, dx_RD)
    x_P, dy_P = schedule.rows(x_RD), schedule.rows(dy_RD)
    inner_P, linear_P = schedule.rows(inner_RF, cut=True), schedule.rows(linear_RF, cut=True)
    dinner_P, dlinear_P = schedule.columns(dinner_EDF, 1), schedule.columns(dlinear_EDF, 1)
    ddown_P = schedule.columns(ddown_EFD, 0)
    inner_weight_P, linear_weight_P, down_P = (
        schedule.columns(None if weight is None else weight.mT, dim)
        for weight, dim in ((inner_EDF, 0), (linear_EDF, 0), (down_EFD, 1))
    )

    def run(part: Sequence[int]) -> None:
        workspace = Workspace(x_RD)
        for p in part:
            x, dy = workspace.filled("x", x_P[p]).t(), workspace.filled("dy", dy_P[p])
            inner = workspace.filled("inner", inner_P[p])
            begins = schedule.pieces[p].begins
            gradient = matmul_into(dy, down_P[p], workspace("gradient", *inner.shape))
            middle = inner
            if activation != "relu":
                middle = activate(inner, activation, workspace("middle", *inner.shape))
            if linear_P:
                linear = workspace.filled("linear", linear_P[p])
                dlinear = torch.mul(gradient, middle, out=workspace("dlinear", *inner.shape))
                gradient.mul_(linear)
                middle = torch.mul(middle, linear, out=workspace("middle", *inner.shape))
            if ddown_P:
                matmul_into(middle.t(), dy, ddown_P[p], add=not begins, large=True)
            activate_backward_(gradient, inner, activation)
            if dinner_P:
                matmul_into(x, gradient, dinner_P[p], add=not begins, large=True)
            if dlinear_P:
                matmul_into(x, dlinear, dlinear_P[p], add=not begins, large=True)
            if dx is not None:
                out = workspace.output_for("dx", dx.out_P[p], len(gradient))
                matmul_into(gradient, inner_weight_P[p], out)
                if linear_weight_P:
                    matmul_into(dlinear, linear_weight_P[p], out, add=True)
                keep(out, dx.out_P[p])

    threads.parallel_for(run, schedule.parts)
    if dx is not None:
        dx.add_up()
    return dx_RD, dinner_EDF, dlinear_EDF, ddown_EFD


class _ExpertFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        inner_EDF: Tensor,
        linear_EDF: Tensor | None,
        down_EFD: Tensor,
        schedule: Schedule,
        activation: Activation,
    ) -> Tensor:
        shape = (x_RD.shape[0], inner_EDF.shape[2])
        inner_RF = memory.empty_reused(shape, x_RD.dtype)
        linear_RF = None if linear_EDF is None else memory.empty_reused(shape, x_RD.dtype)
        weights, hidden = (inner_EDF, linear_EDF, down_EFD), (inner_RF, linear_RF)
        y_RD = _forward(x_RD, weights, schedule, activation, hidden)
        ctx.save_for_backward(x_RD, *weights, *hidden)
        ctx.schedule, ctx.activation = schedule, activation
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, inner_EDF, linear_EDF, down_EFD, inner_RF, linear_RF = ctx.saved_tensors
        weights, hidden = (inner_EDF, linear_EDF, down_EFD), (inner_RF, linear_RF)
        dy_RD, needs = gradients[0].contiguous(), ctx.needs_input_grad[:4]
        wanted = _backward(dy_RD, x_RD, weights, hidden, ctx.schedule, ctx.activation, needs)
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
    weights: Weights = (up_EDF, None, down_EFD)
    if gate_EDF is not None:
        weights = (gate_EDF, up_EDF, down_EFD)
    schedule = schedule_for(x_RD, up_EDF, counts_E)
    inputs = (x_RD, *weights)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        y_RD: Tensor = _ExpertFeedForward.apply(*inputs, schedule, activation)
        return y_RD
    return _forward(x_RD, weights, schedule, activation, None)
