"""Every kernel, by operation: whether it takes given tensors, and if not, why.

The kernels of an operation are in order of preference; the first without a misfit runs, and the
last, the plain one, takes all tensors. The plain router is model/router.py. Kernels of whole Switch
layers are chosen in select.py, where autotuning may decide.

Shapes: R rows, K inputs, N outputs or tokens, E experts, D and F the sides of a weight, V
vocabulary, B batch, H heads, Q queries, M keys.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from switchlm.kernels import reference
from switchlm.kernels.cpu import (
    attention,
    cross_entropy,
    grouped,
    norm,
    router,
    small_batch,
    small_matmul,
)
from switchlm.kernels.gpu import torch_grouped


@dataclass(frozen=True)
class Kernel:
    """One implementation of an operation.

    name: its name in choices and results.
    misfit: called with the tensors, returns why the kernel does not take them, None if it does.
    run: called with the tensors and whatever else the operation needs, computes.
    good_for: when it is taken, in a sentence, for `select.explain`.
    """

    name: str
    misfit: Callable[..., str | None]
    run: Callable[..., Any]
    good_for: str = ""


def fitting(kernels: Sequence[Kernel], *tensors: Tensor | None) -> Kernel | None:
    """Return the first kernel that takes these tensors, None if none does."""
    for kernel in kernels:
        if kernel.misfit(*tensors) is None:
            return kernel
    return None


def run(kernels: Sequence[Kernel], *tensors: Tensor | None, **others: Any) -> Tensor:
    """Compute with the first kernel that takes these tensors; the last one takes all.

    others: arguments that the choice does not depend on.
    """
    kernel = fitting(kernels, *tensors)
    assert kernel is not None
    y: Tensor = kernel.run(*tensors, **others)
    return y


def takes_all(*tensors: Tensor | None) -> None:
    """The misfit of plain kernels, which take all tensors."""
    return None


def _traced_misfit(x_RD: Tensor, weight_EDF: Tensor) -> str | None:
    plain = type(x_RD) in (Tensor, nn.Parameter) and x_RD.device.type != "meta"
    return "not traced" if plain and not torch.compiler.is_compiling() else None


def _gpu_misfit(x_RD: Tensor, weight_EDF: Tensor) -> str | None:
    if not x_RD.is_cuda:
        return "not on a GPU"
    # PyTorch loops over experts in other dtypes, which cannot be traced.
    if x_RD.dtype != torch.bfloat16 and _traced_misfit(x_RD, weight_EDF) is None:
        return f"traced, and {x_RD.dtype} is no bfloat16"
    return torch_grouped.misfit(x_RD, weight_EDF)


def _memory_misfit(x_RD: Tensor, weight_EDF: Tensor) -> str | None:
    return None if x_RD.is_cpu else "not in main memory"


def _torch_attention(
    query_BHQK: Tensor,
    key_BHMK: Tensor,
    value_BHMK: Tensor,
    bias: Tensor | None,
    dropout: float = 0.0,
) -> Tensor:
    dtype = query_BHQK.dtype
    if bias is not None:
        if dtype == torch.float16:  # the mask's -3e38 would be infinite, and rows NaN
            bias = bias.clamp(min=torch.finfo(dtype).min)
        bias = bias.to(dtype)
    y_BHQK = nn.functional.scaled_dot_product_attention(
        query_BHQK, key_BHMK, value_BHMK, attn_mask=bias, dropout_p=dropout, scale=1.0
    )
    return y_BHQK.transpose(1, 2).flatten(2)


def _torch_rms_norm(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    return nn.functional.rms_norm(x, weight_D.shape, weight_D, epsilon)


def _torch_cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")


LINEAR = (
    Kernel("small_batch", small_batch.misfit, small_batch.linear),
    Kernel("upcast", small_matmul.upcast_misfit, small_matmul.upcast_linear),
    Kernel("small", small_matmul.misfit, small_matmul.linear),
    Kernel("torch", takes_all, nn.functional.linear),
)
GROUPED_MATMUL = (
    Kernel(
        "torch_grouped",
        _gpu_misfit,
        torch_grouped.grouped_matmul,
        "on a GPU: one launch in bfloat16 on Hopper and newer, else PyTorch loops over experts",
    ),
    Kernel(
        "compiled",
        _traced_misfit,
        grouped.traced_matmul,
        "traced: the counts have no values yet, so one opaque operator",
    ),
    Kernel(
        "small_batch",
        small_batch.misfit,
        small_batch.grouped_matmul,
        "few rows: as fast as their experts' weights can be read",
    ),
    Kernel(
        "cpu",
        _memory_misfit,
        grouped.grouped_matmul,
        "main memory: one matmul per expert, results written once",
    ),
    Kernel(
        "reference",
        takes_all,
        reference.grouped_matmul,
        "no faster kernel for these dtypes and widths there",
    ),
)
ATTENTION = (
    Kernel("decode", attention.decode_misfit, attention.decode_attention),
    Kernel("native", attention.misfit, attention.attention),
    Kernel("narrow", attention.narrow_misfit, attention.narrow_attention),
    Kernel("torch", takes_all, _torch_attention),
)
RMS_NORM = (
    Kernel("small_batch", norm.small_batch_misfit, norm.rms_norm),
    Kernel("native", norm.misfit, norm.rms_norm),
    Kernel("torch", takes_all, _torch_rms_norm),
)
CROSS_ENTROPY = (
    Kernel("native", cross_entropy.misfit, cross_entropy.token_losses),
    Kernel("torch", takes_all, _torch_cross_entropy),
)
ROUTE = (Kernel("native", router.misfit, router.route),)
