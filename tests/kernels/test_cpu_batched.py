"""Batched products over filled-up rows equal one product an expert, gradients too."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from switchlm.kernels import cpu_batched, cpu_feedforward
from switchlm.kernels.activations import Activation

D, F = 6, 10
LOADS = [
    [5, 0, 3, 1, 4],
    [0, 0],
    [300, 1, 2, 0, 0, 3, 290, 310],  # several runs
    [400, 200, 130, 100, 80, 70, 60, 50],
]


def outcome(
    function: object, counts: list[int], inputs: list[Tensor], activation: Activation
) -> list[Tensor]:
    x_RD, up_EDF, down_EFD, *gate = inputs
    y_RD = function(x_RD, torch.tensor(counts), up_EDF, down_EFD, activation, *gate)  # type: ignore[operator]
    dy_RD = torch.linspace(-1, 1, y_RD.numel(), dtype=y_RD.dtype).view(y_RD.shape)
    return [y_RD, *torch.autograd.grad(y_RD, inputs, dy_RD)]


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("counts", LOADS, ids=str)
def test_equals_one_product_an_expert(
    counts: list[int], gated: bool, activation: Activation
) -> None:
    shapes = [(sum(counts) + 3, D), (len(counts), D, F), (len(counts), F, D)]
    shapes += [(len(counts), D, F)] * gated
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]
    ours = outcome(cpu_batched.expert_feedforward, counts, inputs, activation)
    theirs = outcome(cpu_feedforward.expert_feedforward, counts, inputs, activation)
    torch.testing.assert_close(ours, theirs)


@given(counts=st.lists(st.integers(0, 300), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_runs_hold_every_row_in_a_slot_of_its_own(counts: list[int]) -> None:
    found, idle = cpu_batched.runs(counts)
    experts = [e for run in found for e in range(run.experts.start, run.experts.stop)]
    empty = [e for gap in idle for e in range(gap.start, gap.stop)]
    assert sorted(experts + empty) == list(range(len(counts)))
    assert all(counts[e] for e in experts)
    assert not any(counts[e] for e in empty)
    rows = torch.arange(sum(counts))[:, None]
    back = torch.full_like(rows, -1)
    for run in found:
        slots = run.spread(rows)
        assert slots.shape[:2] == (run.experts.stop - run.experts.start, run.slots)
        run.collect(slots, back)
        zeroed = run.spread(rows + 1, zeros=True)
        assert int((zeroed != 0).sum()) == run.rows.stop - run.rows.start
    assert torch.equal(back, rows)


def test_rows_that_are_not_finite_stay_their_own() -> None:
    """A neighbour's filled-up rows must not spread what is not finite."""
    x_RD, up_EDF, down_EFD = torch.randn(5, D), torch.randn(2, D, F), torch.randn(2, F, D)
    x_RD[1] = torch.inf
    y_RD = cpu_batched.expert_feedforward(x_RD, torch.tensor([2, 3]), up_EDF, down_EFD)
    assert torch.isfinite(y_RD[[0, 2, 3, 4]]).all()
