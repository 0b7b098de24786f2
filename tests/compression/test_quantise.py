import pytest
import torch

from switchlm.compression.quantise import round_to_nearest
from switchlm.errors import CheckpointError
from switchlm.huggingface.names import Entry
from switchlm.huggingface.quantised import Quantisation
from switchlm.kernels.cpu.quantised import matrix


def quantised(weight_NK, **fields):
    quantise = round_to_nearest(Quantisation(**fields))
    codes, scale = quantise(Entry("up", "wi", tuple(weight_NK.shape), 0), weight_NK)
    return matrix(codes, scale, weight_NK.shape[0]).dequantise()


def test_int8_is_within_half_a_step_of_each_output():
    weight_NK = torch.randn(40, 96) * torch.logspace(-2, 2, 40)[:, None]
    weight_NK[5] = 0
    step_N = weight_NK.abs().amax(1) / 127
    error_NK = (quantised(weight_NK, bits=8) - weight_NK).abs()
    assert (error_NK <= 0.501 * step_N[:, None]).all()


@pytest.mark.parametrize("group_size", [32, 64])
def test_int4_is_within_half_a_step_of_each_group(group_size):
    weight_NK = torch.randn(70, 128) + torch.linspace(-1, 1, 70)[:, None]
    weight_NK[3] = 0
    low, high = weight_NK.unflatten(1, (-1, group_size)).aminmax(dim=2)
    step_NK = ((high - low) / 15).repeat_interleave(group_size, 1)
    error_NK = (quantised(weight_NK, bits=4, group_size=group_size) - weight_NK).abs()
    # Scale and offset are bfloat16: a hundredth of the largest absolute weight.
    slack_NK = 0.01 * weight_NK.abs().amax(1, keepdim=True)
    assert (error_NK <= 0.5 * step_NK + slack_NK).all()
    assert not quantised(weight_NK, bits=4, group_size=group_size)[3].any()


@pytest.mark.parametrize("constant", [0.01, -0.3, 1.0, 1000.0])
def test_a_group_of_equal_weights_keeps_them(constant):
    weight_NK = torch.randn(70, 128)
    weight_NK[3, 64:] = constant
    found_K = quantised(weight_NK, bits=4, group_size=64)[3, 64:]
    assert found_K.tolist() == pytest.approx([constant] * 64, rel=2**-8)


def test_smaller_groups_are_nearer():
    weight_NK = torch.randn(64, 256)
    errors = [
        (quantised(weight_NK, bits=4, group_size=size) - weight_NK).square().mean()
        for size in (32, 64, 128, 256)
    ]
    assert errors == sorted(errors)


def test_weights_that_are_not_finite_are_refused():
    weight_NK = torch.randn(4, 32)
    weight_NK[1, 2] = torch.nan
    with pytest.raises(CheckpointError, match="not finite"):
        quantised(weight_NK, bits=8)
