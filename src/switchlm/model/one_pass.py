"""Dispatch, experts and combine in one, where a kernel does all three: GPUs, small experts on CPUs.

Fused kernels gather tokens while they multiply, and scatter what comes out, so that rows in the
order of experts never exist. For that all experts must be here, and each token's assignments stand
in token order. Everything else goes step by step: see switch.py.
"""

import torch
from torch import Tensor

from switchlm.kernels.permute import sort_by_expert
from switchlm.kernels.select import explain_switch
from switchlm.model.dispatch import Dispatcher, LocalDispatcher, Seats
from switchlm.model.experts import Experts, FeedForwardExperts
from switchlm.model.routing import Routing


def in_one_pass(
    dispatcher: Dispatcher, experts: Experts, x_ND: Tensor, routing: Routing
) -> Tensor | None:
    """Return y_ND, gate times output; None where it has to go step by step."""
    if not isinstance(dispatcher, LocalDispatcher) or not isinstance(experts, FeedForwardExperts):
        return None
    if routing.token_A is not None or (experts.training and experts.dropout):
        return None
    num_experts, d_ff, _ = experts.down.shape
    choice = explain_switch(
        x_ND,
        routing.expert_A.numel(),
        num_experts,
        d_ff,
        experts.activation,
        experts.gate is not None,
    )
    if choice.name == "separate":
        return None
    order = sort_by_expert(routing.expert_A, routing.kept_A, num_experts)
    weight_A = routing.gate_A
    if choice.name != "native":  # which leaves out dropped rows, whatever their weight
        weight_A = torch.where(routing.kept_A, weight_A, 0.0)
    # Called as a module: sharding gathers its weights then.
    y_ND: Tensor = experts(x_ND, order.counts_E, Seats(order, weight_A))
    return y_ND
