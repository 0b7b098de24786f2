"""The fused Switch layer of small experts, native/switch.c: gather, experts, gate, combine.

The plain twin is `separate` in select.py. Permuted rows exist for one expert at a time, in the
cache.

Shapes: N tokens, one expert each, D d_model, F d_ff, E experts.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchlm.kernels.cpu import memory, native
from switchlm.kernels.cpu.small_matmul import matmul_dtype
from switchlm.kernels.permute import ExpertOrder

SMALL = 2**13  # weights of a matrix up to which starting an operator takes longer than the matmul
MOST_WORK = 2**25  # multiply-adds per matmul above which more threads pay
_ROWS = 128  # as in switch.c


def misfit(
    x_ND: Tensor, num_assignments: int, d_ff: int, activation: str, gated: bool
) -> str | None:
    """Return why the kernel does not take such a layer, None if it does.

    The number of threads plays no part, so it changes no result.
    """
    if torch.compiler.is_compiling() or type(x_ND) is not Tensor:
        return "traced"
    num_tokens, d_model = x_ND.shape
    if activation != "relu" or gated:
        return "its experts are gated or not ReLU"
    if num_assignments != num_tokens:
        return f"{num_assignments} assignments for {num_tokens} tokens"
    if d_model * d_ff > SMALL or d_model % native.WIDTH or d_ff % native.WIDTH:
        return f"experts of {d_model} x {d_ff} are not small, or no multiple of {native.WIDTH}"
    if num_tokens * d_model * d_ff > MOST_WORK:
        return f"{num_tokens} rows are enough for several threads"
    dtype = matmul_dtype(x_ND)
    if dtype != torch.float32 or x_ND.dtype != torch.float32:
        return f"it takes float32, not {dtype}"
    return native.misfit(x_ND)


def switch_feedforward(
    x_ND: Tensor,
    weight_N: Tensor,
    order: ExpertOrder,
    up_EDF: Tensor,
    down_EFD: Tensor,
    activation: str,
    gate_EDF: Tensor | None,
) -> Tensor:
    """Return y_ND, weight times expert; zeros for rows past the counts, whatever their weight."""
    assert activation == "relu", "see misfit"
    assert gate_EDF is None, "see misfit"
    tensors = [t.contiguous() for t in (x_ND, weight_N, up_EDF, down_EFD)]
    tensors += [order.assignment_R, order.counts_E]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        y_ND: Tensor = _Switch.apply(*tensors)
        return y_ND
    return _forward(*tensors)


def _forward(
    x_ND: Tensor,
    weight_N: Tensor,
    up_EDF: Tensor,
    down_EFD: Tensor,
    token_R: Tensor,
    counts_E: Tensor,
    hidden_RF: Tensor | None = None,
) -> Tensor:
    """Return y_ND. Fills `hidden_RF`, if given, with the activated rows."""
    (num_tokens, d_model), d_ff = x_ND.shape, up_EDF.shape[2]
    y_ND, workspace = torch.empty_like(x_ND), x_ND.new_empty(_ROWS, d_model)
    hidden = x_ND.new_empty(_ROWS, d_ff) if hidden_RF is None else hidden_RF
    native.library().switch_experts(
        x_ND.data_ptr(), weight_N.data_ptr(), token_R.data_ptr(), counts_E.data_ptr(),
        num_tokens, *up_EDF.shape, up_EDF.data_ptr(), down_EFD.data_ptr(),
        hidden.data_ptr(), hidden_RF is not None, workspace.data_ptr(), y_ND.data_ptr(),
    )  # fmt: skip
    return y_ND


class _Switch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_N: Tensor,
        up_EDF: Tensor,
        down_EFD: Tensor,
        token_R: Tensor,
        counts_E: Tensor,
    ) -> Tensor:
        hidden_RF = memory.empty_reused((x_ND.shape[0], up_EDF.shape[2]), x_ND.dtype)
        inputs = (x_ND, weight_N, up_EDF, down_EFD, token_R, counts_E)
        y_ND = _forward(*inputs, hidden_RF)
        ctx.save_for_backward(*inputs, hidden_RF)
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_N, up_EDF, down_EFD, token_R, counts_E, hidden_RF = ctx.saved_tensors
        dy_ND = gradients[0].contiguous()
        (num_tokens, d_model), d_ff = x_ND.shape, up_EDF.shape[2]
        results = [
            memory.empty_reused(tuple(tensor.shape), tensor.dtype) if needed else None
            for tensor, needed in zip(
                (x_ND, weight_N, up_EDF, down_EFD), ctx.needs_input_grad, strict=False
            )
        ]
        workspace = x_ND.new_empty(_ROWS * (2 * d_model + d_ff) + 2 * d_model * d_ff)
        native.library().switch_experts_backward(
            dy_ND.data_ptr(), x_ND.data_ptr(), weight_N.data_ptr(), token_R.data_ptr(),
            counts_E.data_ptr(), num_tokens, *up_EDF.shape, up_EDF.data_ptr(),
            down_EFD.data_ptr(), hidden_RF.data_ptr(), workspace.data_ptr(),
            *(None if gradient is None else gradient.data_ptr() for gradient in results),
        )  # fmt: skip
        return *results, None, None
