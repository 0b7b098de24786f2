"""Routing invariants, over random scenes of all modes."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from switchlm.errors import ConfigError
from switchlm.model.config import RouterConfig
from switchlm.model.router import Router
from switchlm.model.routing import Routing
from switchlm.model.semantics import SEMANTICS, Mode

D = 6


@dataclass
class Scene:
    """A router, its input in rows, which tokens are real, and the group of each."""

    router: Router
    x_BSD: Tensor
    valid_BS: Tensor | None
    group_N: Tensor

    def route(self) -> Routing:
        valid_N = None if self.valid_BS is None else self.valid_BS.reshape(-1)
        x_ND = self.x_BSD.reshape(-1, D)
        return self.router(x_ND, valid_N, self.x_BSD.shape[1])

    @property
    def routed_N(self) -> Tensor:
        """Who takes part: padding too in the evaluation of modes that route it."""
        everyone = torch.ones(self.group_N.numel(), dtype=torch.bool)
        routes_padding = self.router.config.mode != "paper" and not self.router.training
        if self.valid_BS is None or routes_padding:
            return everyone
        return self.valid_BS.reshape(-1)


@st.composite
def scenes(draw: st.DrawFn, **fixed: Any) -> Scene:
    mode = draw(st.sampled_from(["paper", "t5x", "hf"]))
    factor = draw(st.sampled_from([None, 0.3, 1.0, 1.25]))
    experts = draw(st.integers(1, 6))
    options: dict[str, Any] = {
        "mode": mode,
        "capacity_factor": factor,
        "evaluation_capacity_factor": factor,
        "min_capacity": draw(st.sampled_from([None, 1])),
        "experts_per_token": draw(st.integers(1, min(3, experts))),
        "exploration": "argmax",
    }
    torch.manual_seed(draw(st.integers(0, 10**6)))
    router = Router(D, experts, RouterConfig(**(options | fixed)))
    torch.nn.init.normal_(router.weight)
    router.train(draw(st.booleans()))
    x_BSD = torch.randn(draw(st.integers(1, 4)), draw(st.integers(1, 12)), D)
    valid_BS = torch.rand(x_BSD.shape[:2]) < 0.7 if draw(st.booleans()) else None
    num_tokens = x_BSD.shape[0] * x_BSD.shape[1]
    group = x_BSD.shape[1] if mode == "hf" else num_tokens
    return Scene(router, x_BSD, valid_BS, torch.arange(num_tokens) // group)


def by_choice(routing: Routing, choices: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return expert, gate and kept of the assignments as [N, K]."""
    fields = (routing.expert_A, routing.gate_A, routing.kept_A)
    expert_NK, gate_NK, kept_NK = (field.view(-1, choices) for field in fields)
    return expert_NK, gate_NK, kept_NK


@given(scenes())
def test_no_expert_takes_more_than_its_capacity_and_none_drops_early(scene: Scene) -> None:
    config = scene.router.config
    routing = scene.route()
    expert_NK, _, kept_NK = by_choice(routing, config.experts_per_token)
    for group in range(int(scene.group_N.max()) + 1):
        members = scene.group_N == group
        capacity = scene.router.capacity(int((scene.group_N == 0).sum()))
        for expert in range(scene.router.num_experts):
            wanted = (expert_NK == expert) & members[:, None] & scene.routed_N[:, None]
            taken = int((wanted & kept_NK).sum())
            expected = wanted.sum() if capacity is None else min(int(wanted.sum()), capacity)
            assert taken == expected
    assert not kept_NK[~scene.routed_N].any()


@given(scenes())
def test_tokens_are_dropped_from_the_end_of_the_queue(scene: Scene) -> None:
    """First choices in token order, then second choices: none is kept after a dropped one."""
    choices = scene.router.config.experts_per_token
    expert_NK, _, kept_NK = by_choice(scene.route(), choices)
    for group in range(int(scene.group_N.max()) + 1):
        members = ((scene.group_N == group) & scene.routed_N).nonzero()[:, 0].tolist()
        for expert in range(scene.router.num_experts):
            queue = [
                bool(kept_NK[n, k])
                for k in range(choices)
                for n in members
                if expert_NK[n, k] == expert
            ]
            assert queue == sorted(queue, reverse=True)


