"""Adafactor in place against the out-of-place update, and its memory."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from switchlm.training import adafactor
from switchlm.training.adafactor import Adafactor, can_update_in_place

SHAPES = [(5, 128, 130), (300, 140), (2, 3, 130, 128)]
# elements a slice: all at once, two matrices, some rows of one
SLICES = [2**19, 2 * 128 * 130, 2000]


def step(optimizer: Adafactor, parameter: nn.Parameter, number: int) -> None:
    noise = torch.Generator().manual_seed(number)
    gradient = torch.randn(parameter.shape, generator=noise) * 10 ** (number % 3 - 2)
    gradient[0] = 0  # an expert, or a row, without tokens
    parameter.grad = gradient
    optimizer.grad_scale = torch.tensor(1.0 + number)
    optimizer.step()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", SLICES)
@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 0.1}, {"per_expert_rms": True}, {"scale_by_parameter": False}],
    ids=str,
)
def test_it_equals_the_out_of_place_update(monkeypatch, shape, size, options):
    monkeypatch.setattr(adafactor, "SLICE", size)
    ours = nn.Parameter(0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    plain = copy.deepcopy(ours)
    fast, slow = (Adafactor([one], lr=0.03, **options) for one in (ours, plain))
    for number in range(5):
        step(fast, ours, number)
        with monkeypatch.context() as patch:
            patch.setattr(adafactor, "can_update_in_place", lambda *_: False)
            step(slow, plain, number)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
    for name, expected in slow.state[plain].items():
        torch.testing.assert_close(fast.state[ours][name], expected, rtol=1e-6, atol=0)


class _Largest(TorchDispatchMode):
    """Records the size of the largest tensor that an operator allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        known = [one for one in (*args, *(kwargs or {}).values()) if isinstance(one, torch.Tensor)]
        pointers = {one.untyped_storage().data_ptr() for one in known}
        for one in made if isinstance(made, list | tuple) else [made]:
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in pointers:
                self.elements = max(self.elements, one.numel())
        return made


@pytest.mark.parametrize("shape", [(40, 128, 128), (2000, 128)], ids=str)
def test_nothing_larger_than_a_slice_is_made(monkeypatch, shape):
    monkeypatch.setattr(adafactor, "SLICE", 20_000)
    parameter = nn.Parameter(torch.randn(shape))
    optimizer = Adafactor([parameter], lr=0.1, weight_decay=0.1)
    parameter.grad = torch.randn(shape)
    with _Largest() as largest:
        optimizer.step()
    assert 0 < largest.elements <= 20_000


def test_tensors_that_are_not_updated_in_place():
    weight = nn.Parameter(torch.randn(128, 128))
    state = Adafactor([weight]).state[weight]
    assert can_update_in_place(weight, torch.randn(128, 128), state)
    assert not can_update_in_place(weight, torch.randn(128, 128).t(), state)
    assert not can_update_in_place(weight, torch.randn(128, 128).bfloat16(), state)
    assert not can_update_in_place(weight, torch.randn(128, 128), {"square": state["row"]})
