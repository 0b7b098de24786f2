"""The Switch layer over several processes against the same layer on one."""

import copy

import pytest
import torch
from tests.parallel.processes import run_in_processes
from torch import Tensor

from switchlm.errors import ConfigError
from switchlm.model.config import Initialisation, RouterConfig
from switchlm.model.switch import SwitchFeedForward, SwitchProjection
from switchlm.parallel.expert import AllToAllDispatcher, shard_experts
from switchlm.parallel.mesh import Mesh, MeshConfig

EXPERTS, WIDTH = 4, 8
ROUTERS = {
    "dropless": RouterConfig(capacity_factor=None, exploration="argmax"),
    "capacity": RouterConfig(capacity_factor=0.75, exploration="argmax", group_rows=1),
    "two experts per token": RouterConfig(
        capacity_factor=None, exploration="argmax", experts_per_token=2
    ),
    "experts choose": RouterConfig(
        selection="expert_choice", exploration="argmax", group_rows=1, capacity_factor=1.0
    ),
}
# To which experts the tokens of each row may go: all; one alone, so that a process gets nothing;
# each row to the experts of the other process.
FAVOURITES = {"uneven": [range(4)] * 4, "one": [[0]] * 4, "crossed": [[2, 3], [2, 3], [1], [0]]}


@pytest.mark.parametrize("mesh", [MeshConfig(expert=2), MeshConfig(tensor=2)])
def test_two_processes_equal_one(tmp_path, mesh):
    run_in_processes(2, tmp_path, equal_one, mesh)


def test_four_processes_equal_one(tmp_path):
    run_in_processes(4, tmp_path, equal_one, MeshConfig(expert=2, tensor=2))


def equal_one(rank: int, config: MeshConfig) -> None:
    mesh = Mesh.of(config, "cpu")
    for router in ROUTERS.values():
        for favourites in FAVOURITES.values():
            torch.manual_seed(0)
            layer = SwitchFeedForward(
                WIDTH,
                12,
                EXPERTS,
                router=router,
                gated=True,
                initialisation=Initialisation(scale=2.0),
            )
            with torch.no_grad():
                layer.router.weight.copy_(4 * torch.eye(EXPERTS, WIDTH))
            check_layer(layer, mesh, inputs(favourites))


def inputs(favourites: list) -> Tensor:
    """Return x_BSD, whose first features are what the router sees."""
    x_BSD = torch.randn(4, 6, WIDTH)
    for row, experts in enumerate(favourites):
        closed = [expert for expert in range(EXPERTS) if expert not in experts]
        x_BSD[row, :, closed] -= 4
    return x_BSD


def check_layer(whole: SwitchFeedForward, mesh: Mesh, x_BSD: Tensor) -> None:
    sharded = copy.deepcopy(whole)
    shard_experts(sharded, mesh)
    weight_BSD = torch.randn_like(x_BSD)
    x_BSD.requires_grad_()
    y_BSD, _ = whole(x_BSD)
    (y_BSD * weight_BSD).sum().backward()
    mine = slice(2 * mesh.data_rank, 2 * mesh.data_rank + 2) if mesh.data_size == 2 else slice(None)
    part_BSD = x_BSD.detach()[mine].requires_grad_()
    z_BSD, _ = sharded(part_BSD)
    (z_BSD * weight_BSD[mine]).sum().backward()
    close = torch.testing.assert_close
    close(z_BSD, y_BSD[mine], rtol=1e-5, atol=1e-5)
    close(part_BSD.grad, x_BSD.grad[mine], rtol=1e-5, atol=1e-5)
    router_gradient = sharded.router.weight.grad
    close(mesh.all_reduce_sum(router_gradient), whole.router.weight.grad, rtol=1e-4, atol=1e-5)
    for name, parameter in sharded.experts.named_parameters():
        expected = dict(whole.experts.named_parameters())[name].grad
        close(parameter.grad.full_tensor(), expected, rtol=1e-4, atol=1e-5)


def test_experts_that_cannot_be_shared_out_are_refused(tmp_path):
    run_in_processes(2, tmp_path, refuse)


def refuse(rank: int) -> None:
    mesh = Mesh.of(MeshConfig(expert=2), "cpu")
    with pytest.raises(ConfigError, match="3 experts cannot be divided evenly"):
        shard_experts(SwitchFeedForward(8, 12, 3), mesh)
    mesh = Mesh.of(MeshConfig(tensor=2), "cpu")
    with pytest.raises(ConfigError, match="d_ff 13 cannot be split over mesh"):
        shard_experts(SwitchFeedForward(8, 13, 4), mesh)
    with pytest.raises(ConfigError, match="attention_experts does not support"):
        shard_experts(SwitchProjection(8, 8, 4), mesh)


def test_the_dispatcher_alone_is_the_local_one(tmp_path):
    """With all experts on this process nothing is sent: bit for bit the same."""
    torch.manual_seed(0)
    layer = SwitchFeedForward(WIDTH, 12, EXPERTS, router=ROUTERS["capacity"])
    x_BSD = torch.randn(4, 6, WIDTH)
    expected, _ = layer(x_BSD)
    layer.dispatcher = AllToAllDispatcher(None, None)
    found, _ = layer(x_BSD)
    assert torch.equal(found, expected)
