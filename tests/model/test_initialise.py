"""The distribution of every kind of parameter (section 2.4, T5X)."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from switchlm.model.config import Initialisation, ModelConfig, RouterConfig
from switchlm.model.initialise import Initialiser
from switchlm.model.switch import SwitchFeedForward
from switchlm.model.transformer import SwitchTransformer

D, F, K, H, E, V, BUCKETS = 64, 128, 16, 8, 6, 500, 32
CONFIG = ModelConfig(
    vocabulary_size=V,
    d_model=D,
    d_ff=F,
    d_kv=K,
    num_heads=H,
    num_encoder_layers=2,
    num_decoder_layers=2,
    num_experts=E,
    gated=True,
    activation="gelu",
    tied_head=False,
    router=RouterConfig(balance="bias"),
)
S = 0.1
SWITCH, DENSE = "encoder.blocks.1.feedforward.", "encoder.blocks.0.feedforward."
ATTENTION = "decoder.blocks.0.cross_attention."
NORMAL = {
    "embedding.weight": 1.0,
    ATTENTION + "query.weight": math.sqrt(S / (D * K)),
    ATTENTION + "key.weight": math.sqrt(S / D),
    ATTENTION + "value.weight": math.sqrt(S / D),
    ATTENTION + "output.weight": math.sqrt(S / (H * K)),
    SWITCH + "router.weight": 0.02,
}
TRUNCATED = {
    "head.weight": math.sqrt(S / D),
    DENSE + "up.weight": math.sqrt(S / D),
    DENSE + "gate.weight": math.sqrt(S / D),
    DENSE + "down.weight": math.sqrt(S / F),
    SWITCH + "experts.up": math.sqrt(S / D),
    SWITCH + "experts.gate": math.sqrt(S / D),
    SWITCH + "experts.down": math.sqrt(S / F),
}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(SwitchTransformer(CONFIG).state_dict())


@pytest.mark.parametrize(("name", "std"), (NORMAL | TRUNCATED).items())
def test_standard_deviation(weights: dict[str, Tensor], name: str, std: float) -> None:
    weight = weights[name]
    tolerance = 4 / math.sqrt(2 * weight.numel())  # four standard errors
    assert weight.std().item() == pytest.approx(std, rel=tolerance)
    assert abs(weight.mean().item()) < 4 * std / math.sqrt(weight.numel())


@pytest.mark.parametrize("name", [*NORMAL, *TRUNCATED])
def test_truncated_at_two_standard_deviations_or_not(weights: dict[str, Tensor], name: str) -> None:
    std = (NORMAL | TRUNCATED)[name]
    # Truncated at two standard deviations of the normal distribution before truncation.
    limit = 2 * std / 0.8796256610342398
    assert (weights[name].abs().max().item() <= limit * 1.0001) == (name in TRUNCATED)


def test_relative_bias_is_uniform_by_fan_average(weights: dict[str, Tensor]) -> None:
    bound = math.sqrt(3 * S / ((BUCKETS + H) / 2))
    weight = weights["encoder.relative_bias.weight"]
    assert 0.9 * bound < weight.abs().max().item() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)


def test_norms_are_ones_and_selection_biases_zero(weights: dict[str, Tensor]) -> None:
    norms = [weight for name, weight in weights.items() if "norm" in name]
    assert len(norms) == 2 * 2 + 1 + 2 * 3 + 1
    assert all(weight.eq(1).all() for weight in norms)
    assert weights[SWITCH + "router.bias_E"].eq(0).all()


def test_every_parameter_is_covered(weights: dict[str, Tensor]) -> None:
    """Each is one of the kinds above, in any layer."""

    def kind(name: str) -> str:
        for stack in ("encoder", "decoder"):
            for attention in (".attention.", ".cross_attention."):
                name = name.replace(attention, ".attention.")
            for layer in (0, 1):
                name = name.replace(f"{stack}.blocks.{layer}.", "")
        return name

    kinds = {kind(name) for name in (*NORMAL, *TRUNCATED)}
    rest = {kind(n) for n in weights if "norm" not in n and "relative" not in n and "bias" not in n}
    assert rest == kinds


def test_initial_experts_do_not_depend_on_their_number() -> None:
    for experts in (1, 64):
        torch.manual_seed(0)
        layer = SwitchFeedForward(D, F, experts, initialisation=Initialisation(scale=1.0))
        assert layer.experts.up.std().item() == pytest.approx(1 / math.sqrt(D), rel=0.05)


def test_the_scale_is_the_configurations() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, initialisation=Initialisation(scale=1.0))
    weights = SwitchTransformer(config).state_dict()
    assert weights[SWITCH + "experts.up"].std().item() == pytest.approx(1 / math.sqrt(D), rel=0.05)
    assert weights[SWITCH + "router.weight"].std().item() == pytest.approx(0.02, rel=0.2)


def test_a_seed_makes_a_model() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(7)
        states.append(SwitchTransformer(CONFIG).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_embedding_and_routers_have_the_configured_scale() -> None:
    torch.manual_seed(0)
    wide = Initialisation(embedding_std=0.3, router_std=0.5)
    weights = SwitchTransformer(dataclasses.replace(CONFIG, initialisation=wide)).state_dict()
    assert weights["embedding.weight"].std().item() == pytest.approx(0.3, rel=0.02)
    assert weights[SWITCH + "router.weight"].std().item() == pytest.approx(0.5, rel=0.2)


def attention_by_offset(stack: str, heads: int) -> Tensor:
    """Return the mean attention of each head by offset, [heads, 129], of a local initial bias.

    Queries and keys are zeros: nothing but the bias decides.
    """
    torch.manual_seed(0)
    local = dataclasses.replace(
        CONFIG, num_heads=heads, initialisation=Initialisation(positions="local")
    )
    relative_bias = getattr(SwitchTransformer(local), stack).relative_bias
    position = torch.arange(65)
    bias_HQM = relative_bias(position, position)[0]
    if stack == "decoder":
        bias_HQM = bias_HQM.masked_fill(position[None, :] > position[:, None], -torch.inf)
    weight_HQM = bias_HQM.softmax(-1)
    offset_QM = position[None, :] - position[:, None] + 64
    totals = torch.zeros(heads, 129).index_add_(1, offset_QM.flatten(), weight_HQM.flatten(1))
    return totals / torch.bincount(offset_QM.flatten(), minlength=129)


@pytest.mark.parametrize(
    ("stack", "offsets"),
    [("encoder", [-1, 1, -2, 2, -3, 3, -4, 4]), ("decoder", [0, -1, -2, -3, -4, -5, -6, -7])],
)
def test_local_attention_prefers_one_offset_per_head(stack: str, offsets: list[int]) -> None:
    mean = attention_by_offset(stack, len(offsets))
    assert (mean.argmax(-1) - 64).tolist() == offsets
    assert mean.max(-1).values.min() > 0.3


def test_many_heads_prefer_offsets_with_a_bucket_of_their_own() -> None:
    for stack in ("encoder", "decoder"):
        mean = attention_by_offset(stack, 64)
        assert ((mean.argmax(-1) - 64).abs() <= BUCKETS // 2).all()
        assert mean.max(-1).values.min() > 0.2


def test_initial_attention_is_a_function_of_the_seed_and_the_name() -> None:
    """A parameter drawn alone equals that of the full model."""
    config = dataclasses.replace(CONFIG, initialisation=Initialisation(positions="local"))
    model = SwitchTransformer(config)
    Initialiser.of(config, seed=5).fill(model)
    other = Initialiser.of(config, seed=5)
    for name, weight in model.named_parameters():
        assert torch.equal(other.draw(name, tuple(weight.shape)), weight), name
    part = other.draw(SWITCH + "experts.up", (E, D, F), range(2, 4))
    assert torch.equal(part, model.get_parameter(SWITCH + "experts.up")[2:4])
