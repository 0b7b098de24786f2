import pytest
import torch

from switchlm.compression.gptq import gptq
from switchlm.compression.quantise import round_to_nearest
from switchlm.huggingface.names import Entry
from switchlm.huggingface.quantised import Quantisation
from switchlm.kernels.cpu.quantised import matrix


def correlated(rows, inputs):
    """Rows that lie near a plane of few dims, as activations do."""
    return torch.randn(rows, 12) @ torch.randn(12, inputs) + 0.1 * torch.randn(rows, inputs)


@pytest.mark.parametrize(("bits", "size"), [(8, 64), (4, 32), (4, 64), (4, 256)])
def test_outputs_are_nearer_than_by_rounding(bits, size):
    torch.manual_seed(0)
    weight_NK, rows_RK = torch.randn(70, 256), correlated(600, 256)
    quantisation = Quantisation(bits=bits, group_size=size)
    entry = Entry("up", "wi", (70, 256), 0)
    plain = matrix(*round_to_nearest(quantisation)(entry, weight_NK), 70).dequantise()
    found = gptq(weight_NK, rows_RK.t() @ rows_RK, quantisation)
    better = matrix(*found, 70).dequantise()
    fresh_RK = correlated(1, 256)
    assert fresh_RK.shape == (1, 256)
    errors = [(rows_RK @ (one - weight_NK).t()).square().mean() for one in (plain, better)]
    assert errors[1] < 0.5 * errors[0]


def test_without_correlation_it_is_rounding_to_nearest():
    torch.manual_seed(0)
    weight_NK = torch.randn(64, 64)
    quantisation = Quantisation(bits=8)
    entry = Entry("up", "wi", (64, 64), 0)
    plain = round_to_nearest(quantisation)(entry, weight_NK)
    found = gptq(weight_NK, torch.eye(64), quantisation)
    assert all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))


def test_a_group_of_equal_weights_keeps_them():
    torch.manual_seed(0)
    weight_NK, rows_RK = torch.randn(64, 128), correlated(600, 128)
    weight_NK[3] = 0.01
    found = gptq(weight_NK, rows_RK.t() @ rows_RK, Quantisation(bits=4))
    row_K = matrix(*found, 64).dequantise()[3]
    assert row_K.tolist() == pytest.approx([0.01] * 128, rel=0.01)


def test_rows_that_tell_nothing_give_nothing():
    quantisation = Quantisation(bits=8)
    assert gptq(torch.randn(4, 8), torch.zeros(8, 8), quantisation) is None
    assert gptq(torch.randn(4, 8), torch.full((8, 8), torch.nan), quantisation) is None


def test_a_dead_input_does_no_harm():
    rows_RK = torch.randn(200, 64)
    rows_RK[:, 5] = 0
    weight_NK = torch.randn(64, 64)
    codes, scale = gptq(weight_NK, rows_RK.t() @ rows_RK, Quantisation(bits=4))
    found = matrix(codes, scale, 64).dequantise()
    assert found.isfinite().all()
    assert (found - weight_NK).abs().max() < 1
