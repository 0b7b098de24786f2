import pytest
import torch
from torch import Tensor, nn

from switchlm.kernels.cpu import native, norm
from switchlm.kernels.select import rms_norm


def both(x: Tensor, weight: Tensor, gradient: Tensor) -> list[list[Tensor]]:
    results = []
    for function in (
        lambda: rms_norm(x, weight, 1e-6),
        lambda: nn.functional.rms_norm(x, weight.shape, weight, 1e-6),
    ):
        y = function()
        results.append([y, *torch.autograd.grad(y, [x, weight], gradient)])
    return results


@pytest.mark.parametrize(
    "shape", [(7, 5), (2, 3, 16), (4,), (0, 8), (2, 0, 8), (32,), (0, 16), (3, 200, 48)]
)
def test_equals_the_formula_with_gradients(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    weight = torch.rand(shape[-1], requires_grad=True)
    for mine, other in zip(*both(x, weight, torch.randn(shape)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_strided_inputs_and_gradients() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 4, 3).transpose(0, 2).requires_grad_()
    weight = torch.rand(6, requires_grad=True)
    for mine, other in zip(*both(x, weight, torch.ones(()).expand(x.shape)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_large_and_small_inputs() -> None:
    x = torch.tensor([[1e15, -1e15], [1e-20, 1e-20], [0.0, 0.0]])
    y = rms_norm(x, torch.ones(2), 1e-6)
    torch.testing.assert_close(y, nn.functional.rms_norm(x, (2,), torch.ones(2), 1e-6))


def test_autocast_changes_nothing() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(9, 8, requires_grad=True), torch.rand(8, requires_grad=True)
    expected = torch.autograd.grad(rms_norm(x, weight, 1e-6).square().sum(), [x, weight])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = rms_norm(x, weight, 1e-6)
        got = torch.autograd.grad(y.square().sum(), [x, weight])
    assert y.dtype == torch.float32
    for mine, other in zip(got, expected, strict=True):
        assert torch.equal(mine, other)


def test_a_compiled_model_takes_the_formula() -> None:
    x = torch.randn(3, 8)
    compiled = torch.compile(rms_norm, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, torch.ones(8), 1e-6), rms_norm(x, torch.ones(8), 1e-6))


def test_every_vector_width(build) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 300, 48, requires_grad=True), torch.rand(48, requires_grad=True)
    gradient = torch.randn(x.shape)
    assert norm.misfit(x, weight) is None
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, 1e-6), norm._RMSNorm.apply(x, weight, 1e-6))
    found = both(x, weight, gradient)[0]
    x64, weight64 = (tensor.detach().double().requires_grad_() for tensor in (x, weight))
    y64 = nn.functional.rms_norm(x64, weight64.shape, weight64, 1e-6)
    expected = [y64, *torch.autograd.grad(y64, [x64, weight64], gradient.double())]
    for mine, other in zip(found, expected, strict=True):
        size = other.abs().max().item()
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-6 * size)


def test_threads_change_no_bit(build) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5000, 32, requires_grad=True), torch.rand(32, requires_grad=True)
    gradient = torch.randn(x.shape)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            results.append(both(x, weight, gradient)[0])
        finally:
            torch.set_num_threads(1)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_misfit(monkeypatch) -> None:
    x, weight = torch.randn(3, 32), torch.ones(32)
    assert norm.misfit(x[:, :20].contiguous(), weight[:20])
    assert norm.misfit(torch.randn(32, 32).t(), weight)
    assert norm.misfit(x.double(), weight)
    assert norm.misfit(x[:0], weight)
    monkeypatch.setattr(native, "native", lambda: native.Native(None, "none"))
    assert norm.misfit(x, weight)
