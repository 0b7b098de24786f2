import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Attention

from switchlm.errors import DataError
from switchlm.kernels.select import attention as attend
from switchlm.model import attention
from switchlm.model.attention import (
    Attention,
    RelativeBias,
    SwitchAttention,
    masked,
    segment_mask,
)
from switchlm.model.config import ModelConfig, RouterConfig


@given(
    st.integers(4, 64),
    st.integers(2, 300),
    st.booleans(),
    st.lists(st.integers(-3000, 3000), min_size=1, max_size=50),
)
def test_buckets_are_those_of_t5(
    buckets: int, distance: int, bidirectional: bool, distances: list[int]
) -> None:
    if buckets >= 2 * distance:
        return
    ours = RelativeBias(buckets, 2, distance, bidirectional)
    relative = torch.tensor(distances)
    theirs = T5Attention._relative_position_bucket(relative, bidirectional, buckets, distance)
    assert torch.equal(ours.bucket(relative), theirs)


def pair(bidirectional: bool) -> tuple[Attention, RelativeBias, T5Attention]:
    """Our attention and T5's with the same weights."""
    torch.manual_seed(0)
    config = T5Config(
        d_model=12, d_kv=4, num_heads=3, dropout_rate=0.0, is_decoder=not bidirectional
    )
    config._attn_implementation = "eager"
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    ours, bias = Attention(12, 3, 4), RelativeBias(32, 3, 128, bidirectional)
    for name, other in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
        getattr(ours, name).weight.data.copy_(getattr(theirs, other).weight)
    bias.weight.data.copy_(theirs.relative_attention_bias.weight)
    return ours, bias, theirs


@pytest.mark.parametrize("bidirectional", [True, False])
def test_equals_the_attention_of_t5_with_gradients(bidirectional: bool) -> None:
    ours, relative, theirs = pair(bidirectional)
    x_BSD = torch.randn(2, 9, 12)
    positions = torch.arange(9)
    causal = None if bidirectional else torch.tril(torch.ones(9, 9, dtype=torch.bool))[None, None]
    bias = masked(relative(positions, positions), causal)
    y_BSD, routing = ours(x_BSD, bias)
    mask = torch.zeros(1, 1, 9, 9)
    if causal is not None:
        mask = mask.masked_fill(~causal, torch.finfo(torch.float32).min)
    expected_BSD = theirs(x_BSD, mask=mask)[0]
    torch.testing.assert_close(y_BSD, expected_BSD, rtol=1e-5, atol=1e-6)
    assert routing == ()
    direction = torch.randn_like(y_BSD)
    (y_BSD * direction).sum().backward()
    (expected_BSD * direction).sum().backward()
    torch.testing.assert_close(relative.weight.grad, theirs.relative_attention_bias.weight.grad)
    torch.testing.assert_close(ours.query.weight.grad, theirs.q.weight.grad)
    torch.testing.assert_close(ours.value.weight.grad, theirs.v.weight.grad)


