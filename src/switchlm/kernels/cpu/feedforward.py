"""A whole expert at once: up, activation and down, while its hidden rows are still in the cache.

Three separate calls write and read all hidden rows of all experts again and again, and pass over
them once more for the activation and its gradient. Here each expert runs to its end before the next
begins; its output and its weight gradients are written once.

Where experts have some thousand weights or some ten rows, preparing four tensors for each takes
longer than multiplying them: then all experts of a layer are one call of native/products.c, on one
thread. Going from expert to expert is its plain twin, with the same bits where that multiplies in
C.

Shapes: R rows, D d_model, F d_ff, E experts, P pieces (see grouped.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchlm import _torch
from switchlm.kernels.cpu import grouped, memory, threads
from switchlm.kernels.cpu.grouped import Schedule, Sums, make_schedule, matmul_into, weight_gradient
from switchlm.kernels.cpu.memory import Workspace, compiles_shapes, keep
from switchlm.kernels.cpu.native import native
from switchlm.kernels.reference import Activation, activate, activate_backward_


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


def _forward(
    x_RD: Tensor,
    weights: _Weights,
    schedule: Schedule,
    activation: Activation,
    hidden: _Hidden | None,
) -> Tensor:
    """Return y_RD. Fills `hidden`, or forgets each expert's hidden rows when there is none."""
    if _are_small(x_RD, weights, schedule, activation):
        kept_RF = None if hidden is None else hidden.inner_RF
        return forward(x_RD, weights.inner_EDF, weights.down_EFD, schedule, kept_RF)
    y_RD = schedule.empty(x_RD, weights.down_EFD.shape[2])
    y = Sums(schedule, y_RD)
    x_P = schedule.rows(x_RD)
    inner_weight_P, down_P = (
        _cut(schedule, weights.inner_EDF, 1),
        _cut(schedule, weights.down_EFD, 0),
    )
    linear_weight_P = _cut(schedule, weights.linear_EDF, 1)
    inner_P = _cut_rows(schedule, None if hidden is None else hidden.inner_RF)
    linear_P = _cut_rows(schedule, None if hidden is None else hidden.linear_RF)

    def compute(p: int, workspace: Workspace) -> None:
        x = workspace.filled("x", x_P[p])
        rows, width = x.shape[0], down_P[p].shape[0]

        def multiply(name: str, weight_P: list[Tensor], stored_P: list[Tensor]) -> Tensor:
            if not stored_P:
                return matmul_into(x, weight_P[p], workspace(name, rows, width))
            return matmul_into(x, weight_P[p], workspace.output_for(name, stored_P[p], rows))

        inner = multiply("inner", inner_weight_P, inner_P)
        apart = None if activation == "relu" else workspace("middle", rows, width)
        middle = activate(inner, activation, apart)
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
    weights: _Weights,
    hidden: _Hidden,
    schedule: Schedule,
    activation: Activation,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, inner, linear and down, those that `needs` asks for."""
    dx_RD = schedule.empty(x_RD, x_RD.shape[1]) if needs[0] else None
    dinner_EDF, dlinear_EDF, ddown_EFD = (
        weight_gradient(weight, schedule) if weight is not None and needed else None
        for weight, needed in zip(
            (weights.inner_EDF, weights.linear_EDF, weights.down_EFD), needs[1:], strict=True
        )
    )
    if _are_small(x_RD, weights, schedule, activation):
        into = (dx_RD, dinner_EDF, ddown_EFD)
        up_EDF, down_EFD = weights.inner_EDF, weights.down_EFD
        backward(dy_RD, x_RD, up_EDF, down_EFD, hidden.inner_RF, schedule, into)
        return dx_RD, dinner_EDF, None, ddown_EFD
    dx = None if dx_RD is None else Sums(schedule, dx_RD)
    x_P, dy_P = schedule.rows(x_RD), schedule.rows(dy_RD)
    inner_P, linear_P = _cut_rows(schedule, hidden.inner_RF), _cut_rows(schedule, hidden.linear_RF)
    dinner_P, dlinear_P = _cut(schedule, dinner_EDF, 1), _cut(schedule, dlinear_EDF, 1)
    ddown_P = _cut(schedule, ddown_EFD, 0)
    inner_weight_P, linear_weight_P, down_P = (
        _cut(schedule, None if weight is None else weight.mT, dim)
        for weight, dim in ((weights.inner_EDF, 0), (weights.linear_EDF, 0), (weights.down_EFD, 1))
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


def _are_small(x_RD: Tensor, weights: _Weights, schedule: Schedule, activation: Activation) -> bool:
    return (
        activation == "relu"
        and weights.linear_EDF is None
        and fits(schedule, x_RD, weights.inner_EDF, weights.down_EFD)
    )


def _cut(schedule: Schedule, stacked: Tensor | None, dim: int) -> list[Tensor]:
    """Return every piece's part of its expert's matrix, by the dim of the hidden columns."""
    return [] if stacked is None else schedule.columns(stacked, dim)


def _cut_rows(schedule: Schedule, hidden_RF: Tensor | None) -> list[Tensor]:
    """Return every piece's rows and columns of the hidden rows."""
    return [] if hidden_RF is None else schedule.rows(hidden_RF, cut=True)


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
        linear_RF = None if linear_EDF is None else memory.empty_reused(shape, x_RD.dtype)
        hidden = _Hidden(memory.empty_reused(shape, x_RD.dtype), linear_RF)
        weights = _Weights(inner_EDF, linear_EDF, down_EFD)
        y_RD = _forward(x_RD, weights, schedule, activation, hidden)
        ctx.save_for_backward(
            x_RD, inner_EDF, linear_EDF, down_EFD, hidden.inner_RF, hidden.linear_RF
        )
        ctx.schedule, ctx.activation = schedule, activation
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, inner_EDF, linear_EDF, down_EFD, inner_RF, linear_RF = ctx.saved_tensors
        weights = _Weights(inner_EDF, linear_EDF, down_EFD)
        hidden = _Hidden(inner_RF, linear_RF)
        dy_RD = gradients[0].contiguous()
        needs = ctx.needs_input_grad[:4]
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
    weights = _Weights(up_EDF, None, down_EFD)
    if gate_EDF is not None:
        weights = _Weights(gate_EDF, up_EDF, down_EFD)
    schedule = make_schedule(
        counts_E.tolist(),
        x_RD.shape[0],
        weights.inner_EDF.shape[1] * weights.inner_EDF.shape[2],
        few_shapes=compiles_shapes(x_RD.dtype),
    )
    inputs = (x_RD, weights.inner_EDF, weights.linear_EDF, weights.down_EFD)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        y_RD: Tensor = _ExpertFeedForward.apply(*inputs, schedule, activation)
        return y_RD
    return _forward(x_RD, weights, schedule, activation, None)


