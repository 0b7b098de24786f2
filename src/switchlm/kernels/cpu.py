"""Grouped products in main memory: one `mm` an expert, straight into tensors that are written once.

Autograd over a loop that indexes the stacked weight builds one full-size gradient an expert, and
`torch.nn.functional.grouped_mm` leaves the rows past the counts undefined. Here the loop is inside
one autograd function: every product writes its slice of the result, an expert without rows costs
the zeroing of its weight gradient, and rows past the counts are zero.

Shapes: R rows, D in, F out, E experts, P pieces (see plan.py).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchlm.kernels import buffers, workers
from switchlm.kernels.plan import Plan, make_plan
from switchlm.kernels.products import mm
from switchlm.kernels.spare import Spare, compiles_shapes, keep


def weight_gradient(weight_EDF: Tensor, plan: Plan) -> Tensor:
    """Return an uninitialised gradient for a stacked weight; experts without rows have zeros."""
    if weight_EDF.device.type == "cpu":
        gradient_EDF = buffers.empty(tuple(weight_EDF.shape), weight_EDF.dtype)
    else:
        gradient_EDF = torch.empty_like(weight_EDF, memory_format=torch.contiguous_format)
    for expert in plan.idle:
        gradient_EDF[expert].zero_()
    return gradient_EDF


def forward(x_RD: Tensor, weight_EDF: Tensor, plan: Plan) -> Tensor:
    """Return y_RF: each row times its expert's matrix; zeros past the counts."""
    y_RF = plan.empty(x_RD, weight_EDF.shape[2])
    x_P, weight_P = plan.rows(x_RD), plan.columns(weight_EDF, 1)
    y_P = plan.rows(y_RF, cut=True)

    def multiply(part: Sequence[int]) -> None:
        spare = Spare(x_RD)
        for p in part:
            x = spare.filled("x", x_P[p])
            keep(mm(x, weight_P[p], spare.room_for("y", y_P[p], len(x))), y_P[p])

    workers.share(multiply, plan.parts)
    return y_RF


def backward_rows(dy_RF: Tensor, weight_EDF: Tensor, plan: Plan) -> Tensor:
    """Return dx_RD, the gradient of the rows; zeros past the counts."""
    return forward(dy_RF, weight_EDF.mT, plan)


def backward_weight(dy_RF: Tensor, x_RD: Tensor, weight_EDF: Tensor, plan: Plan) -> Tensor:
    """Return dweight_EDF; zeros for experts without rows."""
    dweight_EDF = weight_gradient(weight_EDF, plan)
    x_P, dy_P = plan.rows(x_RD), plan.rows(dy_RF, cut=True)
    dweight_P = plan.columns(dweight_EDF, 1)

    def multiply(part: Sequence[int]) -> None:
        spare = Spare(x_RD)
        for p in part:
            x, dy = spare.filled("x", x_P[p]), spare.filled("dy", dy_P[p])
            mm(x.t(), dy, dweight_P[p], add=not plan.pieces[p].begins, large=True)

    workers.share(multiply, plan.parts)
    return dweight_EDF


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, weight_EDF: Tensor, plan: Plan) -> Tensor:
        ctx.save_for_backward(x_RD, weight_EDF)
        ctx.plan = plan
        return forward(x_RD, weight_EDF, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_RD, weight_EDF = ctx.saved_tensors
        dy_RF = gradients[0].contiguous()
        dx_RD = dweight_EDF = None
        if ctx.needs_input_grad[0]:
            dx_RD = backward_rows(dy_RF, weight_EDF, ctx.plan)
        if ctx.needs_input_grad[1]:
            dweight_EDF = backward_weight(dy_RF, x_RD, weight_EDF, ctx.plan)
        return dx_RD, dweight_EDF, None


def grouped_matmul(x_RD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """Multiply consecutive runs of rows with their expert's matrix: see reference.py."""
    work_per_row = weight_EDF.shape[1] * weight_EDF.shape[2]
    plan = make_plan(
        counts_E.tolist(), x_RD.shape[0], work_per_row, few_shapes=compiles_shapes(x_RD.dtype)
    )
    y_RF: Tensor = _GroupedMatmul.apply(x_RD, weight_EDF, plan)
    return y_RF
