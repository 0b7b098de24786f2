"""Every kernel equals the reference: output, gradients, rows past the counts, odd counts."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from switchlm.kernels import reference, registry, select
from switchlm.kernels.gpu import torch_grouped

KERNELS = {
    kernel.name: kernel.run for kernel in registry.GROUPED_MATMUL if kernel.name != "small_batch"
}
COUNTS = st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=7), st.integers(0, 4))
# grouped_mm needs widths of 16 bytes: all kernels are tested at such widths.
D, F = 8, 16


def make(counts: list[int], dropped: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(counts) + dropped)
    rows = sum(counts) + dropped
    x_RD = torch.randn(rows, D, generator=generator).to(dtype).requires_grad_()
    weight_EDF = torch.randn(len(counts), D, F, generator=generator).to(dtype).requires_grad_()
    return x_RD, weight_EDF, torch.tensor(counts)


def results(
    kernel: Callable[..., Tensor], x_RD: Tensor, weight_EDF: Tensor, counts_E: Tensor
) -> tuple:
    y_RF = kernel(x_RD, weight_EDF, counts_E)
    dy_RF = torch.linspace(-1, 1, y_RF.numel(), dtype=y_RF.dtype).view(y_RF.shape)
    return y_RF, *torch.autograd.grad(y_RF, (x_RD, weight_EDF), dy_RF)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@given(shape=COUNTS)
def test_equals_the_reference(name: str, dtype: torch.dtype, shape: tuple[list[int], int]) -> None:
    x_RD, weight_EDF, counts_E = make(*shape, dtype)
    if name == "torch_grouped" and torch_grouped.misfit(x_RD, weight_EDF):
        return
    expected = results(reference.grouped_matmul, x_RD, weight_EDF, counts_E)
    actual = results(KERNELS[name], x_RD, weight_EDF, counts_E)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.usefixtures("shared_out")
@pytest.mark.parametrize("name", ["cpu", "compiled"])
def test_threads_change_no_bit(name: str) -> None:
    inputs = make([5, 0, 9, 1, 4, 4, 2], 3, torch.float32)
    shared = results(KERNELS[name], *inputs)
    torch.set_num_threads(1)
    alone = results(KERNELS[name], *inputs)
    for ours, theirs in zip(shared, alone, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", KERNELS)
def test_rows_past_the_counts_are_zeros_in_output_and_gradient(name: str) -> None:
    x_RD, weight_EDF, counts_E = make([2, 0, 3], 4, torch.float32)
    for _ in range(5):  # uninitialised memory is often zero the first time
        y_RF, dx_RD, dweight_EDF = results(KERNELS[name], x_RD, weight_EDF, counts_E)
        for tensor in (y_RF[5:], dx_RD[5:], dweight_EDF[1]):
            assert torch.equal(tensor, torch.zeros_like(tensor))
        y_RF.detach().fill_(float("nan"))
        dx_RD.fill_(float("nan"))
        dweight_EDF.fill_(float("nan"))


@pytest.mark.parametrize("name", KERNELS)
def test_incoming_gradients_may_be_expanded_or_transposed(name: str) -> None:
    x_RD, weight_EDF, counts_E = make([3, 2], 1, torch.float32)
    kernel = KERNELS[name]
    for scalar in (
        lambda y_RF: y_RF.sum(),
        lambda y_RF: (y_RF.t() * torch.arange(6.0)).t().sum(),
        lambda y_RF: (y_RF.t().contiguous() ** 2).sum(),
    ):
        ours = torch.autograd.grad(scalar(kernel(x_RD, weight_EDF, counts_E)), (x_RD, weight_EDF))
        theirs = torch.autograd.grad(
            scalar(reference.grouped_matmul(x_RD, weight_EDF, counts_E)), (x_RD, weight_EDF)
        )
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", KERNELS)
def test_inputs_may_be_strided(name: str) -> None:
    x_DR = torch.randn(D, 6, requires_grad=True)
    weight_EFD = torch.randn(2, F, D, requires_grad=True)
    counts_E = torch.tensor([2, 3])
    arguments = (x_DR.t(), weight_EFD.mT, counts_E)
    ours = KERNELS[name](*arguments)
    theirs = reference.grouped_matmul(*arguments)
    torch.testing.assert_close(ours, theirs)
    dy_RF = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (x_DR, weight_EFD), dy_RF),
        torch.autograd.grad(theirs, (x_DR, weight_EFD), dy_RF),
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_twice_gives_the_same_gradients(reentrant: bool) -> None:
    x_RD, weight_EDF, counts_E = make([3, 0, 4], 2, torch.float32)

    def twice(x_RD: Tensor) -> Tensor:
        hidden_RF = select.grouped_matmul(x_RD, weight_EDF, counts_E)
        return select.grouped_matmul(hidden_RF.relu(), weight_EDF.mT, counts_E)

    plain = torch.autograd.grad(twice(x_RD).square().sum(), (x_RD, weight_EDF))
    again = checkpoint(twice, x_RD, use_reentrant=reentrant)
    again.square().sum().backward()
    torch.testing.assert_close(plain, (x_RD.grad, weight_EDF.grad))


def test_autocast_casts_as_linear_does() -> None:
    x_RD, weight_EDF, counts_E = make([3, 4], 0, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_RF = select.grouped_matmul(x_RD, weight_EDF, counts_E)
        z_RF = torch.nn.functional.linear(x_RD[:3], weight_EDF[0].t())
    assert y_RF.dtype == z_RF.dtype == torch.bfloat16
    torch.testing.assert_close(y_RF[:3], z_RF)
    y_RF.float().sum().backward()
    assert x_RD.grad is not None
    assert x_RD.grad.dtype == torch.float32
    assert weight_EDF.grad is not None
    assert weight_EDF.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone() -> None:
    x_RD, weight_EDF, counts_E = make([3, 4], 0, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert select.grouped_matmul(x_RD, weight_EDF, counts_E).dtype == torch.float64


def test_inference_mode_works() -> None:
    x_RD, weight_EDF, counts_E = make([3, 4], 1, torch.float32)
    with torch.inference_mode():
        y_RF = select.grouped_matmul(x_RD, weight_EDF, counts_E)
    torch.testing.assert_close(y_RF, reference.grouped_matmul(x_RD, weight_EDF, counts_E))


@pytest.mark.parametrize("learning", [False, True])
def test_a_mask_out_of_range_of_float16_makes_no_row_nan(learning: bool) -> None:
    query, key, value = (torch.randn(2, 3, 5, 16).half().requires_grad_(learning) for _ in "qkv")
    allowed = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    allowed[..., 0, :] = False
    allowed[..., 1:, 3:] = False
    bias = torch.where(allowed, 0.0, torch.finfo(torch.bfloat16).min)
    y_BQW = select.attention(query, key, value, bias)
    y_BQHK = y_BQW.float().unflatten(2, (3, 16))
    assert y_BQHK.isfinite().all()
    seen = value[:, :, :3].float()
    weight = (query.float() @ key[:, :, :3].float().mT).softmax(-1)
    expected = (weight @ seen).transpose(1, 2)
    torch.testing.assert_close(y_BQHK[:, 1:], expected[:, 1:], rtol=1e-2, atol=1e-2)


def test_explain_says_why() -> None:
    x_RD, weight_EDF, _ = make([3, 4], 0, torch.float32)
    choice = select.explain(x_RD, weight_EDF)
    assert choice.name == "cpu"
    assert "main memory" in choice.reason
    on_meta = select.explain(x_RD.to("meta"), weight_EDF.to("meta"))
    assert on_meta.name == "compiled"
