"""Switch layers without shapes that depend on data, which is what exported programs need.

In training, rows are sorted by expert and every expert multiplies as many as it got: shapes that no
graph can know. Here all shapes follow from the number of tokens, in one of three ways:

- `gathered`: a row brings its expert's matrices along. Exact, and right for the few rows of a
  decoding step.
- `tiled`: rows stand in tiles of `TILE`, each of one expert, and a tile brings the matrices along.
  A / TILE + E tiles hold any routing, so nothing is ever dropped; products are at most those of
  A + E * TILE rows, however uneven the loads, and as many matrices as tiles are copied.
- `padded`: every expert has C slots, as in the paper. No copies, and E * C rows are multiplied;
  what finds no slot is dropped: it gives zero, and the residual carries the token on.

Shapes: N tokens, K experts per token, A = N * K assignments, D d_model, F d_ff, E experts, X tiles,
C capacity.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from switchlm.kernels.reference import feed_forward
from switchlm.model.experts import FeedForwardExperts
from switchlm.model.switch import SwitchFeedForward

TILE = 16
_HUNDREDTHS = 100

# x_AD and expert_A to y_AD.
Way = Callable[["StaticSwitch", Tensor, Tensor], Tensor]


class StaticSwitch(nn.Module):
    """Stands in for a SwitchFeedForward in evaluation; maps x [..., D] to y [..., D] alone.

    way: `gathered`, `tiled` or `padded_to(factor)`. Weights are shared with `layer`. Everything is
        computed in float32.
    """

    def __init__(self, layer: SwitchFeedForward, way: Way) -> None:
        super().__init__()
        experts = layer.experts
        assert isinstance(experts, FeedForwardExperts), "other experts have no matrices to take"
        self.router = layer.router
        self.experts = experts
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        x_ND = x.reshape(-1, x.shape[-1])
        choices = self.router.config.experts_per_token
        _, probability_NE = self.router.scores(x_ND)
        expert_NK = self.router.choose(probability_NE)
        gate_NK = self.router.gates(probability_NE, expert_NK)
        # All first choices before any second choice, as they queue for capacity.
        x_AD = x_ND.repeat(choices, 1) if choices > 1 else x_ND
        y_AD = self.way(self, x_AD, expert_NK.t().reshape(-1))
        y_KND = y_AD.view(choices, -1, x.shape[-1]) * gate_NK.t()[..., None]
        return y_KND.sum(0).view(x.shape)

    def feed(self, x_XRD: Tensor, expert_X: Tensor | None) -> Tensor:
        """Apply to each group of rows x_XRD its expert; None says that group e is expert e's."""
        weights = (self.experts.up, self.experts.gate, self.experts.down)
        up, gate, down = (
            None if weight is None else weight if expert_X is None else weight[expert_X]
            for weight in weights
        )
        assert up is not None
        assert down is not None
        return feed_forward(
            x_XRD,
            lambda x: x @ up,
            None if gate is None else lambda x: x @ gate,
            lambda x: x @ down,
            self.experts.activation,
            0.0,
        )


def gathered(layer: StaticSwitch, x_AD: Tensor, expert_A: Tensor) -> Tensor:
    """Multiply every row with matrices of its own."""
    return layer.feed(x_AD[:, None], expert_A)[:, 0]


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
    return layer.feed(rows_RD.view(-1, TILE, x_AD.shape[1]), expert_X).flatten(0, 1)[slot_A]


def padded_to(factor: float) -> Way:
    """Return `padded`, where an expert has ceil(A / E * factor) slots for all rows of a batch.

    Assignments take slots in order; padding takes slots like any token. This is not the capacity
    of `Router`: it is computed in whole numbers, since a graph does not know A.

    factor: to two decimals.
    """
    hundredths = round(factor * _HUNDREDTHS)

    def padded(layer: StaticSwitch, x_AD: Tensor, expert_A: Tensor) -> Tensor:
        """Multiply the slots of every expert with its matrices; drop what finds no slot."""
        num_experts = layer.experts.num_experts
        share = _HUNDREDTHS * num_experts
        capacity = (x_AD.shape[0] * hundredths + share - 1) // share
        place_A, _ = queue(expert_A, num_experts)
        kept_A = place_A < capacity
        nowhere = num_experts * capacity  # one slot more, where all that is dropped goes
        slot_A = torch.where(kept_A, expert_A * capacity + place_A, nowhere)
        rows_RD = x_AD.new_zeros(nowhere + 1, x_AD.shape[1])
        rows_RD = rows_RD.index_put((slot_A,), x_AD * kept_A[:, None])
        slots_ECD = rows_RD[:nowhere].view(num_experts, capacity, x_AD.shape[1])
        y_RD = layer.feed(slots_ECD, None).flatten(0, 1)
        return y_RD[slot_A.clamp(max=nowhere - 1)] * kept_A[:, None]

    return padded


def queue(expert_A: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return place_A, each assignment's place in the queue of its expert, and counts_E; int64."""
    wants_AE = (expert_A[:, None] == torch.arange(num_experts, device=expert_A.device)).long()
    place_A = (wants_AE.cumsum(0) * wants_AE).sum(1) - 1
    return place_A, wants_AE.sum(0)
