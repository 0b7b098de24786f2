"""A model whose features were scaled and back is quantised as well as the one it equals."""

import copy

import pytest
import torch

from switchlm.compression.quantise import quantise_all, round_to_nearest
from switchlm.compression.rescale import find_rescaling, rescale
from switchlm.huggingface.quantised import Quantisation, weights_of_model

MODELS = {
    "relu": {},
    "gated": {"gated": True, "activation": "gelu"},
    "dense": {"num_experts": 0},
    "switch attention": {"attention_experts": True, "tied_head": True},
}


def logits(model):
    draw = torch.Generator().manual_seed(1)
    tokens = (torch.randint(3, 259, (4, size), generator=draw) for size in (20, 10))
    with torch.no_grad():
        return model(*tokens).logits_BTV


def in_bits(model, bits):
    quantisation = Quantisation(bits=bits, group_size=32, what="all")
    return quantise_all(model, quantisation, round_to_nearest(quantisation)).model(model)


@torch.no_grad()
def distorted(model, factor):
    """Return the same function with a feature of every norm, hidden unit and value scaled."""
    model = copy.deepcopy(model)

    def scale_norm(norm, place, matrices):
        norm.weight[place] *= factor
        for weight in matrices:
            weight[..., place] /= factor

    def inputs_of(module):
        for name, weight in module.named_parameters():
            if name.endswith(("down", "down.weight", "output.weight")):
                continue
            stacked = weight.dim() == 3
            yield weight.mT if stacked else weight

    for stack in (model.encoder, model.decoder):
        for place, block in enumerate(stack.layers):
            scale_norm(block.attention_norm, place, inputs_of(block.attention))
            scale_norm(block.feedforward_norm, 5 + place, inputs_of(block.feedforward))
            if block.cross_attention is not None:
                scale_norm(block.cross_attention_norm, 9, [block.cross_attention.query.weight])
                block.cross_attention.value.weight[3] *= factor
                block.cross_attention.output.weight[:, 3] /= factor
            experts = getattr(block.feedforward, "experts", None)
            if experts is None:
                block.feedforward.up.weight[7] *= factor
                block.feedforward.down.weight[:, 7] /= factor
            else:
                experts.up[:, :, 7] *= factor
                experts.down[:, 7] /= factor
    crosses = [block.cross_attention for block in model.decoder.layers]
    scale_norm(
        model.encoder.final_norm,
        11,
        [part.weight for cross in crosses for part in (cross.key, cross.value)],
    )
    if model.head is not None:
        scale_norm(model.decoder.final_norm, 12, [model.head.weight])
    return model


@pytest.mark.parametrize("factor", [1000.0, 1e-3])
@pytest.mark.parametrize("name", MODELS)
def test_the_rescaled_model_is_the_same_and_loses_as_little(made, name, factor):
    plain = made(**{"tied_head": False, **MODELS[name]})
    model = distorted(plain, factor)
    expected = logits(model)
    torch.testing.assert_close(expected, logits(plain), rtol=1e-3, atol=1e-3)
    error = {bits: (logits(in_bits(plain, bits)) - expected).norm() for bits in (8, 4)}
    before = {bits: (logits(in_bits(model, bits)) - expected).norm() for bits in (8, 4)}
    assert rescale(model) > 0
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    for bits in (8, 4):
        lost = (logits(in_bits(model, bits)) - expected).norm()
        assert lost < 1.5 * error[bits]
        assert before[bits] > 3 * lost


@pytest.mark.parametrize("name", MODELS)
def test_an_ordinary_model_stays_as_it_is(made, name):
    model = made(**MODELS[name])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert rescale(model) == 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weights_may_come_in_any_order_and_one_at_a_time(made):
    model = distorted(made(), 1000.0)
    read = list(weights_of_model(model))
    found = find_rescaling(model.config, lambda: iter(read[::-1]))
    rescaled = [weight.clone() for _, weight in found.source(iter(read))]
    assert rescale(model) == found.num_features
    for (_, expected), weight in zip(weights_of_model(model), rescaled, strict=True):
        assert torch.equal(expected, weight)


@torch.no_grad()
def test_features_of_zeros_and_numbers_that_are_not_finite_are_left(made):
    model = distorted(made(), 1000.0)
    model.encoder.layers[0].attention_norm.weight[:] = 0
    model.encoder.layers[0].feedforward_norm.weight[1] = float("nan")
    model.decoder.layers[0].feedforward_norm.weight[2] = float("inf")
    assert rescale(model) > 0
    assert model.encoder.layers[0].attention_norm.weight.eq(0).all()
    assert model.decoder.layers[0].feedforward_norm.weight[2].isinf()
