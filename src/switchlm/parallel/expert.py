"""Expert parallelism: every process owns some experts, and tokens are sent to them and back.

Two all-to-alls per layer in each direction (section 5.4). Only kept tokens are sent, each exactly
once to its expert, in the dtype of the experts; the numbers of rows are exchanged first.

Shapes: N tokens, D width, R rows sent (in the order of all experts), Q rows received, P processes
of the expert axis, E experts in all, L experts here.
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from switchlm import _torch
from switchlm.errors import ConfigError
from switchlm.kernels.permute import ExpertOrder, combine_rows, gather_rows, sort_by_expert
from switchlm.model.dispatch import LocalDispatcher, Rows
from switchlm.model.experts import FeedForwardExperts
from switchlm.model.routing import Routing
from switchlm.model.switch import SwitchLayer, switch_layers
from switchlm.parallel.mesh import Mesh

# Which dim of a stacked weight is d_ff: experts are split along it over the tensor axis.
FEEDFORWARD_DIM = {"up": 2, "gate": 2, "down": 1}


@dataclass(frozen=True)
class DispatchState:
    """What `combine` needs to send rows back.

    order: of this process's own assignments.
    receive_order: from the order in which rows are received (by process, then expert) to that of
        the local experts; None without an expert axis.
    sent, received: rows per process.
    """

    order: ExpertOrder
    receive_order: ExpertOrder | None
    sent: list[int]
    received: list[int]


class AllToAllDispatcher:
    """Sends rows to the processes of their experts and back.

    experts: the expert axis, None if all experts are on this process.
    tensor: the axis that splits each expert's d_ff, and over which outputs are summed; None if d_ff
        is not split.
    """

    def __init__(self, experts: DeviceMesh | None, tensor: DeviceMesh | None) -> None:
        self.experts, self.tensor = experts, tensor
        self.local = LocalDispatcher()

    def dispatch(self, x_ND: Tensor, routing: Routing) -> Rows:
        """Return the rows of the local experts, from all processes, sorted by expert."""
        own = self.local.dispatch(x_ND, routing)
        counts_PL, sent, received = self.exchange_counts(own.counts_E)
        x_QD, counts_L, receive_order = own.x_RD[: sum(sent)], own.counts_E, None
        if self.experts is not None:
            x_QD = self._all_to_all(x_QD, sent, received)
            # The order is computed while the rows are sent.
            receive_order = _receive_order(counts_PL, sum(received))
            x_QD, counts_L = gather_rows(x_QD, receive_order, 1), receive_order.counts_E
        if self.tensor is not None:
            x_QD = copy_to_tensor_parallel(x_QD, self.tensor)
        return Rows(x_QD, counts_L, DispatchState(own.state, receive_order, sent, received))

    def combine(self, y_QD: Tensor, rows: Rows, routing: Routing, num_tokens: int) -> Tensor:
        """Return y_ND: gate times output, summed over a token's experts; zero where dropped."""
        state: DispatchState = rows.state
        if self.tensor is not None:
            y_QD = reduce_from_tensor_parallel(y_QD, self.tensor)
        if state.receive_order is not None:
            ones_Q = torch.ones(y_QD.shape[0], dtype=y_QD.dtype, device=y_QD.device)
            y_QD = combine_rows(y_QD, ones_Q, state.receive_order, 1)
            y_QD = self._all_to_all(y_QD, state.received, state.sent)
        dropped = routing.kept_A.numel() - y_QD.shape[0]
        y_RD = nn.functional.pad(y_QD, (0, 0, 0, dropped)) if dropped else y_QD
        own = Rows(y_RD, rows.counts_E, state.order)
        return self.local.combine(y_RD, own, routing, num_tokens)

    def exchange_counts(self, counts_E: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """Return counts_PL, int64, the rows that each process sends to each local expert.

        And the numbers of rows to send to each process, and to receive from each.
        """
        counts_PL = self._exchange(counts_E)
        sent_P = counts_E.view(counts_PL.shape).sum(1)
        # One copy to main memory, so that the host waits once.
        sent, received = torch.stack([sent_P, counts_PL.sum(1)]).tolist()
        return counts_PL, sent, received

    def _exchange(self, counts_E: Tensor) -> Tensor:
        if self.experts is None:
            return counts_E[None]
        received_E = torch.empty_like(counts_E)
        dist.all_to_all_single(received_E, counts_E, group=self.experts.get_group())
        return received_E.view(self.experts.size(), -1)

    def _all_to_all(self, x_RD: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send sent[p] rows to process p, and return the received rows; differentiable."""
        assert self.experts is not None
        return _torch.all_to_all(x_RD.contiguous(), received, sent, self.experts.get_group())


def _receive_order(counts_PL: Tensor, num_rows: int) -> ExpertOrder:
    """Return the order that brings rows from (process, expert) to (expert, process)."""
    num_processes, num_experts = counts_PL.shape
    expert_L = torch.arange(num_experts, device=counts_PL.device).repeat(num_processes)
    expert_Q = expert_L.repeat_interleave(counts_PL.reshape(-1), output_size=num_rows)
    return sort_by_expert(expert_Q, torch.ones_like(expert_Q, dtype=torch.bool), num_experts)


def copy_to_tensor_parallel(x: Tensor, tensor: DeviceMesh) -> Tensor:
    """Return x; in the backward pass its gradients are summed over the axis."""
    replicated = DTensor.from_local(x, tensor, [Replicate()], run_check=False)
    return cast(Tensor, replicated.to_local(grad_placements=[Partial()]))


def reduce_from_tensor_parallel(y: Tensor, tensor: DeviceMesh) -> Tensor:
    """Return the sum of y over the axis."""
    partial = DTensor.from_local(y, tensor, [Partial()], run_check=False)
    return partial.redistribute(placements=[Replicate()]).to_local()


def shard_experts(model: nn.Module, mesh: Mesh) -> None:
    """Shard the experts in place, as DTensors, and install the dispatcher.

    Build the model on the meta device, so that full parameters are not allocated.
    """
    experts_mesh, tensor_mesh = mesh.sub("expert"), mesh.sub("tensor")
    both = mesh.sub("expert", "tensor")
    if both is None:
        return
    for layer in switch_layers(model).values():
        experts = cast(nn.Module, layer.experts)
        _check(layer, mesh)
        for name, weight in list(experts.named_parameters()):
            placements: list[Placement] = [Shard(0)] if experts_mesh is not None else []
            if tensor_mesh is not None:
                placements.append(Shard(FEEDFORWARD_DIM[name]))
            setattr(experts, name, shard(weight, both, placements))
        layer.dispatcher = AllToAllDispatcher(experts_mesh, tensor_mesh)


def shard(weight: Tensor, mesh: DeviceMesh, placements: list[Placement]) -> nn.Parameter:
    """Return this process's part of a parameter that is full on all processes."""
    local = weight.detach()
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    for index, size, placement in zip(coordinate, mesh.shape, placements, strict=True):
        assert isinstance(placement, Shard)
        local = local.chunk(size, placement.dim)[index]
    # A dim of length 1 may have any stride, which FSDP does not take; a copy has the usual ones.
    local = local.clone(memory_format=torch.contiguous_format)
    return nn.Parameter(
        DTensor.from_local(local, mesh, placements, run_check=False),
        requires_grad=weight.requires_grad,
    )


def _check(layer: SwitchLayer, mesh: Mesh) -> None:
    num_experts, processes = layer.router.num_experts, mesh.size("expert")
    if num_experts % processes:
        raise ConfigError(
            f"{num_experts} experts cannot be divided evenly over mesh.expert {processes}; use a "
            "number that divides them."
        )
    tensor = mesh.size("tensor")
    if tensor == 1:
        return
    if not isinstance(layer.experts, FeedForwardExperts):
        raise ConfigError(
            "model.attention_experts does not support mesh.tensor above 1, which would split the "
            "projections of a head. Use mesh.expert and mesh.data."
        )
    d_ff = layer.experts.down.shape[1]
    if d_ff % tensor:
        raise ConfigError(f"model.d_ff {d_ff} cannot be split over mesh.tensor {tensor}.")
