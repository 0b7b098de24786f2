"""Matmul in 16 bits is upcast on processors without instructions for it."""

import pytest
import torch

from switchlm.kernels import reference, select
from switchlm.kernels.cpu import small_matmul
from switchlm.kernels.cpu.grouped import matmul_into
from switchlm.kernels.cpu.quantised import Int4Matrix, pack_int4

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def without_instructions(monkeypatch):
    monkeypatch.setattr(small_matmul, "is_slow", lambda dtype: dtype in small_matmul.DTYPES)


def roundings(dtype):
    """How far apart two roundings of one number may be, relatively."""
    return {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-3}


def test_float32_is_never_slow(monkeypatch):
    monkeypatch.undo()
    assert not small_matmul.is_slow(torch.float32)
    assert isinstance(small_matmul.is_slow(torch.bfloat16), bool)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_maps_and_their_gradients(dtype):
    x, weight = (
        torch.randn(*shape).to(dtype).requires_grad_() for shape in ((3, 70, 64), (96, 64))
    )
    wide_x, wide_weight = (t.detach().float().requires_grad_() for t in (x, weight))
    y, expected = select.linear(x, weight), torch.nn.functional.linear(wide_x, wide_weight)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, **roundings(dtype))
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy.float())
    for ours, theirs in ((x, wide_x), (weight, wide_weight)):
        assert ours.grad.dtype == dtype
        torch.testing.assert_close(ours.grad.float(), theirs.grad, rtol=0.02, atol=0.02)


def test_autocast_rounds_as_pytorch_does():
    x, weight = torch.randn(70, 64), torch.randn(96, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = select.linear(x, weight), torch.nn.functional.linear(x, weight)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, **roundings(torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [False, True])
def test_matmul_of_an_expert(dtype, add):
    a, b, y = (torch.randn(*shape).to(dtype) for shape in ((70, 64), (64, 96), (70, 96)))
    product = a.float() @ b.float()
    expected = (y.float() + product if add else product).to(dtype)
    found = matmul_into(a, b, y, add=add)
    assert found is y
    torch.testing.assert_close(found, expected, **roundings(dtype))


def test_experts_equal_the_reference():
    counts_E = torch.tensor([40, 0, 25])
    x, weight = torch.randn(65, 64).bfloat16(), torch.randn(3, 64, 96).bfloat16()
    weight.requires_grad_()
    found = select.grouped_matmul(x, weight, counts_E)
    expected = reference.grouped_matmul(x, weight, counts_E)
    torch.testing.assert_close(found, expected, **roundings(torch.bfloat16))


def test_many_rows_of_4_bits():
    codes_NK = torch.randint(0, 16, (64, 128))
    scale_GN2 = torch.tensor([0.5, 1.0]).bfloat16().expand(4, 64, 2).contiguous()
    matrix = Int4Matrix(pack_int4(codes_NK), scale_GN2, 64)
    x_RK = torch.randn(100, 128)
    expected = x_RK.bfloat16().float() @ matrix.dequantise().t()
    torch.testing.assert_close(matrix(x_RK), expected, rtol=1e-5, atol=1e-3)
