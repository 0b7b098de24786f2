"""The linear map of small models, against PyTorch's, gradients too."""

import pytest
import torch
from torch import nn

from switchlm.kernels.cpu import native, small_matmul
from switchlm.kernels.select import linear

pytestmark = pytest.mark.skipif(native.native().library is None, reason=native.native().reason)


def make(shape, outputs):
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    weight_NK = torch.randn(outputs, shape[-1], requires_grad=True)
    return x, weight_NK, torch.randn(*shape[:-1], outputs)


@pytest.mark.parametrize(
    ("shape", "outputs"),
    [((1, 16), 16), ((7, 48), 32), ((3, 70, 32), 384), ((2, 1100, 32), 32), ((2, 5, 64), 16)],
    ids=str,
)
def test_equals_float64_with_gradients(shape, outputs):
    x, weight_NK, dy = make(shape, outputs)
    assert small_matmul.misfit(x, weight_NK) is None
    y = linear(x, weight_NK)
    found = (y, *torch.autograd.grad(y, [x, weight_NK], dy))
    wide = nn.functional.linear(x.double(), weight_NK.double())
    expected = (wide, *torch.autograd.grad(wide, [x, weight_NK], dy.double()))
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), other.double(), rtol=1e-5, atol=1e-4)


def test_only_needed_gradients_are_computed():
    x, weight_NK, dy = make((5, 32), 48)
    for wanted in (x, weight_NK):
        other = weight_NK if wanted is x else x
        other.requires_grad_(False)
        y = linear(x, weight_NK)
        (found,) = torch.autograd.grad(y, [wanted], dy)
        expected = dy @ weight_NK if wanted is x else dy.t() @ x
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
        other.requires_grad_(True)


def test_gradients_need_not_be_contiguous():
    x, weight_NK, _ = make((6, 32), 16)
    dy = torch.ones(()).expand(6, 16)
    (found,) = torch.autograd.grad(linear(x, weight_NK), [x], dy)
    torch.testing.assert_close(found, dy @ weight_NK)


def test_large_maps_and_other_dtypes_run_by_pytorch():
    x, weight_NK, _ = make((4, 512), 512)
    assert small_matmul.misfit(x, weight_NK)
    x, weight_NK, _ = make((4, 32), 16)
    assert small_matmul.misfit(x, weight_NK) is None
    assert small_matmul.misfit(x.bfloat16(), weight_NK.bfloat16())
    assert small_matmul.misfit(x[:, :16], weight_NK[:, :16])
    with torch.no_grad():
        assert small_matmul.misfit(x, weight_NK)
    with torch.autocast("cpu", torch.bfloat16):
        assert small_matmul.misfit(x, weight_NK)


def test_the_choice_does_not_depend_on_the_number_of_threads():
    x, weight_NK, _ = make((4096, 32), 32)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            assert small_matmul.misfit(x, weight_NK) is None
            results.append(linear(x, weight_NK))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)
