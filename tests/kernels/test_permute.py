"""Sorting, gathering and combining equal plain indexing, in both directions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from switchlm.kernels import permute
from switchlm.kernels.permute import combine_rows, gather_rows, sort_by_expert


def order_of(expert: list[int], kept: list[bool], num_experts: int) -> permute.ExpertOrder:
    return sort_by_expert(torch.tensor(expert), torch.tensor(kept, dtype=torch.bool), num_experts)


@given(
    assignments=st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=40),
    num_experts=st.sampled_from([6, 300, 70000]),
)
def test_rows_are_in_the_order_of_experts_then_of_tokens(
    assignments: list[tuple[int, bool]], num_experts: int
) -> None:
    expert = [chosen for chosen, _ in assignments]
    kept = [stays for _, stays in assignments]
    order = sort_by_expert(
        torch.tensor(expert, dtype=torch.long), torch.tensor(kept, dtype=torch.bool), num_experts
    )
    keys = [chosen if stays else num_experts for chosen, stays in assignments]
    expected = sorted(range(len(keys)), key=lambda assignment: keys[assignment])
    assert order.assignment_R.tolist() == expected
    assert order.row_A[order.assignment_R].tolist() == list(range(len(keys)))
    assert order.counts_E.tolist() == [keys.count(e) for e in range(6)] + [0] * (num_experts - 6)
    for tensor in (order.assignment_R, order.row_A, order.counts_E):
        assert tensor.dtype == torch.int64


def test_both_sorts_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    expert_A = torch.randint(0, 7, (500,))
    kept_A = torch.rand(500) < 0.8
    radix = sort_by_expert(expert_A, kept_A, 7)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    traced = sort_by_expert(expert_A, kept_A, 7)
    for name in ("assignment_R", "row_A", "counts_E"):
        assert torch.equal(getattr(radix, name), getattr(traced, name))


@pytest.mark.parametrize("per_token", [1, 2, 3])
def test_gather_and_combine_equal_indexing(per_token: int) -> None:
    num_tokens, width, num_experts = 7, 5, 4
    expert_A = torch.randint(0, num_experts, (num_tokens * per_token,))
    kept_A = torch.rand(num_tokens * per_token) < 0.7
    order = sort_by_expert(expert_A, kept_A, num_experts)
    x_ND = torch.randn(num_tokens, width, dtype=torch.float64, requires_grad=True)
    weight_A = (torch.rand(num_tokens * per_token, dtype=torch.float64) * kept_A).requires_grad_()
    scale_R1 = torch.arange(1.0, num_tokens * per_token + 1, dtype=torch.float64)[:, None]

    y_ND = combine_rows(gather_rows(x_ND, order, per_token) * scale_R1, weight_A, order, per_token)
    row_scale_A1 = scale_R1[order.row_A]
    assigned_AD = x_ND.repeat_interleave(per_token, 0) * row_scale_A1 * weight_A[:, None]
    expected_ND = assigned_AD.view(num_tokens, per_token, width).sum(1)
    torch.testing.assert_close(y_ND, expected_ND)
    dy_ND = torch.randn_like(y_ND)
    torch.testing.assert_close(
        torch.autograd.grad(y_ND, (x_ND, weight_A), dy_ND),
        torch.autograd.grad(expected_ND, (x_ND, weight_A), dy_ND),
    )


def test_gradcheck_with_an_expanded_gradient() -> None:
    order = order_of([1, 0, 1, 2], [True, True, False, True], 3)
    x_ND = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight_A = torch.rand(4, dtype=torch.float64, requires_grad=True)

    def both(x_ND: torch.Tensor, weight_A: torch.Tensor) -> torch.Tensor:
        return combine_rows(gather_rows(x_ND, order, 1), weight_A, order, 1).sum()

    assert torch.autograd.gradcheck(both, (x_ND, weight_A))


def test_no_tokens() -> None:
    order = order_of([], [], 3)
    x_ND = torch.randn(0, 4, requires_grad=True)
    y_ND = combine_rows(gather_rows(x_ND, order, 1), torch.zeros(0), order, 1)
    y_ND.sum().backward()
    assert y_ND.shape == (0, 4)
    assert x_ND.grad is not None
    assert x_ND.grad.shape == (0, 4)


def test_low_precision_rows_keep_their_dtype_and_float32_gates_theirs() -> None:
    order = order_of([1, 0], [True, True], 2)
    y_RD = torch.randn(2, 4, dtype=torch.bfloat16, requires_grad=True)
    weight_A = torch.rand(2, requires_grad=True)
    combined_ND = combine_rows(y_RD, weight_A, order, 1)
    combined_ND.sum().backward()
    assert combined_ND.dtype == torch.bfloat16
    assert y_RD.grad is not None
    assert y_RD.grad.dtype == torch.bfloat16
    assert weight_A.grad is not None
    assert weight_A.grad.dtype == torch.float32
