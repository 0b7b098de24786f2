"""The Switch layer against the dense one-hot oracle, alone in any model, and in every regime."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from switchlm.model.config import Initialisation, RouterConfig
from switchlm.model.routing import Routing
from switchlm.model.semantics import SEMANTICS
from switchlm.model.switch import SwitchFeedForward, SwitchProjection

D, F = 6, 5


def switch_layer(experts: int, config: RouterConfig, seed: int = 0, **options: Any):
    """A layer with router logits of order one, so that gates and choices vary."""
    torch.manual_seed(seed)
    layer = SwitchFeedForward(
        D,
        F,
        experts,
        router=config,
        initialisation=Initialisation(scale=1.0),
        causal=False,
        **options,
    )
    nn.init.normal_(layer.router.weight)
    return layer


def gradients(layer: nn.Module, x: Tensor, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [x, *layer.parameters()]))


def capacity_of(
    mode: str, tokens: int, factor: float | None, experts: int, least: int | None
) -> int:
    """Capacity by the words of the three implementations, apart from the model's own code."""
    if factor is None:
        return 10**6
    exact = tokens * factor / experts
    if mode == "t5x":
        floor = int(exact)
        rounded = floor + (exact - floor > 0.5 or (exact - floor == 0.5 and floor % 2 == 1))
    else:
        rounded = int(exact)
    default = 1 if mode == "hf" else 4
    return max(min(tokens, rounded), default if least is None else least)


