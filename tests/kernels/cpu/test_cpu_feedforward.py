"""The fused expert feed-forward equals matmuls of the reference with the activation between."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from switchlm.kernels import reference, select
from switchlm.kernels.reference import Activation

COUNTS = st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 3))
D, F = 6, 10


def make(
    counts: list[int], dropped: int, gated: bool, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(sum(counts) + dropped)
    shapes = [(sum(counts) + dropped, D), (len(counts), D, F), (len(counts), F, D)]
    shapes += [(len(counts), D, F)] * gated
    return tuple(
        torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes
    )


def slow(
    x_RD: Tensor,
    counts_E: Tensor,
    up_EDF: Tensor,
    down_EFD: Tensor,
    activation: Activation,
    gate_EDF: Tensor | None,
) -> Tensor:
    def activate(t: Tensor) -> Tensor:
        if activation == "relu":
            return t.relu()
        return torch.nn.functional.gelu(t, approximate="tanh")

    hidden_RF = reference.grouped_matmul(x_RD, up_EDF, counts_E)
    if gate_EDF is None:
        hidden_RF = activate(hidden_RF)
    else:
        hidden_RF = activate(reference.grouped_matmul(x_RD, gate_EDF, counts_E)) * hidden_RF
    return reference.grouped_matmul(hidden_RF, down_EFD, counts_E)


def both(
    counts: list[int], inputs: tuple[Tensor, ...], activation: Activation
) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients: ours, and the reference's."""
    counts_E = torch.tensor(counts)
    x_RD, up_EDF, down_EFD, *gate = inputs
    gate_EDF = gate[0] if gate else None
    outcomes = []
    for function in (select.expert_feedforward, slow):
        y_RD = function(x_RD, counts_E, up_EDF, down_EFD, activation, gate_EDF)
        dy_RD = torch.linspace(-1, 1, y_RD.numel(), dtype=y_RD.dtype).view(y_RD.shape)
        wanted = [t for t in inputs if t.requires_grad]
        outcomes.append([y_RD, *torch.autograd.grad(y_RD, wanted, dy_RD)])
    return outcomes[0], outcomes[1]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@given(shape=COUNTS)
def test_equals_the_reference(
    activation: Activation, gated: bool, shape: tuple[list[int], int]
) -> None:
    ours, theirs = both(shape[0], make(*shape, gated), activation)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("shared_out")
@pytest.mark.parametrize("counts", [[5, 0, 3, 1, 4], [60, 0, 1], [90], [3, 1100]], ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_equals_the_reference_on_two_threads(gated: bool, counts: list[int]) -> None:
    ours, theirs = both(counts, make(counts, 2, gated), "gelu")
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision(gated: bool, dtype: torch.dtype) -> None:
    inputs = make([5, 2], 1, gated, dtype)
    ours, theirs = both([5, 2], inputs, "relu")
    for actual, expected in zip(ours, theirs, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected, rtol=3e-2, atol=0.2)


@pytest.mark.usefixtures("shared_out")
@pytest.mark.parametrize("counts", [[17, 0, 40, 1], [300, 3], [0, 2500, 30]], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("gated", [False, True])
def test_low_precision_with_padded_rows(
    gated: bool, activation: Activation, counts: list[int]
) -> None:
    inputs = make(counts, 2, gated, torch.bfloat16)
    ours, _ = both(counts, inputs, activation)
    _, exact = both(counts, tuple(t.detach().double().requires_grad_() for t in inputs), activation)
    for actual, expected in zip(ours, exact, strict=True):
        assert actual.dtype == torch.bfloat16
        error = (actual.double() - expected).norm() / expected.norm()
        assert error < 0.03  # blocks of rows add up in bfloat16


@pytest.mark.parametrize("frozen", range(4))
def test_frozen_inputs_get_no_gradient_and_change_no_other(frozen: int) -> None:
    inputs = make([3, 0, 2], 1, gated=True)
    inputs[frozen].requires_grad_(False)
    ours, theirs = both([3, 0, 2], inputs, "gelu")
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_without_gradients_the_output_is_the_same(activation: Activation, gated: bool) -> None:
    x_RD, up_EDF, down_EFD, *gate = make([3, 0, 2], 2, gated)
    arguments = (x_RD, torch.tensor([3, 0, 2]), up_EDF, down_EFD, activation, *gate)
    with_gradients = select.expert_feedforward(*arguments)
    with torch.no_grad():
        assert torch.equal(select.expert_feedforward(*arguments), with_gradients)
    with torch.inference_mode():
        assert torch.equal(select.expert_feedforward(*arguments), with_gradients)


def test_checkpoint_and_expanded_gradients() -> None:
    inputs = make([3, 0, 2], 2, gated=False)
    x_RD, up_EDF, down_EFD = inputs
    counts_E = torch.tensor([3, 0, 2])

    def twice(x_RD: Tensor) -> Tensor:
        once_RD = select.expert_feedforward(x_RD, counts_E, up_EDF, down_EFD)
        return select.expert_feedforward(once_RD, counts_E, up_EDF, down_EFD)

    plain = torch.autograd.grad(twice(x_RD).sum(), inputs)
    again = checkpoint(twice, x_RD, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again.sum(), inputs), plain)


def test_autocast_keeps_float32_gradients() -> None:
    x_RD, up_EDF, down_EFD = make([3, 2], 1, gated=False, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_RD = select.expert_feedforward(x_RD, torch.tensor([3, 2]), up_EDF, down_EFD)
    assert y_RD.dtype == torch.bfloat16
    y_RD.sum().backward()
    assert up_EDF.grad is not None
    assert up_EDF.grad.dtype == torch.float32
