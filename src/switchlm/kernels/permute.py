"""Bring tokens into the order of their experts, and back.

Shapes: N tokens, K assignments a token, A = N * K assignments, R = A rows, D width, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


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
    """Order assignments by expert, dropped ones last, in token order within an expert."""
    key_A = torch.where(kept_A, expert_A, num_experts)
    sorted_A, assignment_R = torch.sort(key_A, stable=True)
    row_A = torch.empty_like(assignment_R)
    row_A[assignment_R] = torch.arange(row_A.shape[0], device=row_A.device)
    edges = torch.arange(num_experts + 1, device=key_A.device)
    starts = torch.searchsorted(sorted_A, edges)
    return ExpertOrder(assignment_R, row_A, starts.diff())


class _Gather(torch.autograd.Function):
    """Rows of tokens; the gradient gathers by the inverse instead of scattering."""

    @staticmethod
    def forward(ctx, x_ND, assignment_R, row_A, per_token):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(row_A)
        ctx.per_token = per_token
        return x_ND[assignment_R if per_token == 1 else assignment_R // per_token]

    @staticmethod
    def backward(ctx, gradient_RD):  # type: ignore[no-untyped-def]
        (row_A,) = ctx.saved_tensors
        gradient_AD = gradient_RD[row_A]
        if ctx.per_token > 1:
            gradient_AD = gradient_AD.unflatten(0, (-1, ctx.per_token)).sum(1)
        return gradient_AD, None, None, None


def gather_rows(x_ND: Tensor, order: ExpertOrder, per_token: int) -> Tensor:
    """Return x_RD: the token of every row, rows in the order of their experts."""
    return _Gather.apply(x_ND, order.assignment_R, order.row_A, per_token)


def combine_rows(y_RD: Tensor, weight_A: Tensor, order: ExpertOrder, per_token: int) -> Tensor:
    """Return y_ND: the sum of a token's rows, each times its weight.

    weight_A is zero for dropped assignments; what their rows hold does not matter as long as it is
    finite.
    """
    y_AD = _Gather.apply(y_RD, order.row_A, order.assignment_R, 1)
    y_AD = y_AD * weight_A[:, None].to(y_AD.dtype)
    return y_AD if per_token == 1 else y_AD.unflatten(0, (-1, per_token)).sum(1)
