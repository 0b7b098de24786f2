"""Tensors that C code may not read are PyTorch's, which computes or raises the error."""

import pytest
import torch
from torch import nn

from switchlm.kernels.cpu import attention, native
from switchlm.kernels.cpu.native import misfit
from switchlm.kernels.permute import sort_by_expert
from switchlm.kernels.select import attention as attend
from switchlm.kernels.select import linear, token_losses
from switchlm.model.config import RouterConfig
from switchlm.model.layers import RMSNorm
from switchlm.model.switch import SwitchFeedForward

pytestmark = pytest.mark.skipif(native.native().library is None, reason=native.native().reason)
DROPLESS = RouterConfig(capacity_factor=None, evaluation_capacity_factor=None, exploration="argmax")


def layer():
    torch.manual_seed(0)
    return SwitchFeedForward(64, 64, 4, router=DROPLESS)


@pytest.mark.parametrize("width", [32, 128])
def test_inputs_of_another_width_raise(width):
    x_BSD = torch.randn(2, 16, width)
    for module in (layer(), RMSNorm(64)):
        with pytest.raises(RuntimeError):
            module(x_BSD)
    with pytest.raises(RuntimeError):
        linear(x_BSD, torch.randn(16, 64, requires_grad=True))


def test_a_mask_of_integers_raises():
    with pytest.raises(RuntimeError):
        layer()(torch.randn(2, 16, 64), torch.ones(2, 16, dtype=torch.int64))


def test_a_mask_that_is_too_short_raises():
    with pytest.raises((RuntimeError, IndexError)):
        layer()(torch.randn(2, 16, 64), torch.ones(2, 8, dtype=torch.bool))


def test_targets_of_another_number_raise():
    with pytest.raises(ValueError):
        token_losses(torch.zeros(8, 32), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype):
    module, x_BSD = layer(), torch.randn(2, 16, 64)
    bias = torch.randn(1, 4, 16, 16, requires_grad=True)
    targets_N = torch.randint(64, (32,))

    def everything():
        x = x_BSD.clone().requires_grad_()
        y_BSD, routing = module(RMSNorm(64, 1e-6).to(torch.float32)(x))
        heads_BHSK = y_BSD.unflatten(2, (4, 16)).transpose(1, 2)
        y_BSD = attend(heads_BHSK, heads_BHSK, heads_BHSK, bias, 0.0)
        loss = token_losses(y_BSD.flatten(0, 1), targets_N).sum() + routing.balance_loss
        return loss.detach(), *torch.autograd.grad(loss, [x, bias, *module.parameters()])

    expected = everything()
    try:
        torch.set_default_dtype(dtype)
        found = everything()
    finally:
        torch.set_default_dtype(torch.float32)
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)


def test_another_default_device_changes_nothing():
    module, x_BSD = layer(), torch.randn(2, 16, 64)
    expected, _ = module(x_BSD)
    with torch.device("meta"):
        found, _ = module(x_BSD)
    assert torch.equal(found, expected)


def test_one_sequence_of_keys_for_several_rows_is_pytorchs():
    """PyTorch broadcasts over the batch; C would read rows that are not there."""
    torch.manual_seed(0)
    query_BHQK = torch.randn(4, 2, 5, 16)
    key_BHMK, value_BHMK = torch.randn(2, 1, 2, 7, 16)
    assert attention.misfit(query_BHQK, key_BHMK, value_BHMK, None)
    found = attend(query_BHQK, key_BHMK, value_BHMK, None, 0.0)
    whole = [x.expand(4, -1, -1, -1).contiguous() for x in (key_BHMK, value_BHMK)]
    torch.testing.assert_close(found, attend(query_BHQK, *whole, None, 0.0))


@pytest.mark.parametrize("shape", [(1, 2, 5, 6), (3, 2, 5, 7), (1, 3, 5, 7), (2, 5, 7)], ids=str)
def test_biases_of_other_shapes_are_not_taken(shape):
    query, key = torch.randn(2, 2, 5, 16), torch.randn(2, 2, 7, 16)
    assert attention.misfit(query, key, key, torch.zeros(1, 2, 5, 7)) is None
    assert attention.misfit(query, key, key, torch.zeros(shape))


def test_a_bias_for_all_queries_that_learns_is_not_taken():
    query, key = torch.randn(2, 2, 5, 16), torch.randn(2, 2, 7, 16)
    bias = torch.zeros(1, 2, 1, 7)
    assert attention.misfit(query, key, key, bias) is None
    assert attention.misfit(query, key, key, bias.requires_grad_())


def test_what_was_kept_must_be_as_long_as_the_experts():
    with pytest.raises(RuntimeError):
        sort_by_expert(torch.zeros(6, dtype=torch.int64), torch.ones(4, dtype=torch.bool), 2)


def test_nothing_is_read_while_tracing_or_in_a_transform():
    x = torch.randn(4, 32)
    assert misfit(x) is None
    assert misfit(x, dtype=torch.float64)
    assert misfit(x.to("meta"))
    seen = []

    def look(y):
        seen.append(misfit(y) is None)
        return y * 2

    torch.jit.trace(look, x, check_trace=False)
    torch.func.vmap(look)(x)
    torch.func.jvp(look, (x,), (x,))
    assert not any(seen)


def test_a_traced_norm_computes_what_it_did():
    norm = RMSNorm(32)
    with torch.no_grad():
        traced = torch.jit.trace(norm, torch.randn(80, 32))
        x = torch.randn(80, 32)
        torch.testing.assert_close(traced(x), nn.functional.rms_norm(x, (32,), norm.weight, 1e-6))
