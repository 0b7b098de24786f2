"""The precision in which a model computes: the three of Table 2 (section 2.4).

Weights, gradients and the optimizer's state are float32 in all of them. The precision belongs to
the model, not to its caller: `forward_batch` reads it, so that training, evaluation and the record
of the routing agree, and a sharded model, whose weights are gathered in bfloat16, runs everywhere.

`float32`: everything in float32. `selective`: bfloat16, but routers in float32 (the paper's
choice). `bfloat16`: routers too, which diverged in the paper.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
from torch import nn

from switchlm.config import check_choice
from switchlm.model.router import Router

Precision = Literal["float32", "bfloat16", "selective"]


def set_precision(model: nn.Module, precision: Precision) -> None:
    """Let the batches and the routers of a SwitchTransformer compute in `precision`, in place."""
    check_choice(precision, Precision, "precision")
    cast(Any, model).precision = precision
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    for module in model.modules():
        if isinstance(module, Router):
            module.dtype = dtype


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Compute in float32 in the block, as a saved model does once it is loaded.

    The model must not be sharded: its weights would be gathered in bfloat16.
    """
    precision: Precision = cast(Any, model).precision
    set_precision(model, "float32")
    try:
        yield
    finally:
        set_precision(model, precision)


def computing(precision: Precision, device: torch.device) -> AbstractContextManager:
    """Return the context of a forward pass in that precision."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
