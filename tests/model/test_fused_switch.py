"""Fused and separate Switch layers compute the same, and report which was chosen."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from switchlm.kernels import autotune, select
from switchlm.kernels.cpu import native, switch
from switchlm.kernels.registry import ROUTE
from switchlm.kernels.select import Choice, explain_switch
from switchlm.model.config import RouterConfig
from switchlm.model.switch import SwitchFeedForward

TIGHT = RouterConfig(capacity_factor=0.5, exploration="argmax")
TOPK = RouterConfig(experts_per_token=2, capacity_factor=0.5, exploration="argmax")


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let every layer that can take the fused kernels, without a GPU; list the ways taken."""
    pytest.importorskip("triton", "3.7", reason="needs the extra `triton`")
    if torch.cuda.is_available():
        pytest.skip("for machines without a GPU: kernels are interpreted")
    taken: list[str] = []

    def noted(name: str):
        def way(*arguments: object) -> Tensor:
            taken.append(name)
            return ways[name](*arguments)

        return way

    ways = dict(select.SWITCHES)
    for name in ways:
        monkeypatch.setitem(select.SWITCHES, name, noted(name))
    monkeypatch.setattr(select, "explain_switch", lambda *_: Choice("triton", "a test"))
    yield taken
    autotune.clear_choices()