@pytest.mark.parametrize("bias_shape", [(1, 3, 5, 7), (2, 1, 5, 7), (2, 3, 5, 7)])
def test_a_bias_with_a_gradient_takes_the_same_attention(bias_shape: tuple[int, ...]) -> None:
    """The steps written out for a bias that learns, against the fused kernel."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    bias = torch.randn(bias_shape)
    fused = attend(query, key, value, bias, 0.0)
    learned = attend(query, key, value, bias.clone().requires_grad_(), 0.0)
    torch.testing.assert_close(learned, fused, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = attend(
            query.bfloat16(), key.bfloat16(), value.bfloat16(), bias.clone().requires_grad_(), 0.0
        )
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), fused, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("learned", [True, False])
def test_dropout_acts_on_the_weights(learned: bool) -> None:
    torch.manual_seed(0)
    bias = torch.zeros(1, 1, 200, 50, requires_grad=learned)
    ones = torch.ones(1, 1, 50, 1)
    y = attend(torch.zeros(1, 1, 200, 1), ones, ones, bias, 0.5)
    assert y.std() > 0.05
    assert y.mean().item() == pytest.approx(1.0, abs=0.1)


def test_segments_see_themselves_and_padding_sees_every_real_token() -> None:
    query = torch.tensor([[1, 1, 2, 0]])
    key = torch.tensor([[1, 2, 0]])
    expected = [[True, False, False], [True, False, False], [False, True, False]]
    assert segment_mask(query, key)[0, 0].tolist() == [*expected, [True, True, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learned", [True, False])
def test_a_query_that_may_see_nothing_takes_the_mean(dtype: torch.dtype, learned: bool) -> None:
    torch.manual_seed(0)
    bias = torch.randn(1, 2, 4, 6, requires_grad=learned)
    nothing = masked(bias, torch.zeros(1, 1, 4, 6, dtype=torch.bool))
    query, key, value = (torch.randn(3, 2, n, 5, dtype=dtype) for n in (4, 6, 6))
    y = attend(query, key, value, nothing, 0.0)
    mean = value.mean(2, keepdim=True).expand(-1, -1, 4, -1).transpose(1, 2).flatten(2)
    torch.testing.assert_close(y, mean, rtol=0.02, atol=1e-2)


class Appending:
    """A store that concatenates, the plainest key-value cache."""

    def __init__(self) -> None:
        self.pair: tuple[Tensor, Tensor] | None = None

    def update(self, key_BHQK: Tensor, value_BHQK: Tensor) -> tuple[Tensor, Tensor]:
        if self.pair is not None:
            key_BHQK = torch.cat([self.pair[0], key_BHQK], 2)
            value_BHQK = torch.cat([self.pair[1], value_BHQK], 2)
        self.pair = (key_BHQK, value_BHQK)
        return self.pair


def switch_attention() -> SwitchAttention:
    torch.manual_seed(0)
    router = RouterConfig(capacity_factor=None, exploration="argmax")
    config = ModelConfig(d_model=12, d_ff=8, d_kv=4, num_heads=3, num_experts=2, router=router)
    layer = SwitchAttention(config, causal=True)
    nn.init.normal_(layer.query.router.weight)
    nn.init.normal_(layer.key_value.router.weight)
    return layer


@pytest.mark.parametrize("kind", ["dense", "switch"])
def test_step_by_step_with_a_store_equals_all_at_once(kind: str) -> None:
    torch.manual_seed(0)
    layer = Attention(12, 3, 4) if kind == "dense" else switch_attention()
    x_BTD = torch.randn(2, 6, 12)
    causal = torch.tril(torch.ones(6, 6, dtype=torch.bool))[None, None]
    whole, _ = layer(x_BTD, masked(torch.zeros(()), causal))
    store = Appending()
    steps = [layer(x_BTD[:, t : t + 1], None, store=store)[0] for t in range(6)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)


def test_appendix_a_queries_and_shared_keys_and_values_are_switch_layers() -> None:
    layer = switch_attention()
    x_BSD = torch.randn(2, 5, 12)
    y_BSD, (query_routing, shared_routing) = layer(x_BSD, None)
    query, _ = layer.query(x_BSD)
    shared, _ = layer.key_value(x_BSD)
    query, shared = (h.view(2, 5, 3, 4).transpose(1, 2) for h in (query, shared))
    weight = (query @ shared.mT).softmax(-1)
    expected = layer.output((weight @ shared).transpose(1, 2).reshape(2, 5, 12))
    torch.testing.assert_close(y_BSD, expected, rtol=1e-4, atol=1e-5)
    assert query_routing.expert_A.numel() == shared_routing.expert_A.numel() == 10
    y_BSD.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_what_cannot_fit_is_refused_before_it_is_allocated(monkeypatch):
    monkeypatch.setattr(attention, "available_bytes", lambda: 3 * 10**9)
    bias = RelativeBias(32, 12, 128, bidirectional=True)
    position = torch.arange(16384)
    with pytest.raises(DataError, match=r"16,384 tokens need 32\.2 GB .* only 3\.0 GB"):
        bias(position, position)
    assert bias(position[:1], position).shape == (1, 12, 1, 16384)
    allowed = torch.ones(1, dtype=torch.bool).expand(64, 1, 512, 512)
    monkeypatch.setattr(attention, "available_bytes", lambda: 10**9)
    with pytest.raises(DataError, match=r"512 tokens need 1\.6 GB"):
        masked(torch.zeros(1).expand(1, 12, 512, 512), allowed)
