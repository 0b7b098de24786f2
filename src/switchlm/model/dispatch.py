"""Dispatch of tokens to their experts, and combine; expert parallelism replaces the dispatcher.

Shapes: N tokens, D width, A assignments, R rows in the order of their experts, E experts.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from switchlm.kernels.permute import ExpertOrder, combine_rows, gather_rows, sort_by_expert
from switchlm.model.routing import Routing


@dataclass(frozen=True)
class Rows:
    """Tokens in the order of this process's experts; rows past the counts were dropped.

    x_RD: activations.
    counts_E: int64, rows of every expert of this process.
    state: what the dispatcher needs to combine.
    """

    x_RD: Tensor
    counts_E: Tensor
    state: Any


@dataclass(frozen=True)
class Assignments:
    """The assignments of tokens that are not permuted yet.

    order: of the assignments by expert.
    weight_A: float32, the gate; zero where dropped.
    """

    order: ExpertOrder
    weight_A: Tensor


class Dispatcher(Protocol):
    """Sends tokens to their experts, in whatever process, and returns their outputs."""

    def dispatch(self, x_ND: Tensor, routing: Routing) -> Rows: ...

    def combine(self, y_RD: Tensor, rows: Rows, routing: Routing, num_tokens: int) -> Tensor: ...


def per_token(routing: Routing, num_tokens: int) -> int:
    """Return K, the assignments per token, which are in token order."""
    return max(routing.expert_A.numel() // max(num_tokens, 1), 1)


class LocalDispatcher:
    """A permutation: all experts are in this process."""

    def dispatch(self, x_ND: Tensor, routing: Routing) -> Rows:
        """Return every assignment's token, sorted by expert."""
        order = sort_by_expert(routing.expert_A, routing.kept_A, routing.load_E.numel())
        if routing.token_A is not None:
            x_RD = x_ND[routing.token_A[order.assignment_R]]
        else:
            x_RD = gather_rows(x_ND, order, per_token(routing, x_ND.shape[0]))
        return Rows(x_RD, order.counts_E, order)

    def combine(self, y_RD: Tensor, rows: Rows, routing: Routing, num_tokens: int) -> Tensor:
        """Return y_ND: gate times output, summed over a token's experts; zero where dropped."""
        order: ExpertOrder = rows.state
        weight_A = torch.where(routing.kept_A, routing.gate_A, 0.0)
        if routing.token_A is None:
            return combine_rows(y_RD, weight_A, order, per_token(routing, num_tokens))
        y_AD = combine_rows(y_RD, weight_A, order, 1)
        y_ND = y_AD.new_zeros(num_tokens, y_AD.shape[1])
        return y_ND.index_add(0, routing.token_A, y_AD)
