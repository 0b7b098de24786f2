"""Experts: stacked weights and grouped matmul. `compression` installs other implementations.

Shapes: R rows in the order of their experts, D d_model, F d_ff, P projection width, E experts.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from switchlm.config import check_choice, check_sizes
from switchlm.kernels.select import (
    Implementation,
    expert_feedforward,
    grouped_matmul,
    switch_feedforward,
)
from switchlm.model.config import Activation
from switchlm.model.dispatch import Assignments
from switchlm.model.layers import local


class Experts(Protocol):
    """Maps the rows of every expert with that expert's weights; rows past the counts give zeros."""

    num_experts: int

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def __call__(self, x_RD: Tensor, counts_E: Tensor) -> Tensor: ...


class FeedForwardExperts(nn.Module):
    """One feed-forward network per expert, ReLU or gated (GEGLU), without biases.

    dropout: expert dropout, on the intermediate activation (section 2.4).
    implementation: fused kernels or separate steps (`kernels.switch`, set by training).
    """

    implementation: Implementation = "auto"

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        activation: Activation = "relu",
        gated: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(d_model=d_model, d_ff=d_ff, num_experts=num_experts)
        self.up = nn.Parameter(torch.empty(num_experts, d_model, d_ff))
        self.gate = nn.Parameter(torch.empty(num_experts, d_model, d_ff)) if gated else None
        self.down = nn.Parameter(torch.empty(num_experts, d_ff, d_model))
        self.num_experts = num_experts
        check_choice(activation, Activation, "activation")
        self.activation = activation
        self.dropout = dropout

    def forward(
        self, x_RD: Tensor, counts_E: Tensor, assignments: Assignments | None = None
    ) -> Tensor:
        """Map rows to rows; with assignments, tokens x_ND to y_ND, weighted (no dropout)."""
        up, down = local(self.up), local(self.down)
        gate = None if self.gate is None else local(self.gate)
        weights = (up, down, self.activation, gate)
        if assignments is not None:
            order, weight_A = assignments.order, assignments.weight_A
            return switch_feedforward(x_RD, weight_A, order, *weights, self.implementation)
        dropout = self.dropout if self.training else 0.0
        return expert_feedforward(x_RD, counts_E, *weights, dropout)


class ProjectionExperts(nn.Module):
    """One matrix per expert, for Switch layers inside attention (appendix A)."""

    def __init__(self, d_model: int, width: int, num_experts: int) -> None:
        super().__init__()
        self.projection = nn.Parameter(torch.empty(num_experts, d_model, width))
        self.num_experts = num_experts

    def forward(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        return grouped_matmul(x_RD, local(self.projection), counts_E)
