"""Permute tokens into the order of their experts, and back.

Both directions gather, forwards and backwards, by the permutation or its inverse: nothing scatters,
so the result never depends on the order of threads.

Shapes: N tokens, K assignments per token, A = N * K assignments, R = A rows, D width, E experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchlm.kernels.cpu import native


@dataclass(frozen=True)
class ExpertOrder:
    """A permutation of assignments that puts every expert's rows together.

    assignment_R: int64, the assignment that each row holds; dropped ones come last.
    row_A: int64, its inverse: the row of each assignment.
    counts_E: int64, kept rows of every expert.
    """

    assignment_R: Tensor
    row_A: Tensor
    counts_E: Tensor


def sort_by_expert(expert_A: Tensor, kept_A: Tensor, num_experts: int) -> ExpertOrder:
    """Order assignments by expert, dropped ones last, in token order within an expert.

    expert_A: int64.
    kept_A: bool.
    """
    if (
        native.misfit(expert_A, dtype=torch.int64) is None
        and native.misfit(kept_A, dtype=torch.bool) is None
        and kept_A.shape == expert_A.shape
    ):
        return _counting_sort(expert_A.contiguous(), kept_A.contiguous(), num_experts)
    key_A = torch.where(kept_A, expert_A, num_experts)
    sorted_A, assignment_R = torch.sort(key_A, stable=True)
    row_A = torch.empty_like(assignment_R)
    row_A[assignment_R] = torch.arange(row_A.shape[0], device=row_A.device)
    edges = torch.arange(num_experts + 1, device=key_A.device)
    starts = torch.searchsorted(sorted_A, edges)
    return ExpertOrder(assignment_R, row_A, starts.diff())


def _counting_sort(expert_A: Tensor, kept_A: Tensor, num_experts: int) -> ExpertOrder:
    assignment_R, row_A = torch.empty_like(expert_A), torch.empty_like(expert_A)
    counts_E = expert_A.new_empty(num_experts)
    native.library().sort_by_expert(
        expert_A.data_ptr(), kept_A.data_ptr(), expert_A.numel(), num_experts,
        assignment_R.data_ptr(), row_A.data_ptr(), counts_E.data_ptr(),
    )  # fmt: skip
    return ExpertOrder(assignment_R, row_A, counts_E)


class _Gather(torch.autograd.Function):
    """Rows of tokens; the gradient gathers by the inverse instead of scattering."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order: ExpertOrder, per_token: int) -> Tensor:
        ctx.save_for_backward(order.row_A)
        ctx.per_token = per_token
        return x_ND.index_select(0, _token_of_row(order, per_token))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (row_A,) = ctx.saved_tensors
        gradient_AD = gradients[0].index_select(0, row_A)
        if ctx.per_token > 1:
            gradient_AD = gradient_AD.unflatten(0, (-1, ctx.per_token)).sum(1)
        return gradient_AD, None, None


class _Combine(torch.autograd.Function):
    """Weighted rows in the order of tokens again, one pass over them each way."""

    @staticmethod
    def forward(
        ctx: Any, y_RD: Tensor, weight_A: Tensor, order: ExpertOrder, per_token: int
    ) -> Tensor:
        ctx.save_for_backward(y_RD, weight_A, order.assignment_R, order.row_A)
        ctx.per_token = per_token
        return _combined(y_RD, weight_A, order, per_token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        y_RD, weight_A, assignment_R, row_A = ctx.saved_tensors
        token_R = assignment_R if ctx.per_token == 1 else assignment_R // ctx.per_token
        gradient_RD = gradients[0].index_select(0, token_R)
        dweight_A = None
        if ctx.needs_input_grad[1]:
            dot_R = torch.linalg.vecdot(gradient_RD, y_RD)
            dweight_A = dot_R[row_A].to(weight_A.dtype)
        gradient_RD.mul_(weight_A[assignment_R][:, None].to(gradient_RD.dtype))
        return gradient_RD, dweight_A, None, None


def _combined(y_RD: Tensor, weight_A: Tensor, order: ExpertOrder, per_token: int) -> Tensor:
    y_AD, weight_A1 = y_RD.index_select(0, order.row_A), weight_A[:, None].to(y_RD.dtype)
    # Not in place where it is traced: PyTorch 2.11 gives wrong gradients then.
    y_AD = y_AD * weight_A1 if torch.compiler.is_compiling() else y_AD.mul_(weight_A1)
    return y_AD if per_token == 1 else y_AD.unflatten(0, (-1, per_token)).sum(1)


def _token_of_row(order: ExpertOrder, per_token: int) -> Tensor:
    return order.assignment_R if per_token == 1 else order.assignment_R // per_token


def gather_rows(x_ND: Tensor, order: ExpertOrder, per_token: int) -> Tensor:
    """Return x_RD: the token of every row, rows in the order of their experts."""
    if not torch.is_grad_enabled():
        return x_ND.index_select(0, _token_of_row(order, per_token))
    x_RD: Tensor = _Gather.apply(x_ND, order, per_token)
    return x_RD


def combine_rows(y_RD: Tensor, weight_A: Tensor, order: ExpertOrder, per_token: int) -> Tensor:
    """Return y_ND: the sum of a token's rows, each times its weight.

    weight_A: zero for dropped assignments, whose rows may hold any finite numbers.
    """
    if not torch.is_grad_enabled():
        return _combined(y_RD, weight_A, order, per_token)
    y_ND: Tensor = _Combine.apply(y_RD, weight_A, order, per_token)
    return y_ND
