"""The fused Switch layer of small experts equals separate kernels."""

import pytest
import torch

from switchlm.kernels import select
from switchlm.kernels.cpu import native
from switchlm.kernels.permute import sort_by_expert
from switchlm.kernels.select import explain_switch, switch_feedforward

pytestmark = pytest.mark.usefixtures("build")


def make(counts, width=32, hidden=48, dropped=3):
    """Tokens in any order, some of each expert dropped."""
    torch.manual_seed(0)
    expert_N = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    expert_N = torch.cat([expert_N, torch.zeros(dropped, dtype=torch.int64)])
    kept_N = torch.arange(len(expert_N)) < sum(counts)
    shuffled = torch.randperm(len(expert_N))
    x_ND = torch.randn(len(expert_N), width, requires_grad=True)
    gate_N = torch.rand(len(expert_N), requires_grad=True)
    up_EDF = torch.randn(len(counts), width, hidden, requires_grad=True)
    down_EFD = torch.randn(len(counts), hidden, width, requires_grad=True)
    order = sort_by_expert(expert_N[shuffled], kept_N[shuffled], len(counts))
    return (x_ND, gate_N, up_EDF, down_EFD), order, kept_N[shuffled]


def outcome(way, tensors, order, kept_N=None):
    x_ND, gate_N, up_EDF, down_EFD = tensors
    weight_N = gate_N if kept_N is None else torch.where(kept_N, gate_N, 0.0)
    y_ND = way(x_ND, weight_N, order, up_EDF, down_EFD, "relu", None)
    dy_ND = torch.linspace(-1, 1, y_ND.numel()).view(y_ND.shape)
    return [y_ND, *torch.autograd.grad(y_ND, tensors, dy_ND)]


SCENES = [[5, 0, 1, 70, 300], [128, 129, 0], [1], [0, 0], [17, 16, 15]]


@pytest.mark.parametrize("counts", SCENES, ids=str)
@pytest.mark.parametrize("dropped", [0, 3])
@pytest.mark.parametrize("hidden", [16, 48])
def test_equals_separate_kernels(counts, dropped, hidden) -> None:
    tensors, order, kept_N = make(counts, hidden=hidden, dropped=dropped)
    assert order.counts_E.tolist() == counts
    for _ in range(3):  # uninitialised memory is often zero the first time
        ours = outcome(select.SWITCHES["native"], tensors, order)
        theirs = outcome(select.SWITCHES["separate"], tensors, order, kept_N)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        y_ND, dx_ND, dgate_N, dup_EDF, ddown_EFD = ours
        for tensor in (y_ND[~kept_N], dx_ND[~kept_N], dgate_N[~kept_N]):
            assert not tensor.any()
        for expert, count in enumerate(counts):
            if not count:
                assert not dup_EDF[expert].any()
                assert not ddown_EFD[expert].any()
        for tensor in ours:
            tensor.detach().fill_(torch.nan)


def test_without_gradients_it_is_the_same() -> None:
    tensors, order, _ = make([5, 200, 0, 31])
    ways = select.SWITCHES["native"]
    y_ND = outcome(ways, tensors, order)[0]
    x_ND, gate_N, up_EDF, down_EFD = tensors
    with torch.no_grad():
        alone_ND = ways(x_ND, gate_N, order, up_EDF, down_EFD, "relu", None)
    assert torch.equal(alone_ND, y_ND)


@pytest.mark.parametrize("frozen", range(4))
def test_frozen_tensors_get_no_gradient(frozen) -> None:
    tensors, order, _ = make([5, 2, 0])
    whole = outcome(select.SWITCHES["native"], tensors, order)[1:]
    inputs = [t.detach().requires_grad_(i != frozen) for i, t in enumerate(tensors)]
    x_ND, gate_N, up_EDF, down_EFD = inputs
    y_ND = switch_feedforward(x_ND, gate_N, order, up_EDF, down_EFD)
    y_ND.backward(torch.linspace(-1, 1, y_ND.numel()).view(y_ND.shape))
    for number, (tensor, expected) in enumerate(zip(inputs, whole, strict=True)):
        if number == frozen:
            assert tensor.grad is None
        else:
            assert torch.equal(tensor.grad, expected)