@given(scenes())
def test_gates_are_softmax_values_or_their_shares(scene: Scene) -> None:
    choices = scene.router.config.experts_per_token
    expert_NK, gate_NK, _ = by_choice(scene.route(), choices)
    softmax_NE = (scene.x_BSD.reshape(-1, D) @ scene.router.weight.T).softmax(-1)
    top = softmax_NE.topk(choices)
    chosen_NK = softmax_NE.gather(1, expert_NK)
    torch.testing.assert_close(chosen_NK, top.values)
    assert all(len(set(experts)) == choices for experts in expert_NK.tolist())
    if choices > 1:
        chosen_NK = chosen_NK / chosen_NK.sum(-1, keepdim=True)
    torch.testing.assert_close(gate_NK, chosen_NK)


@given(scenes())
def test_loads_count_wanted_assignments_before_dropping(scene: Scene) -> None:
    routing = scene.route()
    expert_NK, _, kept_NK = by_choice(routing, scene.router.config.experts_per_token)
    wanted = expert_NK[scene.routed_N].reshape(-1)
    assert (
        routing.load_E.tolist() == torch.bincount(wanted, minlength=routing.load_E.numel()).tolist()
    )
    dropped = 1 - int(kept_NK.sum()) / max(wanted.numel(), 1) if wanted.numel() else 0.0
    assert routing.dropped.item() == pytest.approx(dropped, abs=1e-6)


@given(scenes())
def test_losses_are_the_formulas_of_the_paper(scene: Scene) -> None:
    routing = scene.route()
    router, routed_N = scene.router, scene.routed_N
    logits_NE = scene.x_BSD.reshape(-1, D) @ router.weight.T
    expert_NK, _, _ = by_choice(routing, router.config.experts_per_token)
    balances, z_losses = [], []
    for group in range(int(scene.group_N.max()) + 1):
        members = (scene.group_N == group) & routed_N
        if members.any():
            wanted = expert_NK[members].reshape(-1)
            f_E = torch.bincount(wanted, minlength=router.num_experts) / wanted.numel()
            p_E = logits_NE[members].softmax(-1).mean(0)
            balances.append(router.num_experts * (f_E * p_E).sum())
            z_losses.append(logits_NE[members].logsumexp(-1).square().mean())
    zero = torch.tensor(0.0)
    expected = [torch.stack(found).mean() if found else zero for found in (balances, z_losses)]
    torch.testing.assert_close([routing.balance_loss, routing.z_loss], expected)


@given(scenes(capacity_factor=None, evaluation_capacity_factor=None, expert_capacity=None))
def test_without_measuring_the_decision_is_the_same(scene: Scene) -> None:
    measured = scene.route()
    scene.router.measures = False
    found = scene.route()
    for name in ("expert_A", "gate_A", "kept_A", "load_E"):
        assert torch.equal(getattr(found, name), getattr(measured, name))
    assert found.balance_loss == found.z_loss == 0


def uniform_routing(experts: int) -> Routing:
    """Every expert gets one of the tokens, and every probability is the same to 1e-4."""
    router = Router(experts, experts, RouterConfig())
    torch.nn.init.eye_(router.weight)
    return router(torch.eye(experts) * 1e-4, None, experts)


@pytest.mark.parametrize("experts", [2, 5, 16])
def test_uniform_routing_has_a_balance_loss_of_one(experts: int) -> None:
    assert uniform_routing(experts).balance_loss.item() == pytest.approx(1.0, abs=1e-5)


def test_all_tokens_on_one_expert_have_a_balance_loss_of_the_number_of_experts() -> None:
    router = Router(4, 8, RouterConfig())
    torch.nn.init.zeros_(router.weight)
    router.weight.data[3] = 50.0
    routing = router(torch.ones(32, 4), None, 32)
    assert routing.balance_loss.item() == pytest.approx(8.0, rel=1e-5)


def test_the_balance_loss_has_gradients_by_the_probabilities_only() -> None:
    routing = uniform_routing(4)
    assert routing.probability_GE.requires_grad
    assert not routing.fraction_GE.requires_grad