SMALL = 2**13  # numbers of a matrix up to which this pays whatever the rows
_WIDTH = 16  # whole vectors on every processor


def fits(schedule: Schedule, x_RD: Tensor, up_EDF: Tensor, down_EFD: Tensor) -> bool:
    """Whether experts of ReLU go this way: float32, in main memory, small ones, one thread."""
    _, inputs, outputs = up_EDF.shape
    return (
        len(schedule.parts) == 1
        and (inputs * outputs <= SMALL or max(schedule.sizes[:-1]) <= grouped.MOST_ROWS)
        and all(width % _WIDTH == 0 for width in up_EDF.shape[1:])
        and all(
            tensor.dtype == torch.float32 and tensor.is_cpu and tensor.is_contiguous()
            for tensor in (x_RD, up_EDF, down_EFD)
        )
        and not _torch.is_watched()
        and native().library is not None
    )


def forward(
    x_RD: Tensor, up_EDF: Tensor, down_EFD: Tensor, schedule: Schedule, hidden_RF: Tensor | None
) -> Tensor:
    """Return y_RD. Fills `hidden_RF` with what the activation gave, if there is one."""
    library = native().library
    assert library is not None
    y_RD = schedule.empty(x_RD, down_EFD.shape[2])
    counts_E = torch.tensor(schedule.sizes[:-1], device="cpu")
    kept = hidden_RF is not None
    out = hidden_RF if hidden_RF is not None else _hidden_rows(x_RD, schedule, up_EDF)
    library.relu_experts(
        x_RD.data_ptr(), counts_E.data_ptr(), *up_EDF.shape, up_EDF.data_ptr(),
        down_EFD.data_ptr(), out.data_ptr(), kept, y_RD.data_ptr(),
    )  # fmt: skip
    return y_RD


def backward(
    dy_RD: Tensor,
    x_RD: Tensor,
    up_EDF: Tensor,
    down_EFD: Tensor,
    hidden_RF: Tensor,
    schedule: Schedule,
    into: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """Write the gradients of x, up and down into those of `into` that are there."""
    library = native().library
    assert library is not None
    counts_E = torch.tensor(schedule.sizes[:-1], device="cpu")
    out = _hidden_rows(x_RD, schedule, up_EDF)
    places = (None if gradient is None else gradient.data_ptr() for gradient in into)
    library.relu_experts_backward(
        dy_RD.data_ptr(), x_RD.data_ptr(), hidden_RF.data_ptr(), counts_E.data_ptr(),
        *up_EDF.shape, up_EDF.data_ptr(), down_EFD.data_ptr(), out.data_ptr(), *places,
    )  # fmt: skip


def _hidden_rows(x_RD: Tensor, schedule: Schedule, up_EDF: Tensor) -> Tensor:
    """Return memory for the hidden rows of one expert."""
    return x_RD.new_empty(max(schedule.sizes[:-1]), up_EDF.shape[2])
