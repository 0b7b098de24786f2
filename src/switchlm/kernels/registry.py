"""Every kernel, by what it computes: whether it takes given tensors, and why not.

The kernels of an operation stand in order; the first without a misfit is taken, and the last, the
plain one, takes everything. Routers have theirs in model/router.py, and kernels of whole Switch
layers are chosen in select.py, where a trial has a say.

Shapes: R rows, K inputs, N outputs or tokens, E experts, D and F the sides of a weight, V
vocabulary, B batch, H heads, Q queries, M keys.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from switchlm.kernels import compiled, reference
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
    """One way to compute something.

    name: what choices and figures call it.
    good_for: when it is taken, in a sentence.
    misfit: called with the tensors, says why the kernel does not take them, None if it does.
    run: computes; called with the tensors and whatever else the operation needs.
    """

    name: str
    good_for: str
    misfit: Callable[..., str | None]
    run: Callable[..., Any]


def fitting(kernels: Sequence[Kernel], *tensors: Tensor | None) -> Kernel | None:
    """Return the first kernel that takes these tensors, None if none does."""
    for kernel in kernels:
        if kernel.misfit(*tensors) is None:
            return kernel
    return None


def run(kernels: Sequence[Kernel], *tensors: Tensor | None, **others: Any) -> Any:
    """Compute with the first kernel that takes these tensors; the last one takes all.

    others: what the operation needs beside tensors, the same for every kernel.
    """
    kernel = fitting(kernels, *tensors)
    assert kernel is not None
    return kernel.run(*tensors, **others)


def explain(operation: str, *tensors: Tensor | None) -> dict[str, str]:
    """Return of every kernel of an operation whether it takes these tensors now, and why (not).

    operation: a name in `OPERATIONS`.
    tensors: as the misfits of its kernels take them.
    """
    taken = fitting(OPERATIONS[operation], *tensors)
    found = {}
    for kernel in OPERATIONS[operation]:
        reason = kernel.misfit(*tensors)
        said = kernel.good_for if reason is None else f"no: {reason}"
        found[kernel.name] = f"taken: {said}" if kernel is taken else said
    return found


def anything(*tensors: Tensor | None) -> None:
    """Plain kernels take all tensors."""
    return None


def _small_linear(x: Tensor, weight_NK: Tensor) -> Tensor:
    y_RN = small_batch.linear(x.reshape(-1, x.shape[-1]), weight_NK)
    return y_RN.view(*x.shape[:-1], -1)


def _traced_misfit(x_RD: Tensor, weight_EDF: Tensor) -> str | None:
    plain = type(x_RD) in (Tensor, nn.Parameter) and x_RD.device.type != "meta"
    return "not traced" if plain and not torch.compiler.is_compiling() else None


def _gpu_misfit(x_RD: Tensor, weight_EDF: Tensor) -> str | None:
    return torch_grouped.misfit(x_RD, weight_EDF) if x_RD.is_cuda else "not on a GPU"


def _bfloat16_misfit(x_RD: Tensor, weight_EDF: Tensor) -> str | None:
    if x_RD.dtype != torch.bfloat16:
        return f"{x_RD.dtype} is no bfloat16"
    return _gpu_misfit(x_RD, weight_EDF)


def _memory_misfit(x_RD: Tensor, weight_EDF: Tensor) -> str | None:
    return None if x_RD.is_cpu else "not in main memory"


def _few_misfit(x_RD: Tensor, weight_EDF: Tensor) -> str | None:
    return _memory_misfit(x_RD, weight_EDF) or small_batch.misfit(x_RD, weight_EDF)


def _plain_attention(
    query_BHQK: Tensor,
    key_BHMK: Tensor,
    value_BHMK: Tensor,
    bias: Tensor | None,
    dropout: float = 0.0,
) -> Tensor:
    y_BHQK = nn.functional.scaled_dot_product_attention(
        query_BHQK,
        key_BHMK,
        value_BHMK,
        attn_mask=None if bias is None else bias.to(query_BHQK.dtype),
        dropout_p=dropout,
        scale=1.0,
    )
    return y_BHQK.transpose(1, 2).flatten(2)


def _biased_attention(
    query_BHQK: Tensor, key_BHMK: Tensor, value_BHMK: Tensor, bias: Tensor
) -> Tensor:
    y_BHQK = attention.biased_attention(query_BHQK, key_BHMK, value_BHMK, bias)
    return y_BHQK.transpose(1, 2).flatten(2)


def _torch_rms_norm(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    return nn.functional.rms_norm(x, weight_D.shape, weight_D, epsilon)


def _torch_cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")


_GROUPED = torch_grouped.grouped_matmul

LINEAR = (
    Kernel(
        "few_rows",
        "few rows: as fast as their weights can be read",
        small_batch.misfit,
        _small_linear,
    ),
    Kernel(
        "upcast",
        "a dtype that this processor multiplies slowly: in float32",
        small_matmul.upcast_misfit,
        small_matmul.upcast_linear,
    ),
    Kernel(
        "small",
        "a small product: one call, forward and backward",
        small_matmul.misfit,
        small_matmul.linear,
    ),
    Kernel("torch", "everything else: PyTorch's own", anything, nn.functional.linear),
)
GROUPED_MATMUL = (
    Kernel(
        "torch_grouped",
        "bfloat16 on a GPU: one launch on Hopper and newer",
        _bfloat16_misfit,
        _GROUPED,
    ),
    Kernel(
        "compiled",
        "traced: the counts have no values yet, so one opaque operator",
        _traced_misfit,
        compiled.grouped_matmul,
    ),
    Kernel(
        "torch_grouped",
        "other dtypes on a GPU: PyTorch loops over the experts",
        _gpu_misfit,
        _GROUPED,
    ),
    Kernel(
        "few_rows",
        "few rows: as fast as their experts' weights can be read",
        _few_misfit,
        small_batch.grouped_matmul,
    ),
    Kernel(
        "cpu",
        "main memory: one product per expert, results written once",
        _memory_misfit,
        grouped.grouped_matmul,
    ),
    Kernel(
        "reference",
        "no faster kernel for these dtypes and widths there",
        anything,
        reference.grouped_matmul,
    ),
)
ATTENTION = (
    Kernel(
        "decode",
        "one query: as fast as its keys and values can be read",
        attention.decode_misfit,
        attention.decode_attention,
    ),
    Kernel(
        "small",
        "few scores: one call, forward and backward",
        attention.small_misfit,
        attention.small_attention,
    ),
    Kernel(
        "biased",
        "a bias that learns, in main memory: a few rows at a time in the cache",
        attention.biased_misfit,
        _biased_attention,
    ),
    Kernel("torch", "everything else: PyTorch's own", anything, _plain_attention),
)
RMS_NORM = (
    Kernel(
        "few_rows",
        "few rows in main memory, without autograd",
        norm.few_rows_misfit,
        small_batch.rms_norm,
    ),
    Kernel("native", "rows of whole vectors in main memory", norm.misfit, norm.native_rms_norm),
    Kernel("plain", "other rows in main memory", norm.plain_misfit, norm.plain_rms_norm),
    Kernel("torch", "everything else: PyTorch's own", anything, _torch_rms_norm),
)
CROSS_ENTROPY = (
    Kernel(
        "native",
        "rows of whole vectors in main memory",
        cross_entropy.misfit,
        cross_entropy.token_losses,
    ),
    Kernel("torch", "everything else: PyTorch's own", anything, _torch_cross_entropy),
)
ROUTE = (Kernel("native", "little work in main memory", router.misfit, router.route),)
OPERATIONS: dict[str, tuple[Kernel, ...]] = {
    "linear": LINEAR,
    "grouped_matmul": GROUPED_MATMUL,
    "attention": ATTENTION,
    "rms_norm": RMS_NORM,
    "cross_entropy": CROSS_ENTROPY,
    "route": ROUTE,
}