def test_nan_stays_in_its_token_and_expert() -> None:
    (x_ND, *others), order, _ = make([4, 4], dropped=0)
    bad = int(order.assignment_R[5])
    with torch.no_grad():
        x_ND[bad, 3] = torch.nan
    y_ND, dx_ND, _, dup_EDF, _ = outcome(select.SWITCHES["native"], (x_ND, *others), order)
    fine_N = torch.arange(8) != bad
    assert y_ND[bad].isnan().all()
    assert not y_ND[fine_N].isnan().any()
    assert not dx_ND[fine_N].isnan().any()
    assert dup_EDF[1].isnan().any()
    assert not dup_EDF[0].isnan().any()


def test_a_nan_gate_has_no_effect_where_dropped() -> None:
    (x_ND, gate_N, *weights), order, kept_N = make([4, 4])
    with torch.no_grad():
        gate_N[~kept_N] = torch.nan
    for tensor in outcome(select.SWITCHES["native"], (x_ND, gate_N, *weights), order):
        assert not tensor.isnan().any()


def test_gradients_that_are_expanded_or_transposed() -> None:
    tensors, order, kept_N = make([5, 3])
    for scalar in (torch.sum, lambda y_ND: (y_ND.t().contiguous() ** 2).sum()):
        found = []
        for name in ("native", "separate"):
            x_ND, gate_N, up_EDF, down_EFD = tensors
            weight_N = torch.where(kept_N, gate_N, 0.0)
            y_ND = select.SWITCHES[name](x_ND, weight_N, order, up_EDF, down_EFD, "relu", None)
            found.append(torch.autograd.grad(scalar(y_ND), tensors))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)


def test_threads_change_no_bit() -> None:
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(outcome(switch_feedforward, *make([5, 200, 0, 31])[:2]))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_explain_switch_names_kernel_and_reason(monkeypatch) -> None:
    x_ND = torch.randn(100, 32)
    assert explain_switch(x_ND, 100, 4, 32).name == "native"
    torch.set_num_threads(2)
    assert explain_switch(x_ND, 100, 4, 32).name == "native"
    for arguments, reason in (
        ((x_ND, 200, 4, 32), "200 assignments for 100 tokens"),
        ((x_ND, 100, 4, 32, "gelu"), "gated or not ReLU"),
        ((x_ND, 100, 4, 32, "relu", True), "gated or not ReLU"),
        ((x_ND, 100, 4, 40), "no multiple of 16"),
        ((x_ND, 100, 4, 512), "not small"),
        ((x_ND.bfloat16(), 100, 4, 32), "not torch.bfloat16"),
        ((x_ND.expand(400, 100, 32).reshape(-1, 32), 40000, 4, 32), "enough for several threads"),
    ):
        choice = explain_switch(*arguments)
        assert choice.name == "separate"
        assert reason in choice.reason
    with torch.autocast("cpu", torch.bfloat16):
        assert explain_switch(x_ND, 100, 4, 32).name == "separate"
    monkeypatch.setattr(native, "native", lambda: native.Native(None, "no compiler"))
    assert "no compiler" in explain_switch(x_ND, 100, 4, 32).reason


def test_sorting_equals_pytorchs(monkeypatch) -> None:
    for assignments, experts in ((0, 3), (1, 1), (500, 7), (300, 300)):
        expert_A = torch.randint(experts, (assignments,))
        kept_A = torch.rand(assignments) < 0.7
        ours = sort_by_expert(expert_A, kept_A, experts)
        with monkeypatch.context() as patch:
            patch.setattr(native, "native", lambda: native.Native(None, "none"))
            theirs = sort_by_expert(expert_A, kept_A, experts)
        for name in ("assignment_R", "row_A", "counts_E"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))


def test_weights_of_another_dtype_are_not_read_as_float32(monkeypatch) -> None:
    (x_ND, gate_N, up_EDF, down_EFD), order, _ = make([5, 3])
    taken = []
    monkeypatch.setattr(select, "_separate", lambda *_: taken.append(1) or x_ND)
    arguments = (up_EDF.double(), down_EFD), (up_EDF, down_EFD.bfloat16()), (up_EDF, down_EFD)
    for number, weights in enumerate(arguments, start=1):
        select.SWITCHES["native"](x_ND, gate_N, order, *weights, "relu", None)
        assert len(taken) == min(number, 2)
