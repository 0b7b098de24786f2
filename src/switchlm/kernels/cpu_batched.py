"""A whole expert feed-forward in bfloat16 on a CPU: a few batched products, not one an expert.

Matrix units multiply bfloat16 so fast that calling a product costs as much as the product of an
expert's 64 rows. Here neighbouring experts of similar loads form a run; their rows are filled up to
the largest load, and one batched product serves them all. Filled-up rows repeat real ones, so they
hold finite numbers; their incoming gradient is zero, so no weight feels them.

Shapes: R rows, S slots (rows and what fills them up), D d_model, F d_ff, E experts, M experts of a
run, C slots of each.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchlm.kernels import buffers
from switchlm.kernels.activations import Activation, activate, activate_backward_

CALL = 64  # a call costs about as much as this many rows
MOST_SLOTS = 2048  # of a run of several experts, so that its hidden rows stay in the cache


@dataclass(frozen=True)
class Run:
    """Neighbouring experts that share one product.

    experts, rows: from, to. slots: C. row_S, slot_R: int64, the row in each slot and the slot of
    each row, both counted from the run's first. spare_S: int64, the slots filled up.
    """

    experts: slice
    rows: slice
    slots: int
    row_S: Tensor
    slot_R: Tensor
    spare_S: Tensor

    def spread(self, rows: Tensor, *, zeros: bool = False) -> Tensor:
        """Return slots [M, C, width] with rows of [R, width]; `zeros` in the spare ones."""
        slots = rows[self.rows].index_select(0, self.row_S)
        if zeros:
            slots.index_fill_(0, self.spare_S, 0)
        return slots.unflatten(0, (-1, self.slots))

    def collect(self, slots: Tensor, rows: Tensor) -> None:
        """Write slots [M, C, width] into the run's rows of [R, width]."""
        torch.index_select(slots.flatten(0, 1), 0, self.slot_R, out=rows[self.rows])


def runs(counts: list[int]) -> tuple[list[Run], list[slice]]:
    """Return the runs of experts that have rows, and the stretches of experts that have none."""
    found, idle, first, row = [], [], 0, 0
    while first < len(counts):
        last = first + 1
        if counts[first]:
            most = counts[first]
            while last < len(counts) and counts[last]:
                wider = max(most, counts[last])
                filled_up = (wider - most) * (last - first) + wider - counts[last]
                if filled_up > CALL or wider * (last + 1 - first) > MOST_SLOTS:
                    break
                most, last = wider, last + 1
            found.append(_run(counts, first, last, row))
            row = found[-1].rows.stop
        else:
            while last < len(counts) and not counts[last]:
                last += 1
            idle.append(slice(first, last))
        first = last
    return found, idle


def _run(counts: list[int], first: int, last: int, row: int) -> Run:
    count_M = numpy.array(counts[first:last])
    slots = int(count_M.max())
    start_M = count_M.cumsum() - count_M
    place_C = numpy.arange(slots)
    filled_MC = place_C < count_M[:, None]
    row_MC = start_M[:, None] + numpy.minimum(place_C, count_M[:, None] - 1)
    flat = filled_MC.reshape(-1)
    return Run(
        slice(first, last),
        slice(row, row + int(count_M.sum())),
        slots,
        torch.from_numpy(row_MC.reshape(-1)),
        torch.from_numpy(flat.nonzero()[0]),
        torch.from_numpy((~flat).nonzero()[0]),
    )


