"""The grouped product as one opaque operator, for torch.compile and for fake tensors.

How many rows an expert has is known only at run time, so the loop of cpu/grouped.py cannot be
traced; as an operator with a shape rule it needs no graph break. Calling it costs tens of
microseconds more than grouped.py alone, which is why nothing else uses it.
"""

from typing import Any

import torch
from torch import Tensor

from switchlm.kernels.cpu import grouped
from switchlm.kernels.cpu.grouped import Schedule, make_schedule


def _schedule(x_RD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Schedule:
    return make_schedule(counts_E.tolist(), x_RD.shape[0], weight_EDF[0].numel())


@torch.library.custom_op("switchlm::grouped_matmul", mutates_args=())
def _product(x_RD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
    return grouped.forward(x_RD, weight_EDF, _schedule(x_RD, weight_EDF, counts_E))


@_product.register_fake
def _(x_RD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
    return x_RD.new_empty(x_RD.shape[0], weight_EDF.shape[2])


@torch.library.custom_op("switchlm::grouped_matmul_backward", mutates_args=())
def _gradients(
    dy_RF: Tensor, x_RD: Tensor, weight_EDF: Tensor, counts_E: Tensor
) -> tuple[Tensor, Tensor]:
    schedule = _schedule(x_RD, weight_EDF, counts_E)
    dy_RF = dy_RF.contiguous()
    dweight_EDF = grouped.backward_weight(dy_RF, x_RD, weight_EDF, schedule)
    return grouped.backward_rows(dy_RF, weight_EDF, schedule), dweight_EDF


@_gradients.register_fake
def _(dy_RF: Tensor, x_RD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor]:
    return x_RD.new_empty(x_RD.shape), weight_EDF.new_empty(weight_EDF.shape)


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy_RF: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_gradients(dy_RF, *ctx.saved_tensors), None


_product.register_autograd(_backward, setup_context=_remember)


def grouped_matmul(x_RD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """Multiply consecutive runs of rows with their expert's matrix: see reference.py."""
    y_RF: Tensor = _product(x_RD, weight_EDF, counts_E)
    return y_RF
