"""Static Switch layers against the layer itself, with nothing dropped."""

import pytest
import torch

from switchlm.export.static_switch import TILE, StaticSwitch, gathered, padded_to, queue, tiled
from switchlm.generation.decode import dropless
from switchlm.model.config import Initialisation, RouterConfig
from switchlm.model.switch import SwitchFeedForward

WAYS = {"gathered": gathered, "tiled": tiled, "padded": padded_to(4.0)}
KINDS = {
    "relu": {},
    "gated gelu": {"gated": True, "activation": "gelu"},
    "two experts per token": {"router": RouterConfig(experts_per_token=2)},
    "balanced by bias": {"router": RouterConfig(balance="bias")},
}


def layer_of(**options):
    torch.manual_seed(1)
    return SwitchFeedForward(8, 12, 4, initialisation=Initialisation(scale=4.0), **options).eval()


def expected_of(layer, x):
    with torch.no_grad(), dropless(layer):
        return layer(x)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 50, 8)])
def test_it_is_the_layer_where_nothing_is_dropped(way, options, shape):
    layer, x = layer_of(**options), torch.randn(shape)
    if layer.router.bias_E is not None:
        layer.router.bias_E += torch.tensor([0.0, 0.01, 0.0, -0.01])
    y, routing = expected_of(layer, x)
    assert shape[1] == 1 or len(routing.expert_A.unique()) > 1
    torch.testing.assert_close(StaticSwitch(layer, way)(x), y, rtol=1e-5, atol=1e-5)


def test_nothing_is_dropped_however_uneven_the_loads():
    layer = layer_of()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[2] = 1.0
    x = torch.rand(1, 5 * TILE + 3, 8)
    y, routing = expected_of(layer, x)
    assert routing.load_E.tolist() == [0, 0, 5 * TILE + 3, 0]
    torch.testing.assert_close(StaticSwitch(layer, tiled)(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("choices", [1, 2])
def test_where_capacity_binds_the_layer_s_own_assignments_are_dropped(choices):
    router = RouterConfig(experts_per_token=choices, expert_capacity=10 * choices)
    layer, x = layer_of(router=router), torch.randn(1, 40, 8)
    with torch.no_grad():
        y, routing = layer(x)
    assert not routing.kept_A.all()
    static = StaticSwitch(layer, padded_to(1.0))(x)
    torch.testing.assert_close(static, y, rtol=1e-5, atol=1e-5)


def test_where_capacity_binds_the_last_in_order_get_zeros():
    layer, x = layer_of(), torch.randn(1, 40, 8)
    y, routing = expected_of(layer, x)
    place_A, counts_E = queue(routing.expert_A, 4)
    assert torch.equal(counts_E, routing.load_E)
    kept_A = place_A < 10
    assert 0 < kept_A.sum() < 40
    static = StaticSwitch(layer, padded_to(1.0))(x)
    torch.testing.assert_close(static, y * kept_A[:, None], rtol=1e-5, atol=1e-5)
