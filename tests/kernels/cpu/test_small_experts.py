"""All small experts in one call: the same bits as one after the other, and wherever they fit."""

import pytest
import torch

from switchlm.kernels.cpu import feedforward, grouped, native
from switchlm.kernels.cpu.feedforward import expert_feedforward

pytestmark = pytest.mark.skipif(native.native().library is None, reason=native.native().reason)


def outcome(inputs, counts):
    """Output and gradients, those of rows that nobody has among them."""
    x_RD, up_EDF, down_EFD = (t.clone().requires_grad_() for t in inputs)
    y_RD = expert_feedforward(x_RD, torch.tensor(counts), up_EDF, down_EFD)
    dy_RD = torch.linspace(-1, 1, y_RD.numel()).view(y_RD.shape)
    with torch.no_grad():
        alone_RD = expert_feedforward(x_RD, torch.tensor(counts), up_EDF, down_EFD)
    return y_RD, alone_RD, *torch.autograd.grad(y_RD, (x_RD, up_EDF, down_EFD), dy_RD)


def make(counts, width=32, hidden=48, dropped=3):
    torch.manual_seed(0)
    shapes = [(sum(counts) + dropped, width), (len(counts), width, hidden)]
    return [torch.randn(shape) for shape in (*shapes, (len(counts), hidden, width))]


@pytest.fixture
def calls(monkeypatch):
    """Count how often the one call is taken."""
    taken = []
    plain = feedforward.forward
    monkeypatch.setattr(feedforward, "forward", lambda *a: taken.append(1) or plain(*a))
    return taken


@pytest.mark.parametrize("counts", [[5, 0, 1, 70, 600], [1], [0, 0], [17, 16, 15]], ids=str)
def test_the_bits_are_those_of_one_after_the_other(counts, calls, monkeypatch):
    inputs = make(counts)
    ours = outcome(inputs, counts)
    assert len(calls) == 2
    monkeypatch.setattr(feedforward, "_are_small", lambda *_: False)
    monkeypatch.setattr(grouped, "MOST_ROWS", 1000)
    for found, expected in zip(ours, outcome(inputs, counts), strict=True):
        assert torch.equal(found, expected)
    assert len(calls) == 2


def test_what_is_not_a_number_stays_so(calls):
    inputs = make([4, 4])
    inputs[0][5, 3] = torch.nan
    y_RD, _, dx_RD, dup_EDF, _ = outcome(inputs, [4, 4])
    assert calls
    assert y_RD[5].isnan().all()
    assert not y_RD[:5].isnan().any()
    assert dup_EDF[1].isnan().any()
    assert not dup_EDF[0].isnan().any()
    assert not dx_RD[:4].isnan().any()


@pytest.mark.parametrize(
    ("counts", "width", "hidden"), [([300, 2], 96, 96), ([5, 2], 24, 48), ([5, 2], 32, 40)]
)
def test_others_go_one_after_the_other(counts, width, hidden, calls):
    outcome(make(counts, width, hidden), counts)
    assert not calls


def test_frozen_weights_get_no_gradient(calls):
    x_RD, up_EDF, down_EFD = make([5, 2])
    x_RD.requires_grad_()
    down_EFD.requires_grad_()
    y_RD = expert_feedforward(x_RD, torch.tensor([5, 2]), up_EDF, down_EFD)
    y_RD.sum().backward()
    assert calls
    assert up_EDF.grad is None
    assert down_EFD.grad is not None
