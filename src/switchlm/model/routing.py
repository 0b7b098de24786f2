"""The routing of one Switch layer, and the output of the model with all of them.

Shapes: N tokens, E experts, G groups, A assignments (of a token to an expert).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Routing:
    """The assignments of tokens to experts in one Switch layer, and its statistics.

    An assignment sends one token to one expert. With one expert per token there are N assignments
    in token order, so `expert_A` is each token's expert; with K experts per token, the K of a token
    are consecutive.

    expert_A: int64, the expert of each assignment.
    gate_A: float32, the weight of the expert's output: the softmax value, with gradients.
    kept_A: bool, false where capacity dropped the token (its output is zero) or it is padding.
    token_A: int64, the token of each assignment; None where they are in token order.
    load_E: int64, assignments of each expert, before dropping.
    fraction_GE, probability_GE: float32, a group's share of tokens by expert (f in equation 5), and
        its mean router probability (P in equation 6); only the second carries gradients.
    balance_loss: float32 scalar, E times the sum of f * P, mean over groups: 1 when uniform. Not
        yet weighted.
    z_loss: float32 scalar, mean over the tokens of a group of logsumexp(logits)^2, mean over
        groups. Not yet weighted.
    logits_NE: of the router, before the softmax; None unless it keeps them (see Router).
    """

    expert_A: Tensor
    gate_A: Tensor
    kept_A: Tensor
    token_A: Tensor | None
    load_E: Tensor
    fraction_GE: Tensor
    probability_GE: Tensor
    balance_loss: Tensor
    z_loss: Tensor
    logits_NE: Tensor | None = None

    @property
    def dropped(self) -> Tensor:
        """The fraction of assignments that capacity dropped, a float32 scalar."""
        total = self.load_E.sum()
        return (total - self.kept_A.sum()) / total.clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class ModelOutput:
    """logits_BTV, and the routing of every Switch layer of each stack, in layer order."""

    logits_BTV: Tensor
    encoder_routing: tuple[Routing, ...]
    decoder_routing: tuple[Routing, ...]

    @property
    def routing(self) -> tuple[Routing, ...]:
        """Every Switch layer's routing, the encoder's first."""
        return self.encoder_routing + self.decoder_routing


# Programs of torch.export return these records, and are saved with their names.
for record in (Routing, ModelOutput):
    torch.export.register_dataclass(record, serialized_type_name=f"switchlm.{record.__name__}")
