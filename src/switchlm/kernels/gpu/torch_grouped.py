"""Grouped matmul by `torch.nn.functional.grouped_mm`.

That leaves rows past the last offset uninitialised, in the output and in the gradient; it refuses
expanded incoming gradients, float64, and rows of weights that are no multiple of 16 bytes.

Shapes: R rows, D in, F out, E experts.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm

ALIGNMENT = 16  # bytes


def misfit(x_RD: Tensor, weight_EDF: Tensor) -> str | None:
    """Return why grouped_mm does not take these dtypes and shapes, None if it does."""
    if x_RD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it does not take {x_RD.dtype}"
    if x_RD.shape[0] == 0:
        return "no rows"
    for width in weight_EDF.shape[1:]:
        if width * x_RD.element_size() % ALIGNMENT:
            return f"rows of weights that are no multiple of {ALIGNMENT} bytes"
    return None


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, weight_EDF: Tensor, offset_E: Tensor) -> Tensor:
        past_R1 = torch.arange(x_RD.shape[0], device=x_RD.device)[:, None] >= offset_E[-1]
        ctx.save_for_backward(x_RD, weight_EDF, offset_E, past_R1)
        y_RF = grouped_mm(x_RD.contiguous(), weight_EDF, offs=offset_E)
        # Not in place where it is traced: PyTorch 2.11 gives wrong gradients then.
        traced = torch.compiler.is_compiling()
        return y_RF.masked_fill(past_R1, 0) if traced else y_RF.masked_fill_(past_R1, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_RD, weight_EDF, offset_E, past_R1 = ctx.saved_tensors
        dy_RF = gradients[0].contiguous()
        dx_RD = dweight_EDF = None
        if ctx.needs_input_grad[0]:
            dx_RD = grouped_mm(dy_RF, weight_EDF.mT, offs=offset_E).masked_fill_(past_R1, 0)
        if ctx.needs_input_grad[1]:
            dweight_EDF = grouped_mm(x_RD.contiguous().t(), dy_RF, offs=offset_E)
        return dx_RD, dweight_EDF, None


def grouped_matmul(x_RD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """Multiply consecutive runs of rows with their expert's matrix: see reference.py.

    In bfloat16 on Hopper and newer the counts stay on the device; elsewhere PyTorch waits for them.
    """
    offset_E = counts_E.cumsum(0).to(torch.int32)
    y_RF: Tensor = _GroupedMatmul.apply(x_RD, weight_EDF, offset_E)
    return y_RF