def results(layer: SwitchFeedForward, x_BSD: Tensor) -> list[Tensor]:
    x_BSD = x_BSD.clone().requires_grad_()
    y_BSD, routing = layer(x_BSD)
    loss = (y_BSD * torch.linspace(-1, 1, y_BSD.numel()).view_as(y_BSD)).sum()
    return [y_BSD, *torch.autograd.grad(loss + routing.balance_loss, [x_BSD, *layer.parameters()])]


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("router", [TIGHT, TOPK], ids=["one expert", "two experts"])
def test_equals_separate_kernels(
    router: RouterConfig, gated: bool, fused: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = SwitchFeedForward(16, 24, 4, router=router, gated=gated, activation="gelu")
    x_BSD = torch.randn(2, 24, 16)
    ours = results(layer, x_BSD)
    assert fused == ["triton"]
    monkeypatch.setattr(select, "explain_switch", explain_switch)
    theirs = results(layer, x_BSD)
    assert fused == ["triton", "separate"]
    torch.testing.assert_close(ours, theirs)
    assert (ours[0] == 0).all(-1).any(), "some tokens are dropped"


@pytest.mark.parametrize(
    ("router", "dropout"),
    [
        (RouterConfig(selection="expert_choice", capacity_factor=1.0), 0.0),
        (RouterConfig(), 0.4),
    ],
    ids=["expert choice", "expert dropout"],
)
def test_what_no_kernel_does_goes_step_by_step(
    router: RouterConfig, dropout: float, fused: list[str]
) -> None:
    layer = SwitchFeedForward(16, 24, 4, router=router, expert_dropout=dropout)
    layer(torch.randn(2, 24, 16))
    assert fused == []


def test_under_autocast_experts_compute_in_bfloat16(fused: list[str]) -> None:
    layer = SwitchFeedForward(16, 24, 4).eval()
    x_BSD = torch.randn(2, 24, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_BSD, _ = layer(x_BSD)
    assert fused == ["triton"]
    assert y_BSD.dtype == torch.bfloat16
    y_BSD.float().square().sum().backward()
    assert layer.experts.up.grad.dtype == torch.float32
    assert layer.experts.up.grad.norm() > 0


def test_recomputed_in_backward_the_gradients_are_the_same(fused: list[str]) -> None:
    layer = SwitchFeedForward(16, 24, 4, router=TIGHT)
    x_BSD = torch.randn(2, 24, 16, requires_grad=True)
    plain = torch.autograd.grad(layer(x_BSD)[0].square().sum(), [x_BSD, *layer.parameters()])
    again, _ = checkpoint(layer, x_BSD, use_reentrant=False)
    once_more = torch.autograd.grad(again.square().sum(), [x_BSD, *layer.parameters()])
    assert fused == ["triton"] * 3
    torch.testing.assert_close(plain, once_more)


def test_the_first_call_tries_both_ways_and_remembers(
    fused: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_known(*arguments: object) -> Choice:
        key = select._shape_class(arguments[0], arguments[1], arguments[2:6])
        return autotune.cached_choice(key) or Choice("autotune", "a test")

    monkeypatch.setattr(select, "explain_switch", not_known)
    monkeypatch.setattr(autotune, "REPEATS", 1)
    layer = SwitchFeedForward(16, 24, 4).eval()
    x_BSD = torch.randn(2, 24, 16)
    layer(x_BSD)
    first = len(fused)
    assert set(fused) == {"triton", "separate"}
    results(layer, x_BSD)
    assert fused[first:] == ["separate"]  # the interpreter is slow


def test_explain_says_why_not() -> None:
    x_ND = torch.randn(2048, 16)
    choice = explain_switch(x_ND, 2048, 4, 24)
    assert choice.name == "separate"
    assert "no fused kernel on cpu: experts of 16 x 24 are not small" in choice.reason


@pytest.fixture
def step_by_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def refuse() -> None:
        monkeypatch.setattr("switchlm.model.router.ROUTE", ())
        monkeypatch.setattr(switch, "misfit", lambda *_: "a test")

    return refuse


@pytest.mark.skipif(native.native().library is None, reason=native.native().reason)
@pytest.mark.parametrize("mode", ["paper", "t5x", "hf"])
@pytest.mark.parametrize("factor", [None, 0.5], ids=["dropless", "dropping"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_small_experts_on_a_cpu_are_fused(
    mode: str, factor: float | None, training: bool, step_by_step, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    plain = select.SWITCHES["native"]
    monkeypatch.setitem(select.SWITCHES, "native", lambda *a: taken.append(1) or plain(*a))
    router = RouterConfig(
        mode=mode,
        capacity_factor=factor,
        evaluation_capacity_factor=factor,
        exploration_rate=0.1,
        min_capacity=1,
    )
    layer = SwitchFeedForward(32, 48, 5, router=router).train(training)
    torch.nn.init.normal_(layer.router.weight)
    x_BSD, mask_BS = torch.randn(3, 40, 32), torch.rand(3, 40) < 0.8

    def outcome() -> list[Tensor]:
        torch.manual_seed(1)  # of the jitter
        inputs = x_BSD.clone().requires_grad_()
        y_BSD, routing = layer(inputs, mask_BS)
        loss = (y_BSD * torch.linspace(-1, 1, y_BSD.numel()).view_as(y_BSD)).sum()
        loss = loss + routing.balance_loss + routing.z_loss
        found = torch.autograd.grad(loss, [inputs, *layer.parameters()])
        with torch.no_grad():
            torch.manual_seed(1)
            assert torch.equal(layer(inputs, mask_BS)[0], y_BSD)
        return [y_BSD, routing.gate_A, routing.kept_A, routing.load_E, *found]

    ours = outcome()
    assert len(taken) == 2
    step_by_step()
    theirs = outcome()
    assert len(taken) == 2
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    dropped_N = ~ours[2]
    assert dropped_N.any() == (factor is not None or training or mode == "paper")
    assert not ours[0].flatten(0, 1)[dropped_N].any()


@pytest.mark.skipif(native.native().library is None, reason=native.native().reason)
def test_experts_in_bfloat16_go_step_by_step_after_a_router_in_one(
    step_by_step, monkeypatch: pytest.MonkeyPatch
) -> None:
    routed = []
    (plain,) = ROUTE
    noted = replace(plain, run=lambda *a: routed.append(1) or plain.run(*a))
    monkeypatch.setattr("switchlm.model.router.ROUTE", (noted,))
    layer = SwitchFeedForward(32, 48, 5, router=RouterConfig(exploration="argmax"))
    x_BSD = torch.randn(2, 30, 32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = results(layer, x_BSD)
        assert routed
        step_by_step()
        theirs = results(layer, x_BSD)
    assert len(routed) == 1
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
