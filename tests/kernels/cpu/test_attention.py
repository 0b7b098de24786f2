import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from switchlm.kernels.cpu import attention
from switchlm.kernels.cpu.attention import biased_attention


def plain(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    return (query @ key.mT + bias).softmax(-1) @ value


def scene(
    rows: int, heads: int, queries: int, keys: int, bias_shape: tuple[int, int]
) -> list[Tensor]:
    """Query, key, value as heads of [B, S, H * K], and the bias: all with gradients."""
    sizes = (queries, keys, keys)
    tensors = [torch.randn(rows, size, heads, 3).transpose(1, 2) for size in sizes]
    tensors.append(torch.randn(*bias_shape, queries, keys))
    return [tensor.requires_grad_() for tensor in tensors]


def agree(inputs: list[Tensor]) -> None:
    gradient = torch.randn(inputs[0].shape)
    results = []
    for function in (plain, biased_attention):
        y = function(*inputs)
        results.append([y, *torch.autograd.grad(y, inputs, gradient)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@given(
    st.integers(1, 20),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 6),
    st.booleans(),
    st.booleans(),
    st.integers(1, 1000),
)
def test_equals_the_plain_steps_with_gradients(
    rows: int, heads: int, queries: int, keys: int, a_row: bool, a_head: bool, cached: int
) -> None:
    torch.manual_seed(0)
    bias_shape = (rows if a_row else 1, heads if a_head else 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "CACHED_SCORES", cached)  # blocks of one row and of all
        agree(scene(rows, heads, queries, keys, bias_shape))


def test_threads_change_no_bit() -> None:
    torch.manual_seed(0)
    inputs = scene(40, 2, 120, 120, (1, 2))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            y = biased_attention(*inputs)
            results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
        finally:
            torch.set_num_threads(1)
    for one, two, three in zip(*results, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_gradients_that_are_expanded_or_not_contiguous() -> None:
    torch.manual_seed(0)
    inputs = scene(3, 2, 4, 5, (1, 2))
    biased_attention(*inputs).sum().backward()
    plain_inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    plain(*plain_inputs).sum().backward()
    for mine, other in zip(inputs, plain_inputs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_a_row_that_may_see_nothing_takes_the_mean() -> None:
    query, key, value, _ = scene(2, 1, 3, 4, (1, 1))
    nothing = torch.full((1, 1, 3, 4), torch.finfo(torch.bfloat16).min)
    y = biased_attention(query, key, value, nothing)
    torch.testing.assert_close(y, value.mean(2, keepdim=True).expand_as(y))


def test_an_empty_batch() -> None:
    inputs = scene(0, 2, 3, 4, (1, 2))
    y = biased_attention(*inputs)
    assert y.shape == (0, 2, 3, 3)
    y.sum().backward()
    assert inputs[3].grad is not None
    assert inputs[3].grad.eq(0).all()


def test_fits_plain_float32_tensors_in_main_memory() -> None:
    x, bias = torch.randn(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, requires_grad=True)

    def misfit(query: torch.Tensor, bias: torch.Tensor) -> str | None:
        return attention.biased_misfit(query, query, query, bias)

    assert misfit(x, bias) is None
    assert misfit(x, x) == "no bias learns"
    assert misfit(x.bfloat16(), bias)
    assert misfit(x, bias.double())
    assert misfit(x.to("meta"), bias)
    assert misfit(torch.nn.Parameter(x), bias), "a parameter, or any other subclass"
