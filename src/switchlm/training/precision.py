"""Which numbers a step computes with: the experiment of Table 2 (section 2.4).

Weights, gradients and the optimizer's state stay float32 in every mode, so that only what a mode
names differs.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from switchlm.model.router import Router
from switchlm.training.config import Precision


def set_router_dtype(model: nn.Module, precision: Precision) -> None:
    """Make routers compute in bfloat16 in the mode `bfloat16`, in float32 otherwise."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    for module in model.modules():
        if isinstance(module, Router):
            module.dtype = dtype


def computing(precision: Precision, device: torch.device) -> AbstractContextManager:
    """Return the context of a forward pass.

    `float32`: everything. `selective`: bfloat16, but routers float32 (the paper's choice).
    `bfloat16`: routers too, which the paper found to diverge.
    """
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
