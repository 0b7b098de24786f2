import pytest
import torch

from switchlm.compression.calibrate import calibrate, recording, run_text
from switchlm.compression.quantise import quantise_all, round_to_nearest
from switchlm.evaluation.evaluator import held_out_loss
from switchlm.huggingface.quantised import Quantisation
from switchlm.model.config import Initialisation
from switchlm.model.experts import FeedForwardExperts
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


def test_the_model_becomes_what_the_codes_stand_for(made, batches):
    model = made()
    found = calibrate(model, batches, Quantisation(bits=4))
    assert not any(isinstance(part, QuantisedExperts) for part in model.modules())
    loss = held_out_loss(model, batches, ("text",))["loss"]
    quantised = held_out_loss(found.codes.model(model), batches, ("text",))["loss"]
    assert abs(loss - quantised) < 0.01


def test_experts_that_saw_few_rows_are_rounded_and_named(made, batches):
    model = made()
    for block in (model.encoder.blocks[1], model.decoder.blocks[1]):
        # All tokens go to the first expert: its row of the router is the mean of what comes.
        block.feedforward.router.weight.data.zero_()
    expected = quantise_all(model, Quantisation(bits=4), round_to_nearest(Quantisation(bits=4)))
    found = calibrate(model, batches, Quantisation(bits=4))
    assert len(found.too_few) == 6
    assert "encoder.blocks.1.feedforward.experts.1" in found.too_few
    for key in ("encoder.blocks.1.feedforward.experts.up",):
        mine, theirs = found.codes._tensors[key], expected._tensors[key]
        assert torch.equal(mine[1:], theirs[1:])
        assert not torch.equal(mine[0], theirs[0])


def test_stand_ins_see_each_row_once_and_leave_no_trace(made, batches):
    model = made()
    place = "encoder.blocks.1.feedforward.experts"
    with recording(model, [place]) as stand_ins:
        run_text(model, batches)
        assert sum(len(stand_ins[place].rows(expert)) for expert in range(4)) == 2 * 8 * 32
    assert isinstance(model.get_submodule(place), FeedForwardExperts)
