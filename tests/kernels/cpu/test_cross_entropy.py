"""Cross-entropy in C equals PyTorch's."""

import pytest
import torch
from torch import nn

from switchlm.kernels import select
from switchlm.kernels.cpu import cross_entropy, native
from switchlm.kernels.cpu.cross_entropy import misfit, token_losses

pytestmark = pytest.mark.skipif(native.native().library is None, reason=native.native().reason)


def outcome(logits_NV, targets_N, weight_N, function):
    logits_NV = logits_NV.clone().requires_grad_()
    loss_N = function(logits_NV, targets_N)
    return loss_N, torch.autograd.grad(loss_N, logits_NV, weight_N.to(loss_N.dtype))[0]


def plain(logits_NV, targets_N):
    return nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")


@pytest.mark.parametrize("shape", [(1, 16), (7, 48), (300, 384), (1000, 1024)], ids=str)
@pytest.mark.parametrize("scale", [0.1, 5.0, 60.0])
def test_equals_float64(shape, scale):
    torch.manual_seed(0)
    logits_NV, weight_N = torch.randn(shape) * scale, torch.randn(shape[0])
    targets_N = torch.randint(shape[1], shape[:1])
    targets_N[0] = -100
    assert misfit(logits_NV, targets_N) is None
    found = outcome(logits_NV, targets_N, weight_N, token_losses)
    expected = outcome(logits_NV.double(), targets_N, weight_N, plain)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=2e-6, atol=2e-6 * scale)
    assert found[0][0] == 0
    assert not found[1][0].any()


def test_the_number_of_threads_changes_no_bit():
    torch.manual_seed(0)
    logits_NV, targets_N = torch.randn(900, 384), torch.randint(384, (900,))
    assert logits_NV.numel() >= cross_entropy._LEAST_LOGITS
    results, threads = [], torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append(outcome(logits_NV, targets_N, torch.ones(900), token_losses))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_numbers_that_are_not_finite_stay_so_in_their_row():
    logits_NV, targets_N = torch.zeros(4, 32), torch.tensor([3, 3, 3, 3])
    logits_NV[0, 20] = torch.nan
    logits_NV[1, 20] = torch.inf
    logits_NV[2, 20] = -torch.inf
    loss_N, change_NV = outcome(logits_NV, targets_N, torch.ones(4), token_losses)
    expected_N, expected_NV = outcome(logits_NV, targets_N, torch.ones(4), plain)
    assert loss_N[:2].isfinite().logical_not().all()
    torch.testing.assert_close(loss_N[2:], expected_N[2:])
    torch.testing.assert_close(change_NV[2:], expected_NV[2:])


def test_large_logits_keep_precision():
    """The logarithm of a sum would be rounded away next to a logit of 1e8."""
    logits_NV = torch.full((1, 16), 1e8)
    loss_N, change_NV = outcome(logits_NV, torch.tensor([3]), torch.ones(1), token_losses)
    expected_N, expected_NV = outcome(logits_NV, torch.tensor([3]), torch.ones(1), plain)
    torch.testing.assert_close(loss_N, expected_N)
    torch.testing.assert_close(change_NV, expected_NV)


def test_losses_may_be_changed_in_place():
    losses_N = token_losses(torch.randn(4, 32, requires_grad=True), torch.zeros(4).long())
    losses_N *= 2
    losses_N.sum().backward()


@pytest.mark.parametrize("target", [-1, 32, -101])
def test_a_target_out_of_range_is_an_error_with_its_value(target):
    with pytest.raises(IndexError, match=f"Target {target} is out of bounds of 32"):
        token_losses(torch.zeros(3, 32), torch.tensor([0, target, 1]))


def test_unsupported_inputs_run_by_pytorch():
    logits_NV, targets_N = torch.randn(5, 40), torch.randint(40, (5,))
    assert misfit(logits_NV, targets_N)
    assert torch.equal(select.token_losses(logits_NV, targets_N), plain(logits_NV, targets_N))
    assert misfit(torch.randn(5, 32).to(torch.bfloat16), targets_N)
    assert misfit(torch.randn(32, 5).t(), targets_N)
