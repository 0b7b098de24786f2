"""All small experts of a layer in one call of native/products.c, on one thread.

Where experts have some thousand weights or some ten rows, preparing four tensors for each takes
longer than multiplying them. cpu_feedforward.py goes from expert to expert and is the plain twin;
where it takes the products in C too (products.py), the results are the same bits.

Shapes: R rows, D d_model, F d_ff, E experts.
"""

import torch
from torch import Tensor

from switchlm.kernels import products
from switchlm.kernels.native import native
from switchlm.kernels.plan import Plan

SMALL = 2**13  # numbers of a matrix up to which this pays whatever the rows
_WIDTH = 16  # whole vectors on every processor


def fits(plan: Plan, x_RD: Tensor, up_EDF: Tensor, down_EFD: Tensor) -> bool:
    """Whether experts of ReLU go this way: float32, in main memory, small ones, one thread."""
    _, inputs, outputs = up_EDF.shape
    return (
        len(plan.parts) == 1
        and (inputs * outputs <= SMALL or max(plan.sizes[:-1]) <= products.MOST_ROWS)
        and all(width % _WIDTH == 0 for width in up_EDF.shape[1:])
        and all(
            tensor.dtype == torch.float32 and tensor.is_cpu and tensor.is_contiguous()
            for tensor in (x_RD, up_EDF, down_EFD)
        )
        and not torch._C._len_torch_dispatch_stack()
        and native().library is not None
    )


def forward(
    x_RD: Tensor, up_EDF: Tensor, down_EFD: Tensor, plan: Plan, hidden_RF: Tensor | None
) -> Tensor:
    """Return y_RD. Fills `hidden_RF` with what the activation gave, if there is one."""
    library = native().library
    assert library is not None
    y_RD = plan.empty(x_RD, down_EFD.shape[2])
    counts_E = torch.tensor(plan.sizes[:-1], device="cpu")
    kept = hidden_RF is not None
    room = hidden_RF if hidden_RF is not None else _room(x_RD, plan, up_EDF)
    library.relu_experts(
        x_RD.data_ptr(), counts_E.data_ptr(), *up_EDF.shape, up_EDF.data_ptr(),
        down_EFD.data_ptr(), room.data_ptr(), kept, y_RD.data_ptr(),
    )  # fmt: skip
    return y_RD


def backward(
    dy_RD: Tensor,
    x_RD: Tensor,
    up_EDF: Tensor,
    down_EFD: Tensor,
    hidden_RF: Tensor,
    plan: Plan,
    into: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """Write the gradients of x, up and down into those of `into` that are there."""
    library = native().library
    assert library is not None
    counts_E = torch.tensor(plan.sizes[:-1], device="cpu")
    room = _room(x_RD, plan, up_EDF)
    places = (None if gradient is None else gradient.data_ptr() for gradient in into)
    library.relu_experts_backward(
        dy_RD.data_ptr(), x_RD.data_ptr(), hidden_RF.data_ptr(), counts_E.data_ptr(),
        *up_EDF.shape, up_EDF.data_ptr(), down_EFD.data_ptr(), room.data_ptr(), *places,
    )  # fmt: skip


def _room(x_RD: Tensor, plan: Plan, up_EDF: Tensor) -> Tensor:
    """Return room for the hidden rows of one expert."""
    return x_RD.new_empty(max(plan.sizes[:-1]), up_EDF.shape[2])