@given(
    st.sampled_from(["paper", "t5x", "hf"]),
    st.sampled_from([None, 0.5, 1.0, 1.25]),
    st.sampled_from([None, 1]),
    st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 5)),
    st.integers(1, 2),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_output_and_gradients_equal_the_one_hot_einsum(
    dense: Callable[..., Any],
    mode: str,
    factor: float | None,
    least: int | None,
    shape: tuple[int, int, int],
    choices: int,
    gated: bool,
    padding: bool,
    training: bool,
    seed: int,
) -> None:
    groups, size, experts = shape
    config = RouterConfig(
        mode=mode,
        capacity_factor=factor,
        evaluation_capacity_factor=factor,
        min_capacity=least,
        experts_per_token=min(choices, experts),
        exploration="argmax",
    )
    layer = switch_layer(experts, config, seed, gated=gated, activation="gelu" if gated else "relu")
    layer.train(training)
    x_GSD = torch.randn(groups, size, D, requires_grad=True)
    mask_GS = torch.rand(groups, size) < 0.7 if padding else None
    with pytest.MonkeyPatch.context() as patch:
        # Groups as long as a row, in every mode; the splitting itself is tested elsewhere.
        limit = dataclasses.replace(SEMANTICS[mode], group_tokens=None)
        patch.setitem(SEMANTICS, mode, limit)
        y_GSD, routing = layer(x_GSD, mask_GS)
    real_GS = mask_GS if training or mode == "paper" else None
    capacity = min(capacity_of(mode, size, factor, experts, least), size * 2)
    oracle = dense(layer, x_GSD, capacity, real_GS)

    torch.testing.assert_close(y_GSD, oracle.y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(routing.balance_loss, oracle.balance)
    torch.testing.assert_close(routing.z_loss, oracle.z_loss)
    kept_GSE = oracle.dispatch_GSEC.sum(-1)
    assert routing.kept_A.sum() == kept_GSE.sum()
    assert oracle.dispatch_GSEC.sum(1).max() <= 1, "a place holds one token"

    direction = torch.randn_like(y_GSD)
    ours = (y_GSD * direction).sum() + routing.balance_loss + 0.1 * routing.z_loss
    theirs = (oracle.y * direction).sum() + oracle.balance + 0.1 * oracle.z_loss
    for mine, other in zip(
        gradients(layer, x_GSD, ours), gradients(layer, x_GSD, theirs), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_every_kept_token_sits_in_exactly_one_slot() -> None:
    layer = switch_layer(4, RouterConfig(capacity_factor=0.5, exploration="argmax"))
    x_ND = torch.randn(40, D)
    _, routing = layer(x_ND)
    order = layer.dispatcher.dispatch(x_ND, routing).state
    assert sorted(order.assignment_R.tolist()) == list(range(40))
    kept = int(routing.kept_A.sum())
    assert 0 < kept < 40
    assert order.counts_E.sum() == kept
    assert routing.kept_A[order.assignment_R[:kept]].all(), "dropped tokens stand at the end"
    expert_R = torch.arange(4).repeat_interleave(order.counts_E)
    assert torch.equal(routing.expert_A[order.assignment_R[:kept]], expert_R)


def test_dropped_tokens_and_padding_give_zero() -> None:
    layer = switch_layer(2, RouterConfig(expert_capacity=3))
    mask_BS = torch.ones(2, 10, dtype=torch.bool)
    mask_BS[1, 4:] = False
    y_BSD, routing = layer(torch.randn(2, 10, D), mask_BS)
    zero_N = y_BSD.reshape(20, D).eq(0).all(-1)
    assert zero_N[~routing.kept_A].all()
    # In so narrow a layer, ReLU may leave a token that was kept nothing but zeros, too.
    assert (~zero_N[routing.kept_A]).sum() >= 4
    assert zero_N[14:].all()
    assert routing.dropped.item() == pytest.approx(1 - 6 / 14)


@pytest.mark.parametrize("shape", [(12, D), (3, 4, D), (2, 3, 2, D), (D,), (0, D), (2, 0, D)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    layer = switch_layer(3, RouterConfig(capacity_factor=None, exploration="argmax"))
    x = torch.randn(shape, requires_grad=True)
    y, routing = layer(x)
    assert y.shape == x.shape
    flat, _ = layer(x.reshape(-1, D))
    torch.testing.assert_close(y.reshape(-1, D), flat)
    assert torch.isfinite(routing.balance_loss)
    assert routing.dropped == 0
    y.sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_alone_in_a_plain_model() -> None:
    """As a user has it: a Transformer of PyTorch's own parts whose FFN is a Switch layer."""
    torch.manual_seed(0)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inputs = nn.Linear(4, D)
            self.norm = nn.LayerNorm(D)
            self.switch = SwitchFeedForward(d_model=D, d_ff=16, num_experts=4)
            self.head = nn.Linear(D, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
            hidden = self.inputs(x)
            y, routing = self.switch(self.norm(hidden))
            return self.head(hidden + y)[..., 0], routing

    model = Plain()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = torch.randn(8, 16, 4)
    target = x.prod(-1)
    losses = []
    for _ in range(60):
        y, routing = model(x)
        loss = (y - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        (loss + 0.01 * routing.balance_loss).backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    assert routing.load_E.min() > 0


@pytest.mark.parametrize("exploration", ["jitter", "argmax", "sample", "input_dropout"])
def test_exploration_disturbs_training_and_never_evaluation(exploration: str) -> None:
    config = RouterConfig(
        exploration=exploration, exploration_rate=0.3, capacity_factor=None, mode="paper"
    )
    layer = switch_layer(4, config)
    x_ND = torch.randn(64, D)
    gates = [layer(x_ND)[1].gate_A for _ in range(2)]
    assert torch.equal(*gates) == (exploration == "argmax")
    layer.eval()
    gates = [layer(x_ND)[1].gate_A for _ in range(2)]
    assert torch.equal(*gates)


def test_jitter_reaches_experts_in_hf_only() -> None:
    """With one expert the gate is one, so that the output shows the expert's input."""
    for mode, disturbed in (("paper", False), ("t5x", False), ("hf", True)):
        config = RouterConfig(mode=mode, exploration_rate=0.1, capacity_factor=None)
        layer = switch_layer(1, config)
        x_ND = torch.randn(32, D)
        trained = layer(x_ND)[0]
        assert torch.allclose(trained, layer.eval()(x_ND)[0], atol=1e-6) == (not disturbed)
    # In bfloat16 the original jitters a float32 copy, which the experts do not see.
    layer = switch_layer(1, RouterConfig(mode="hf", exploration_rate=0.1)).bfloat16()
    x_ND = torch.randn(4, D).bfloat16()
    assert torch.equal(layer(x_ND)[0], layer.eval()(x_ND)[0])


def test_the_router_stays_float32_under_autocast() -> None:
    """Selective precision (section 2.4): the same routing, bit for bit; experts in bfloat16."""
    layer = switch_layer(4, RouterConfig(exploration="argmax", capacity_factor=1.0))
    seen: list[torch.dtype] = []
    x_ND = torch.randn(64, D, requires_grad=True)
    layer.experts.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    full_ND, full = layer(x_ND)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_ND, routing = layer(x_ND)
    assert seen == [torch.float32, torch.bfloat16]
    assert y_ND.dtype == torch.bfloat16
    for name in ("gate_A", "probability_GE", "fraction_GE", "balance_loss", "z_loss"):
        value = getattr(routing, name)
        assert value.dtype == torch.float32
        assert torch.equal(value, getattr(full, name))
    assert torch.equal(routing.expert_A, full.expert_A)
    torch.testing.assert_close(y_ND.float(), full_ND, rtol=0.05, atol=0.05)
    (y_ND.float().sum() + routing.balance_loss).backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32


def test_the_experiment_of_table_2_routes_in_bfloat16() -> None:
    layer = switch_layer(4, RouterConfig(exploration="argmax", capacity_factor=None))
    x_ND = torch.randn(64, D)
    exact = layer(x_ND)[1].gate_A
    layer.router.dtype = torch.bfloat16
    rounded = layer(x_ND)[1].gate_A
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert not torch.equal(rounded, exact)


@pytest.mark.parametrize("factor", [None, 0.75])
def test_compiled_equals_eager(factor: float | None) -> None:
    layer = switch_layer(4, RouterConfig(exploration="argmax", capacity_factor=factor))
    compiled = torch.compile(layer, backend="aot_eager")
    for tokens in (24, 24, 40):
        x_ND = torch.randn(tokens, D, requires_grad=True)
        results = []
        for model in (layer, compiled):
            y_ND, routing = model(x_ND)
            loss = y_ND.square().sum() + routing.balance_loss + routing.z_loss
            results.append((y_ND, *gradients(layer, x_ND, loss)))
        for mine, other in zip(*results, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exploration", ["jitter", "sample"])
def test_activation_checkpointing_routes_the_same_on_recomputation(exploration: str) -> None:
    config = RouterConfig(exploration=exploration, exploration_rate=0.3, capacity_factor=1.0)
    layer = switch_layer(4, config, expert_dropout=0.3)
    x_ND = torch.randn(48, D, requires_grad=True)

    def run(recompute: bool) -> tuple[list[Tensor], Routing]:
        torch.manual_seed(1)
        if recompute:
            y_ND, routing = torch.utils.checkpoint.checkpoint(layer, x_ND, use_reentrant=False)
        else:
            y_ND, routing = layer(x_ND)
        loss = y_ND.square().sum() + routing.balance_loss + routing.z_loss
        return gradients(layer, x_ND, loss), routing

    (plain, kept), (recomputed, again) = run(False), run(True)
    assert torch.equal(kept.expert_A, again.expert_A)
    for mine, other in zip(plain, recomputed, strict=True):
        assert torch.equal(mine, other)


def test_expert_choice_sums_over_the_experts_that_chose_a_token() -> None:
    config = RouterConfig(selection="expert_choice", capacity_factor=1.5, exploration="argmax")
    layer = switch_layer(3, config)
    x_ND = torch.randn(12, D, requires_grad=True)
    y_ND, routing = layer(x_ND)
    assert routing.token_A is not None
    probability_NE = (x_ND @ layer.router.weight.T).softmax(-1)
    expected_ND = torch.zeros(12, D)
    for expert in range(3):
        hidden_NF = torch.relu(x_ND @ layer.experts.up[expert])
        weight_N = torch.zeros(12)
        top = probability_NE[:, expert].topk(6)
        weight_N = weight_N.index_put((top.indices,), top.values)
        expected_ND = expected_ND + weight_N[:, None] * (hidden_NF @ layer.experts.down[expert])
    torch.testing.assert_close(y_ND, expected_ND)
    direction = torch.randn(12, D)
    ours = gradients(layer, x_ND, (y_ND * direction).sum())
    theirs = gradients(layer, x_ND, (expected_ND * direction).sum())
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_expert_dropout_acts_on_the_intermediate_activation_in_training_only() -> None:
    config = RouterConfig(exploration="argmax", capacity_factor=None)
    layer = switch_layer(2, config, expert_dropout=0.5)
    without = switch_layer(2, config)
    without.load_state_dict(layer.state_dict())
    x_ND = torch.randn(16, D)
    assert not torch.allclose(layer(x_ND)[0], without(x_ND)[0])
    mean_ND = torch.stack([layer(x_ND)[0] for _ in range(400)]).mean(0)
    torch.testing.assert_close(mean_ND, without(x_ND)[0], rtol=0.3, atol=0.15)
    assert torch.equal(layer.eval()(x_ND)[0], without.eval()(x_ND)[0])


def test_a_projection_is_the_gated_matrix_of_the_chosen_expert() -> None:
    torch.manual_seed(0)
    config = RouterConfig(exploration="argmax", capacity_factor=None)
    layer = SwitchProjection(D, 9, 3, router=config)
    nn.init.normal_(layer.router.weight)
    x_ND = torch.randn(20, D)
    y_NP, routing = layer(x_ND)
    matrix_NDP = layer.experts.projection[routing.expert_A]
    expected_NP = torch.einsum("nd,ndp->np", x_ND, matrix_NDP) * routing.gate_A[:, None]
    torch.testing.assert_close(y_NP, expected_NP)


def test_the_dispatcher_and_the_experts_can_be_replaced() -> None:
    """The two replaceable parts: the dispatcher by parallelism, the experts by compression."""
    layer = switch_layer(2, RouterConfig(exploration="argmax", capacity_factor=None))

    class Twice(nn.Module):
        num_experts = 2

        def forward(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
            assert int(counts_E.sum()) == x_RD.shape[0]
            return 2 * x_RD

    layer.experts = Twice()
    x_ND = torch.randn(10, D)
    y_ND, routing = layer(x_ND)
    torch.testing.assert_close(y_ND, 2 * x_ND * routing.gate_A[:, None])
