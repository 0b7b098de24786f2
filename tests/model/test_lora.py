import pytest
import torch

from switchlm.errors import ConfigError
from switchlm.model import lora
from switchlm.model.config import ModelConfig, RouterConfig
from switchlm.model.experts import FeedForwardExperts
from switchlm.model.losses import cross_entropy
from switchlm.model.transformer import SwitchTransformer, shift_right

SHAPES = {
    "relu": {},
    "gated": {"activation": "gelu", "gated": True, "tied_head": False},
    "attention": {"attention_experts": True},
    "dense": {"num_experts": 0},
}


def build(seed=0, **changes):
    torch.manual_seed(seed)
    shape = {
        "vocabulary_size": 32, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 2,
        "num_encoder_layers": 2, "num_decoder_layers": 2, "num_experts": 3,
        "router": RouterConfig(exploration="argmax"),
    }  # fmt: skip
    return SwitchTransformer(ModelConfig(**{**shape, **changes}))


def adapted(rank=2, alpha=3.0, **changes):
    """A model whose adapters have learnt something."""
    model = build(**changes)
    lora.apply(model, rank, alpha)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for pair in lora.adapters(model).values():
            pair.normal_(std=0.3, generator=noise)
    return model


def tokens():
    draw = torch.Generator().manual_seed(2)
    inputs_BS, targets_BT = (torch.randint(2, 32, (4, n), generator=draw) for n in (9, 7))
    return inputs_BS, targets_BT


def loss_of(model):
    inputs_BS, targets_BT = tokens()
    output = model(inputs_BS, shift_right(targets_BT, None, 0))
    return cross_entropy(output.logits_BTV, targets_BT)[0], output.logits_BTV


@pytest.mark.parametrize("shape", SHAPES)
def test_the_merged_model_equals_the_adapted_one(shape):
    model = adapted(**SHAPES[shape]).eval()
    plain = lora.merged(model)
    assert plain.state_dict().keys() == build(**SHAPES[shape]).state_dict().keys()
    with torch.no_grad():
        expected, found = loss_of(model)[1], loss_of(plain)[1]
        before = loss_of(build(**SHAPES[shape]).eval())[1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - before).abs().max() > 0.01, "the adapters do nothing"


@pytest.mark.parametrize("shape", SHAPES)
def test_an_adapted_model_equals_its_base_before_training(shape):
    model = build(**SHAPES[shape])
    expected = loss_of(model)[1]
    lora.apply(model, 4, 8.0)
    torch.testing.assert_close(loss_of(model)[1], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_the_dense_weight(shape):
    """dA = s dW B^T and dB = s A^T dW, with dW from the plain model of merged weights."""
    model = adapted(**SHAPES[shape])
    plain = lora.merged(model)
    loss_of(model)[0].backward()
    loss_of(plain)[0].backward()
    scale = 3.0 / 2
    seen = 0
    for name, module in model.named_modules():
        if isinstance(module, lora.AdaptedLinear):
            (dw,) = (plain.get_submodule(name).weight.grad,)
            a, b = module.a.weight, module.b.weight
            pairs = [(a, scale * b.T @ dw), (b, scale * dw @ a.T)]
        elif isinstance(module, lora.AdaptedExperts):
            pairs = []
            for weight, pair in module.pairs.items():
                dw = getattr(plain.get_submodule(name), weight).grad
                pairs += [(pair.a, scale * dw @ pair.b.mT), (pair.b, scale * pair.a.mT @ dw)]
        else:
            continue
        for parameter, expected in pairs:
            seen += 1
            torch.testing.assert_close(parameter.grad, expected, atol=2e-5, rtol=1e-4)
    assert seen == len(lora.adapters(model)) > 20


def test_only_the_pairs_have_gradients():
    model = adapted()
    loss_of(model)[0].backward()
    pairs = lora.adapters(model)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (name in pairs), name


def test_expert_dropout_still_acts():
    experts = FeedForwardExperts(16, 16, 2, dropout=0.5)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight)
    experts = lora.AdaptedExperts(experts, 2, 1.0)
    for pair in experts.pairs.values():
        torch.nn.init.zeros_(pair.a), torch.nn.init.zeros_(pair.b)
    x_RD, counts_E = torch.randn(8, 16), torch.tensor([4, 3])
    assert not torch.equal(experts(x_RD, counts_E), experts(x_RD, counts_E))
    experts.eval()
    assert torch.equal(experts(x_RD, counts_E), experts(x_RD, counts_E))
    assert not experts(x_RD, counts_E)[7].any(), "rows past the counts are zeros"


def test_the_seed_decides_the_pairs():
    one, other = build(), build()
    lora.apply(one, 4, 8.0, seed=1), lora.apply(other, 4, 8.0, seed=2)
    pairs, others = lora.adapters(one), lora.adapters(other)
    assert pairs.keys() == others.keys()
    differ = {name for name in pairs if not torch.equal(pairs[name], others[name])}
    assert differ == {name for name in pairs if name.removesuffix(".weight").endswith(".a")}
    stack_EDK = pairs["encoder.blocks.1.feedforward.experts.pairs.up.a"]
    assert stack_EDK.shape == (3, 16, 4)
    assert not torch.equal(stack_EDK[0], stack_EDK[1])


def test_memory_of_what_has_no_adapter_is_shared():
    model = adapted()
    plain = lora.merged(model)
    assert plain.embedding.weight.data_ptr() == model.embedding.weight.data_ptr()


def test_a_rank_larger_than_a_width_is_refused():
    with pytest.raises(ConfigError, match=r"rank 17 .* larger than 16, a width of encoder\.blocks"):
        lora.apply(build(), 17, 8.0)
