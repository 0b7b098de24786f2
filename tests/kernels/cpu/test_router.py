"""The fused router equals the plain one: choices, losses, gradients."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from switchlm.kernels.cpu import native
from switchlm.kernels.cpu import router as fused_router
from switchlm.kernels.registry import ROUTE
from switchlm.model.config import RouterConfig
from switchlm.model.router import Router
from switchlm.model.routing import Routing

pytestmark = pytest.mark.usefixtures("build")
FIELDS = ("gate_A", "fraction_GE", "probability_GE", "balance_loss", "z_loss")
D = 32


@pytest.fixture
def taken(monkeypatch):
    """List the calls of the kernel."""
    calls = []
    noted = replace(ROUTE[0], run=lambda *a: calls.append(1) or fused_router.route(*a))
    monkeypatch.setattr("switchlm.model.router.ROUTE", (noted,))
    return calls


def make(config: RouterConfig, experts: int, *, width: int = D, std: float = 1.0) -> Router:
    torch.manual_seed(experts)
    router = Router(width, experts, config)
    torch.nn.init.normal_(router.weight, std=std)
    if router.bias_E is not None:
        router.bias_E.normal_(std=0.2)
    return router


def step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("switchlm.model.router.ROUTE", ())


def gradients(routing: Routing, x_ND: Tensor, router: Router, which: tuple[str, ...]) -> list:
    """Return the gradients of x and weight from some of the outputs."""
    loss = torch.zeros(())
    for name in which:
        value = getattr(routing, name)
        loss = loss + (value * torch.linspace(-1, 2, value.numel()).view(value.shape)).sum()
    return list(torch.autograd.grad(loss, (x_ND, router.weight)))


def agree(
    router: Router,
    x_ND: Tensor,
    valid_N: Tensor | None,
    row: int,
    monkeypatch: pytest.MonkeyPatch,
    which: tuple[str, ...] = ("gate_A", "probability_GE", "balance_loss", "z_loss"),
) -> Routing:
    x_ND = x_ND.clone().requires_grad_()
    ours = router(x_ND, valid_N, row)
    found = gradients(ours, x_ND, router, which)
    with monkeypatch.context() as patch:
        step_by_step(patch)
        theirs = router(x_ND, valid_N, row)
        expected = gradients(theirs, x_ND, router, which)
    for name in ("expert_A", "kept_A", "load_E"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype
    for name in FIELDS:
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    return ours


@pytest.mark.parametrize("mode", ["paper", "t5x", "hf"])
@pytest.mark.parametrize("factor", [None, 0.5, 1.25], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("experts", [1, 5, 64])
def test_equals_separate_kernels(mode, factor, padded, experts, taken, monkeypatch) -> None:
    config = RouterConfig(mode=mode, capacity_factor=factor, exploration="argmax")
    router = make(config, experts)
    for rows, row in ((1, 1), (3, 14), (2, 64), (9, 131)):  # 1179 tokens: two groups in `paper`
        x_ND = torch.randn(rows * row, D)
        valid_N = torch.rand(rows * row) < 0.6 if padded else None
        routing = agree(router, x_ND, valid_N, row, monkeypatch)
        if factor == 0.5 and rows * row > 1000 and mode != "hf":
            assert not routing.kept_A.all()
    assert len(taken) == 4


@pytest.mark.parametrize("rows", [1, 5, 7])
def test_a_short_last_group_and_groups_of_padding(rows, taken, monkeypatch) -> None:
    router = make(RouterConfig(group_rows=2, capacity_factor=1.0, exploration="argmax"), 7)
    valid_N = torch.rand(rows * 13) < 0.5
    valid_N[:26] = False
    agree(router, torch.randn(rows * 13, D), valid_N, 13, monkeypatch)
    assert taken


@pytest.mark.parametrize("name", ["gate_A", "probability_GE", "balance_loss", "z_loss"])
def test_any_gradient_may_be_absent(name, taken, monkeypatch) -> None:
    router = make(RouterConfig(exploration="argmax"), 6)
    valid_N = torch.rand(90) < 0.7
    agree(router, torch.randn(90, D), valid_N, 30, monkeypatch, (name,))
    assert taken


def test_without_any_gradient_there_is_none(taken) -> None:
    router = make(RouterConfig(), 4)
    x_ND = torch.randn(8, D, requires_grad=True)
    routing = router(x_ND, None, 8)
    assert not routing.fraction_GE.requires_grad
    assert not routing.load_E.requires_grad
    with torch.no_grad():
        assert not router(x_ND, None, 8).gate_A.requires_grad
    assert len(taken) == 2


def test_no_tokens(taken, monkeypatch) -> None:
    for factor in (None, 1.0):
        router = make(RouterConfig(capacity_factor=factor), 4)
        agree(router, torch.randn(0, D), None, 5, monkeypatch)
        agree(router, torch.randn(0, D), torch.ones(0, dtype=torch.bool), 5, monkeypatch)
    assert len(taken) == 4


def test_a_selection_bias_acts_on_the_choice_alone(taken, monkeypatch) -> None:
    router = make(RouterConfig(balance="bias", capacity_factor=1.0, exploration="argmax"), 9)
    routing = agree(router, torch.randn(200, D), None, 50, monkeypatch)
    router.bias_E.zero_()
    assert not torch.equal(router(torch.randn(200, D), None, 50).expert_A, routing.expert_A)
    assert len(taken) == 2


def test_the_first_of_equals(taken, monkeypatch) -> None:
    router = make(RouterConfig(capacity_factor=None), 20)
    with torch.no_grad():
        router.weight.zero_()
        assert (router(torch.randn(70, D), None, 70).expert_A == 0).all()
        router.weight[[3, 11, 17]] = 1.0
        assert (router(torch.ones(70, D), None, 70).expert_A == 3).all()
    assert len(taken) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("balance", ["loss", "bias"])
def test_what_is_no_number_stays_with_its_token(value, balance, taken, monkeypatch) -> None:
    router = make(RouterConfig(balance=balance, capacity_factor=None), 7)
    x_ND = torch.randn(40, D)
    x_ND[5, 3] = value
    ours = router(x_ND, None, 40)
    step_by_step(monkeypatch)
    theirs = router(x_ND, None, 40)
    assert torch.equal(ours.expert_A, theirs.expert_A)
    for name in FIELDS:
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), equal_nan=True)
    assert ours.gate_A.isnan().sum() == 1
    assert taken


@pytest.mark.parametrize("scale", [1e-30, 10.0, 1e4])
def test_logits_of_any_size(scale, taken, monkeypatch) -> None:
    router = make(RouterConfig(exploration="argmax"), 17)
    x_ND = torch.randn(100, D) * scale
    agree(router, x_ND, None, 100, monkeypatch, ("gate_A",))
    assert taken


def test_probabilities_are_exact_to_float32(taken) -> None:
    router = make(RouterConfig(exploration="argmax"), 64)
    x_ND = torch.randn(512, D)
    routing = router(x_ND, None, 512)
    exact_NE = (x_ND.double() @ router.weight.double().T).softmax(-1)
    exact_N = exact_NE.gather(1, routing.expert_A[:, None])[:, 0]
    torch.testing.assert_close(routing.gate_A.double(), exact_N, rtol=3e-6, atol=0)
    torch.testing.assert_close(
        routing.probability_GE.double(), exact_NE.mean(0, keepdim=True), rtol=3e-6, atol=1e-9
    )


def test_frozen_router_or_frozen_input(taken, monkeypatch) -> None:
    router = make(RouterConfig(exploration="argmax"), 5)
    x_ND = torch.randn(30, D, requires_grad=True)
    router.weight.requires_grad_(False)
    router(x_ND, None, 30).gate_A.sum().backward()
    assert router.weight.grad is None
    alone = x_ND.grad
    router.weight.requires_grad_()
    router(x_ND.detach(), None, 30).gate_A.sum().backward()
    found = router.weight.grad
    both = torch.autograd.grad(router(x_ND, None, 30).gate_A.sum(), (x_ND, router.weight))
    assert torch.equal(both[0], alone)
    assert torch.equal(both[1], found)
    assert len(taken) == 3


def test_threads_change_no_bit(taken) -> None:
    router = make(RouterConfig(), 16)
    x_ND = torch.randn(300, D, requires_grad=True)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        routing = router(x_ND, None, 300)
        found.append([routing.gate_A, *gradients(routing, x_ND, router, ("gate_A", "z_loss"))])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    assert len(taken) == 2


def test_a_decision_does_not_depend_on_the_tokens_beside_it(taken) -> None:
    router = make(RouterConfig(capacity_factor=None, evaluation_capacity_factor=None), 10)
    x_ND = torch.randn(100, D)
    whole = router(x_ND, None, 100)
    router.measures = False
    for n in (0, 37, 99):
        alone = router(x_ND[n : n + 1], None, 1)
        assert alone.expert_A == whole.expert_A[n]
        assert alone.gate_A == whole.gate_A[n]
    assert len(taken) == 4


def test_tokens_that_stand_apart_in_memory(taken, monkeypatch) -> None:
    router = make(RouterConfig(exploration="argmax"), 5)
    agree(router, torch.randn(D, 70).t(), (torch.rand(140) < 0.5)[::2], 70, monkeypatch)
    assert taken


def test_activations_of_bfloat16_take_a_router_of_float32(taken) -> None:
    router = make(RouterConfig(exploration="argmax"), 5)
    x_ND = torch.randn(70, D)
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(x_ND, None, 70, torch.bfloat16)
    assert taken
    assert torch.equal(routing.gate_A, router(x_ND, None, 70).gate_A)


@pytest.mark.parametrize(
    "case", ["bfloat16 router", "hf in bfloat16", "sample", "top 2", "reroute",
             "odd width", "much work", "without a library", "watched"],
)  # fmt: skip
def test_everything_else_goes_step_by_step(case, taken, monkeypatch) -> None:
    changes = {
        "hf in bfloat16": {"mode": "hf"},
        "sample": {"exploration": "sample"},
        "top 2": {"experts_per_token": 2},
        "reroute": {"reroute_overflow": True},
    }
    width = 24 if case == "odd width" else D
    router = make(RouterConfig(**changes.get(case, {})), 4, width=width)
    x_ND, dtype = torch.randn(50, width), torch.float32
    if case == "bfloat16 router":
        router.dtype = torch.bfloat16
    if case == "hf in bfloat16":
        dtype = torch.bfloat16
    if case == "much work":
        monkeypatch.setattr(fused_router, "MOST_WORK", 50 * 4 * D - 1)
    if case == "without a library":
        monkeypatch.setattr(native, "native", lambda: native.Native(None, "none"))
    if case == "watched":
        with FlopCounterMode(display=False) as counter:
            router(x_ND, None, 50)
        assert counter.get_total_flops() == 2 * 50 * 4 * D
    else:
        router(x_ND, None, 50, dtype)
    assert not taken