def test_groups_of_the_paper_span_rows() -> None:
    torch.manual_seed(0)
    router = Router(D, 4, RouterConfig(exploration="argmax", capacity_factor=0.5))
    torch.nn.init.normal_(router.weight)
    x_BSD = torch.randn(5, 500, D)
    routing = router(x_BSD.reshape(-1, D), None, 500)
    # 2500 tokens are 3 groups of 834, 834 and 832; capacity floor(834 * 0.5 / 4).
    assert routing.probability_GE.shape == (3, 4)
    for group in range(3):
        part = slice(834 * group, 834 * (group + 1))
        load_E = torch.bincount(routing.expert_A[part][routing.kept_A[part]], minlength=4)
        assert load_E.max() <= 104
    assert routing.kept_A.sum() == 3 * 4 * 104


@pytest.mark.parametrize("mode", ["paper", "t5x", "hf"])
def test_padding_takes_capacity_in_the_evaluation_of_t5x_and_hf_alone(mode: Mode) -> None:
    x_ND = torch.ones(12, D)
    valid_N = torch.arange(12) >= 6
    router = Router(D, 2, RouterConfig(mode=mode, expert_capacity=4))
    torch.nn.init.ones_(router.weight)

    def kept(training: bool) -> list[int]:
        return router.train(training)(x_ND, valid_N, 12).kept_A.nonzero()[:, 0].tolist()

    as_text, as_real = [6, 7, 8, 9], [0, 1, 2, 3]
    assert kept(training=True) == as_text
    assert kept(training=False) == (as_text if mode == "paper" else as_real)
    router.trains_on_padding = True
    assert kept(training=True) == (as_text if mode == "paper" else as_real)


def test_hf_compares_probabilities_in_the_dtype_of_the_activations() -> None:
    """In bfloat16 the two best are equal, so that the first one wins."""
    logits = torch.tensor([[1.0, 1.001, 0.0]])
    for mode, expert in (("paper", 1), ("hf", 0)):
        router = Router(3, 3, RouterConfig(mode=mode, capacity_factor=None))
        torch.nn.init.eye_(router.weight)
        routing = router(logits, None, 1, torch.bfloat16)
        assert routing.expert_A.item() == expert
        assert routing.gate_A.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_capacity_factors_of_training_and_evaluation(training: bool) -> None:
    config = RouterConfig(capacity_factor=1.0, evaluation_capacity_factor=2.0)
    router = Router(D, 4, config).train(training)
    assert router.capacity(64) == (16 if training else 32)
    router.config = dataclasses.replace(config, expert_capacity=5)
    assert router.capacity(64) == 5


def test_sampling_happens_in_training_only() -> None:
    torch.manual_seed(0)
    router = Router(D, 4, RouterConfig(exploration="sample", capacity_factor=None))
    torch.nn.init.normal_(router.weight)
    x_ND = torch.randn(64, D)
    best_N = (x_ND @ router.weight.T).argmax(-1)
    routing = router(x_ND, None, 64)
    assert not torch.equal(routing.expert_A, best_N)
    softmax_NE = (x_ND @ router.weight.T).softmax(-1)
    torch.testing.assert_close(
        routing.gate_A, softmax_NE.gather(1, routing.expert_A[:, None])[:, 0]
    )
    assert torch.equal(router.eval()(x_ND, None, 64).expert_A, best_N)


@given(
    scenes(
        experts_per_token=1,
        reroute_overflow=True,
        capacity_factor=1.0,
        evaluation_capacity_factor=1.0,
    )
)
def test_rerouting_fills_every_slot_and_gates_by_the_expert_taken(scene: Scene) -> None:
    routing = scene.route()
    size = int((scene.group_N == 0).sum())
    capacity = scene.router.capacity(size)
    assert capacity is not None
    for group in range(int(scene.group_N.max()) + 1):
        members = (scene.group_N == group) & scene.routed_N
        seated = int(routing.kept_A[members].sum())
        assert seated == min(int(members.sum()), capacity * scene.router.num_experts)
    softmax_NE = (scene.x_BSD.reshape(-1, D) @ scene.router.weight.T).softmax(-1)
    gate_N = softmax_NE.gather(1, routing.expert_A[:, None])[:, 0]
    torch.testing.assert_close(routing.gate_A, gate_N)
    # Loads and losses speak of the first choices, as without rerouting.
    first_N = softmax_NE.argmax(-1)[scene.routed_N]
    expected = torch.bincount(first_N, minlength=scene.router.num_experts)
    assert routing.load_E.tolist() == expected.tolist()


