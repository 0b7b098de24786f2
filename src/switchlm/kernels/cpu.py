"""Grouped products on a CPU: one `mm` an expert, straight into memory that is written once.

Autograd over a loop that indexes the stacked weight builds one full-size gradient an expert, and
`torch.nn.functional.grouped_mm` leaves the rows past the counts undefined. Here the loop is inside
one autograd function: every product writes its slice of a preallocated result, experts without rows
cost one `zero_` of their weight gradient, and rows past the counts are zero.

Shapes: R rows, D in, F out, E experts.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Run = tuple[int, int, int]


def runs_of(counts: list[int], num_rows: int) -> tuple[list[Run], list[int], int]:
    """Return (expert, start, end) of every expert with rows, the experts without, and the sum."""
    runs = []
    empty = []
    start = 0
    for expert, count in enumerate(counts):
        if count:
            runs.append((expert, start, start + count))
            start += count
        else:
            empty.append(expert)
    assert start <= num_rows, f"experts have {start} rows in all, the input has {num_rows}"
    return runs, empty, start


class _GroupedMatmul(torch.autograd.Function):
    """y[rows of e] = x[rows of e] @ weight[e]; zeros past the counts, in gradients too."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, weight_EDF: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x_RD, weight_EDF)
        ctx.counts = counts
        runs, _, total = runs_of(counts, x_RD.shape[0])
        y_RF = x_RD.new_empty(x_RD.shape[0], weight_EDF.shape[2])
        for expert, start, end in runs:
            torch.mm(x_RD[start:end], weight_EDF[expert], out=y_RF[start:end])
        y_RF[total:].zero_()
        return y_RF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_RD, weight_EDF = ctx.saved_tensors
        dy_RF = gradients[0].contiguous()
        runs, empty, total = runs_of(ctx.counts, x_RD.shape[0])
        dx_RD = dweight_EDF = None
        if ctx.needs_input_grad[0]:
            dx_RD = torch.empty_like(x_RD, memory_format=torch.contiguous_format)
            for expert, start, end in runs:
                torch.mm(dy_RF[start:end], weight_EDF[expert].t(), out=dx_RD[start:end])
            dx_RD[total:].zero_()
        if ctx.needs_input_grad[1]:
            dweight_EDF = torch.empty_like(weight_EDF, memory_format=torch.contiguous_format)
            for expert, start, end in runs:
                torch.mm(x_RD[start:end].t(), dy_RF[start:end], out=dweight_EDF[expert])
            for expert in empty:
                dweight_EDF[expert].zero_()
        return dx_RD, dweight_EDF, None


def grouped_matmul(x_RD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """Multiply consecutive runs of rows with their expert's matrix: see reference.py."""
    y_RF: Tensor = _GroupedMatmul.apply(x_RD, weight_EDF, counts_E.tolist())
    return y_RF