class _ExpertFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        inner_EDF: Tensor,
        linear_EDF: Tensor | None,
        down_EFD: Tensor,
        counts: list[int],
        activation: Activation,
    ) -> Tensor:
        up = [inner_EDF] if linear_EDF is None else [inner_EDF, linear_EDF]
        found, idle = runs(counts)
        num_slots = sum((run.experts.stop - run.experts.start) * run.slots for run in found)
        hidden_SF = [buffers.empty((num_slots, inner_EDF.shape[2]), x_RD.dtype) for _ in up]
        y_RD = x_RD.new_empty(x_RD.shape[0], down_EFD.shape[2])
        y_RD[sum(counts) :].zero_()
        for run, hidden in zip(found, _by_run(hidden_SF, found), strict=True):
            x_MCD = run.spread(x_RD)
            for weight_EDF, out_MCF in zip(up, hidden, strict=True):
                torch.bmm(x_MCD, weight_EDF[run.experts], out=out_MCF)
            middle_MCF = activate(hidden[0], activation)
            if linear_EDF is not None:
                middle_MCF = middle_MCF * hidden[1]
            run.collect(torch.bmm(middle_MCF, down_EFD[run.experts]), y_RD)
        ctx.save_for_backward(x_RD, inner_EDF, linear_EDF, down_EFD, *hidden_SF)
        ctx.runs, ctx.idle, ctx.activation = found, idle, activation
        return y_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, inner_EDF, linear_EDF, down_EFD, *hidden_SF = ctx.saved_tensors
        dy_RD = gradients[0].contiguous()
        dx_RD = torch.zeros_like(x_RD) if ctx.needs_input_grad[0] else None
        dinner, dlinear, ddown = (
            _gradient(weight, ctx.idle) if weight is not None and needed else None
            for weight, needed in zip(
                (inner_EDF, linear_EDF, down_EFD), ctx.needs_input_grad[1:4], strict=True
            )
        )
        for run, hidden in zip(ctx.runs, _by_run(hidden_SF, ctx.runs), strict=True):
            experts = run.experts
            x_MDC = run.spread(x_RD).mT
            dy_MCD = run.spread(dy_RD, zeros=True)
            gradient_MCF = buffers.empty(tuple(hidden[0].shape), x_RD.dtype)
            torch.bmm(dy_MCD, down_EFD[experts].mT, out=gradient_MCF)
            middle_MCF = hidden[0] if ctx.activation == "relu" else activate(hidden[0], "gelu")
            if linear_EDF is not None:
                dlinear_MCF = gradient_MCF * middle_MCF
                gradient_MCF.mul_(hidden[1])
                middle_MCF = middle_MCF * hidden[1]
            if ddown is not None:
                torch.bmm(middle_MCF.mT, dy_MCD, out=ddown[experts])
            activate_backward_(gradient_MCF, hidden[0], ctx.activation)
            if dinner is not None:
                torch.bmm(x_MDC, gradient_MCF, out=dinner[experts])
            if dlinear is not None:
                torch.bmm(x_MDC, dlinear_MCF, out=dlinear[experts])
            if dx_RD is not None:
                dx_MCD = torch.bmm(gradient_MCF, inner_EDF[experts].mT)
                if linear_EDF is not None:
                    dx_MCD.baddbmm_(dlinear_MCF, linear_EDF[experts].mT)
                run.collect(dx_MCD, dx_RD)
        return dx_RD, dinner, dlinear, ddown, None, None


def _by_run(hidden_SF: list[Tensor], found: list[Run]) -> Iterator[list[Tensor]]:
    """Yield the hidden slots of every run, [M, C, F] each."""
    start = 0
    for run in found:
        shape = (run.experts.stop - run.experts.start, run.slots)
        stop = start + shape[0] * shape[1]
        yield [hidden[start:stop].unflatten(0, shape) for hidden in hidden_SF]
        start = stop


def _gradient(weight: Tensor, idle: list[slice]) -> Tensor:
    """Return an uninitialised gradient of a stacked weight; zeros for experts without rows."""
    gradient = buffers.empty(tuple(weight.shape), weight.dtype)
    for experts in idle:
        gradient[experts].zero_()
    return gradient


def expert_feedforward(
    x_RD: Tensor,
    counts_E: Tensor,
    up_EDF: Tensor,
    down_EFD: Tensor,
    activation: Activation = "relu",
    gate_EDF: Tensor | None = None,
) -> Tensor:
    """Return each row's expert applied to it: see select.py."""
    inner_EDF, linear_EDF = (up_EDF, None) if gate_EDF is None else (gate_EDF, up_EDF)
    y_RD: Tensor = _ExpertFeedForward.apply(
        x_RD, inner_EDF, linear_EDF, down_EFD, counts_E.tolist(), activation
    )
    return y_RD
