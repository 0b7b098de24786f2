"""Switch layers without shapes that depend on data, for exported programs.

In training rows are sorted by expert, and the number of rows per expert depends on the data. Here
all shapes follow from the number of tokens, by one of three methods:

- `gathered`: the matrices of its expert are copied for every row. For the few rows of a decoding
  step.
- `tiled`: rows are in tiles of `TILE`, each of one expert, whose matrices are copied for the tile.
  A / TILE + E tiles hold any routing, so nothing is dropped; at most A + E * TILE rows are
  multiplied, whatever the loads.
- `padded`: every expert has C slots, as in the paper. No copies, and E * C rows are multiplied;
  assignments without a slot are dropped and give zero.

Shapes: N tokens, K experts per token, A = N * K assignments, D d_model, F d_ff, E experts, X tiles,
C capacity.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from switchlm.kernels import reference
from switchlm.model.experts import FeedForwardExperts
from switchlm.model.switch import SwitchFeedForward

TILE = 16
_HUNDREDTHS = 100

# x_AD and expert_A to y_AD.
Method = Callable[["StaticSwitch", Tensor, Tensor], Tensor]


class StaticSwitch(nn.Module):
    """Replaces a SwitchFeedForward in evaluation; maps x [..., D] to y [..., D], in float32.

    layer: shares its weights.
    method: `gathered`, `tiled` or `padded_to(factor)`.
    """

    def __init__(self, layer: SwitchFeedForward, method: Method) -> None:
        super().__init__()
        experts = layer.experts
        assert isinstance(experts, FeedForwardExperts), "only these have stacked matrices"
        self.router = layer.router
        self.experts = experts
        self.method = method

    def forward(self, x: Tensor) -> Tensor:
        x_ND = x.reshape(-1, x.shape[-1])
        choices = self.router.config.experts_per_token
        _, probability_NE = self.router.scores(x_ND)
        expert_NK = self.router.choose(probability_NE)
        gate_NK = self.router.gates(probability_NE, expert_NK)
        # All first choices before any second choice, as they queue for capacity.
        x_AD = x_ND.repeat(choices, 1) if choices > 1 else x_ND
        y_AD = self.method(self, x_AD, expert_NK.t().reshape(-1))
        y_KND = y_AD.view(choices, -1, x.shape[-1]) * gate_NK.t()[..., None]
        return y_KND.sum(0).view(x.shape)

    def feed_forward(self, x_XRD: Tensor, expert_X: Tensor | None) -> Tensor:
        """Apply to each group of rows x_XRD its expert; None: group e is that of expert e."""
        weights = (self.experts.up, self.experts.gate, self.experts.down)
        up, gate, down = (
            None if weight is None else weight if expert_X is None else weight[expert_X]
            for weight in weights
        )
        assert up is not None
        assert down is not None
        return reference.feed_forward(
            x_XRD,
            lambda x: x @ up,
            None if gate is None else lambda x: x @ gate,
            lambda x: x @ down,
            self.experts.activation,
            0.0,
        )


def gathered(layer: StaticSwitch, x_AD: Tensor, expert_A: Tensor) -> Tensor:
    """Multiply every row with its own copy of the matrices."""
    return layer.feed_forward(x_AD[:, None], expert_A)[:, 0]


def tiled(layer: StaticSwitch, x_AD: Tensor, expert_A: Tensor) -> Tensor:
    """Multiply tiles of rows, each with the matrices of the one expert in it."""
    num_experts = layer.experts.num_experts
    place_A, counts_E = queue(expert_A, num_experts)
    end_E = ((counts_E + TILE - 1) // TILE).cumsum(0)
    start_E = end_E - (counts_E + TILE - 1) // TILE
    slot_A = start_E[expert_A] * TILE + place_A
    num_tiles = x_AD.shape[0] // TILE + num_experts
    tile_X = torch.arange(num_tiles, device=x_AD.device)
    expert_X = (tile_X[:, None] >= end_E).long().sum(1).clamp(max=num_experts - 1)
    rows_RD = x_AD.new_zeros(num_tiles * TILE, x_AD.shape[1]).index_copy(0, slot_A, x_AD)
    return layer.feed_forward(rows_RD.view(-1, TILE, x_AD.shape[1]), expert_X).flatten(0, 1)[slot_A]


def padded_to(factor: float) -> Method:
    """Return `padded`, where an expert has ceil(A / E * factor) slots for all rows of a batch.

    Assignments take slots in order, padding included. It differs from the capacity of `Router`
    since it is computed in integers: A is not known in a graph.

    factor: to two decimals.
    """
    hundredths = round(factor * _HUNDREDTHS)

    def padded(layer: StaticSwitch, x_AD: Tensor, expert_A: Tensor) -> Tensor:
        """Multiply the slots of every expert with its matrices; drop assignments without slot."""
        num_experts = layer.experts.num_experts
        share = _HUNDREDTHS * num_experts
        capacity = (x_AD.shape[0] * hundredths + share - 1) // share
        place_A, _ = queue(expert_A, num_experts)
        kept_A = place_A < capacity
        dropped = num_experts * capacity  # the index of one more slot, for dropped assignments
        slot_A = torch.where(kept_A, expert_A * capacity + place_A, dropped)
        rows_RD = x_AD.new_zeros(dropped + 1, x_AD.shape[1])
        rows_RD = rows_RD.index_put((slot_A,), x_AD * kept_A[:, None])
        slots_ECD = rows_RD[:dropped].view(num_experts, capacity, x_AD.shape[1])
        y_RD = layer.feed_forward(slots_ECD, None).flatten(0, 1)
        return y_RD[slot_A.clamp(max=dropped - 1)] * kept_A[:, None]

    return padded


def queue(expert_A: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return place_A, each assignment's place in the queue of its expert, and counts_E; int64."""
    one_hot_AE = (expert_A[:, None] == torch.arange(num_experts, device=expert_A.device)).long()
    place_A = (one_hot_AE.cumsum(0) * one_hot_AE).sum(1) - 1
    return place_A, one_hot_AE.sum(0)
