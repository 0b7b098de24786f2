import pytest
import torch

from switchlm.compression import calibrate as calibrate_module
from switchlm.compression.calibrate import calibrate, gptq
from switchlm.compression.quantise import quantise_all, round_to_nearest
from switchlm.evaluation.evaluator import held_out_loss
from switchlm.huggingface.names import Entry
from switchlm.huggingface.quantised import Quantisation
from switchlm.kernels.cpu.quantised import matrix
from switchlm.model.config import Initialisation
from switchlm.model.quantised import QuantisedExperts
from switchlm.model.transformer import shift_right


def logits(model, batches):
    batch = batches[0]
    with torch.no_grad():
        return model(batch.inputs_BS, shift_right(batch.targets_BT, None, 0)).logits_BTV


@pytest.mark.parametrize("what", ["experts", "all"])
@pytest.mark.parametrize("changes", [
    {}, {"gated": True, "activation": "gelu"}, {"attention_experts": True},
])  # fmt: skip
def test_outputs_change_less_than_by_rounding(made, batches, what, changes):
    quantisation = Quantisation(bits=4, what=what)
    # A single expert, so that no token changes its expert by a hair.
    model = made(initialisation=Initialisation(scale=1.0), num_experts=1, **changes)
    before = logits(model, batches)
    rounded = quantise_all(model, quantisation, round_to_nearest(quantisation)).model(model)
    found = calibrate(model, batches, quantisation)
    calibrated = found.codes.model(model)
    assert found.num_matrices > 0
    errors = [
        (logits(one, batches) - before).square().mean().item() for one in (rounded, calibrated)
    ]
    assert errors[1] < errors[0]


def test_the_weights_become_the_dequantised_ones(made, batches):
    model = made()
    found = calibrate(model, batches, Quantisation(bits=4))
    assert not any(isinstance(part, QuantisedExperts) for part in model.modules())
    loss = held_out_loss(model, batches, ("text",))["loss"]
    quantised = held_out_loss(found.codes.model(model), batches, ("text",))["loss"]
    assert abs(loss - quantised) < 0.01


def test_experts_with_few_rows_are_rounded_and_reported(made, batches):
    model = made()
    for block in (model.encoder.blocks[1], model.decoder.blocks[1]):
        # All tokens are routed to the first expert: its row of the router is their mean.
        block.feedforward.router.weight.data.zero_()
    expected = quantise_all(model, Quantisation(bits=4), round_to_nearest(Quantisation(bits=4)))
    found = calibrate(model, batches, Quantisation(bits=4))
    assert len(found.too_few) == 6
    assert "encoder.blocks.1.feedforward.experts.1" in found.too_few
    for key in ("encoder.blocks.1.feedforward.experts.up",):
        mine, theirs = found.codes._tensors[key], expected._tensors[key]
        assert torch.equal(mine[1:], theirs[1:])
        assert not torch.equal(mine[0], theirs[0])


def test_each_row_is_seen_once_and_no_more_than_a_batch_s_at_a_time(made, batches, monkeypatch):
    grams = []

    class Noted(calibrate_module.Gram):
        def __init__(self, width):
            super().__init__(width)
            grams.append(self)

        def add(self, x):
            assert x.numel() // x.shape[-1] <= 8 * 32
            super().add(x)

    monkeypatch.setattr(calibrate_module, "Gram", Noted)
    calibrate(made(), batches, Quantisation(bits=8))
    # Of the rows of each expert, and of its hidden ones: first the encoder's, then the decoder's.
    rows = [gram.num_rows for gram in grams]
    assert [sum(rows[start : start + 8]) for start in (0, 8)] == [2 * 2 * 8 * 32, 2 * 2 * 8 * 16]


def test_a_block_runs_as_often_however_deep_the_model(made, batches):
    runs = []
    for layers in (2, 6):
        model = made(num_encoder_layers=layers, num_decoder_layers=layers)
        last = model.encoder.blocks[-1].attention
        counted = []
        last.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        calibrate(model, batches, Quantisation(bits=8, what="all"))
        assert not any(part._forward_pre_hooks for part in model.modules())
        runs.append(len(counted))
    assert runs == [2 * len(batches)] * 2


def correlated(rows, inputs):
    """Rows near a subspace of few dims, as activations are."""
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


def test_a_singular_gram_matrix_gives_none():
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