@given(
    scenes(
        experts_per_token=1,
        selection="expert_choice",
        capacity_factor=1.0,
        evaluation_capacity_factor=1.0,
    )
)
def test_expert_choice_is_balanced_and_takes_no_padding(scene: Scene) -> None:
    routing = scene.route()
    assert routing.token_A is not None
    valid_N = torch.ones(scene.group_N.numel(), dtype=torch.bool)
    if scene.valid_BS is not None:
        valid_N = scene.valid_BS.reshape(-1)
    assert valid_N[routing.token_A[routing.kept_A]].all(), "whatever the mode does with padding"
    assert routing.load_E.min() == routing.load_E.max()
    pairs = list(zip(routing.token_A.tolist(), routing.expert_A.tolist(), strict=True))
    kept = [pair for pair, keep in zip(pairs, routing.kept_A.tolist(), strict=True) if keep]
    assert len(set(kept)) == len(kept), "no token is twice at one expert"
    assert routing.dropped == 0
    if valid_N.any():
        assert routing.balance_loss.item() == pytest.approx(1.0, abs=1e-5)


def test_expert_choice_is_for_encoders() -> None:
    config = RouterConfig(selection="expert_choice")
    assert Router(D, 4, config).experts_choose
    decoder = Router(D, 4, config, causal=True)
    torch.nn.init.normal_(decoder.weight)
    assert decoder(torch.randn(8, D), None, 8).token_A is None


def test_expert_choice_without_a_capacity_says_what_to_set() -> None:
    with pytest.raises(ConfigError, match=r"evaluation_capacity_factor is None: set both"):
        Router(D, 4, RouterConfig(selection="expert_choice", evaluation_capacity_factor=None))


def test_bias_balancing_evens_the_load_without_a_loss() -> None:
    torch.manual_seed(0)
    config = RouterConfig(balance="bias", bias_rate=0.01, capacity_factor=None)
    router = Router(D, 4, config)
    torch.nn.init.normal_(router.weight)
    x_ND = torch.randn(256, D) + torch.randn(D)
    spread = []
    for _ in range(100):
        load_E = router(x_ND, None, 512).load_E
        spread.append(int(load_E.max() - load_E.min()))
        router.update_expert_bias(load_E)
    assert spread[-1] < 0.2 * spread[0]
    routing = router(x_ND, None, 512)
    softmax_NE = (x_ND @ router.weight.T).softmax(-1)
    assert not torch.equal(routing.expert_A, softmax_NE.argmax(-1))
    gate_N = softmax_NE.gather(1, routing.expert_A[:, None])[:, 0]
    torch.testing.assert_close(routing.gate_A, gate_N)  # the bias chooses, it does not weigh
    assert "bias_E" in router.state_dict()


def test_an_update_of_the_bias_is_one_step_against_the_load() -> None:
    router = Router(D, 3, RouterConfig(balance="bias", bias_rate=0.5))
    router.update_expert_bias(torch.tensor([9, 3, 0]))
    assert router.bias_E is not None
    assert router.bias_E.tolist() == [-0.5, 0.5, 0.5]
    router.update_expert_bias(torch.tensor([4, 4, 4]))
    assert router.bias_E.tolist() == [-0.5, 0.5, 0.5]


def test_only_routers_balanced_by_bias_have_one() -> None:
    router = Router(D, 3, RouterConfig())
    assert router.bias_E is None
    assert list(router.state_dict()) == ["weight"]


def test_every_mode_is_described() -> None:
    assert set(SEMANTICS) == {"paper", "t5x", "hf"}
    layers = {mode: [s.first_sparse_layer(n) for n in (1, 2, 4)] for mode, s in SEMANTICS.items()}
    assert layers == {"paper": [0, 1, 3], "t5x": [0, 1, 3], "hf": [0, 1, 1]}
