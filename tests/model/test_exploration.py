import pytest
import torch

from switchlm.model.selection import explore


def test_jitter_multiplies_by_a_uniform_factor_in_float32() -> None:
    torch.manual_seed(0)
    x_ND = torch.randn(100, 50).bfloat16()
    seen_ND = explore(x_ND, "jitter", 0.01)
    assert seen_ND.dtype == torch.float32
    factor = seen_ND / x_ND.float()
    assert factor.min() >= 0.99 - 1e-5
    assert factor.max() <= 1.01 + 1e-5
    assert factor.std().item() == pytest.approx(0.02 / 12**0.5, rel=0.05)


def test_input_dropout_drops_with_the_rate_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    seen_ND = explore(torch.ones(100, 100), "input_dropout", 0.2)
    assert (seen_ND == 0).float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert seen_ND[seen_ND != 0].unique().tolist() == [1.25]


@pytest.mark.parametrize(
    ("kind", "rate"), [("argmax", 0.1), ("sample", 0.1), ("jitter", 0.0), ("input_dropout", 0.0)]
)
def test_other_kinds_and_a_rate_of_zero_leave_the_input_alone(kind: str, rate: float) -> None:
    x_ND = torch.randn(3, 4)
    assert explore(x_ND, kind, rate) is x_ND


def test_gradients_pass_through_jitter() -> None:
    x_ND = torch.randn(3, 4, requires_grad=True)
    explore(x_ND, "jitter", 0.1).sum().backward()
    assert x_ND.grad is not None
    assert ((x_ND.grad - 1).abs() <= 0.1).all()
