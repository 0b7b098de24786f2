"""How experts and tokens find each other, given the router's probabilities.

Every function takes probability_NE (float32) and returns choices; none carries gradients, the gate
read off the probabilities afterwards does. Shapes: N tokens, K choices, E experts, G groups of S
tokens, C capacity.
"""

import torch
from torch import Tensor

from switchlm.model.capacity import position_in_expert


@torch.no_grad()
def choose(probability_NE: Tensor, num_choices: int, bias_E: Tensor | None = None) -> Tensor:
    """Return expert_NK: the most probable experts of each token, the first of equals.

    bias_E is added for the choice alone (auxiliary-loss-free balancing, DeepSeek-V3).
    """
    score_NE = probability_NE if bias_E is None else probability_NE + bias_E
    if num_choices == 1:
        return score_NE.argmax(-1, keepdim=True)
    return score_NE.topk(num_choices, dim=-1).indices


@torch.no_grad()
def sample(probability_NE: Tensor) -> Tensor:
    """Return expert_NK, K = 1, drawn from the softmax (appendix C).

    Of exponential variables divided by rates the least is each with the probability of its rate;
    torch.multinomial does the same, but makes the host wait to see that probabilities are valid.
    """
    probability_NE = probability_NE.float()
    waiting_NE = torch.empty_like(probability_NE).exponential_()
    return (probability_NE / waiting_NE).argmax(-1, keepdim=True)


@torch.no_grad()
def reroute_overflow(
    probability_NE: Tensor, first_N1: Tensor, valid_N1: Tensor, group_N: Tensor, capacity: int
) -> tuple[Tensor, Tensor]:
    """No-token-left-behind (appendix B): overflow asks the next best expert, round by round.

    first_N1: int64, the expert that each token asks first; then it goes by probability. A token
    that found a seat keeps it; those still standing queue for their next choice in token order.
    Returns expert_N1 (the one that took the token, or the last one asked) and kept_N1.
    """
    num_experts = probability_NE.shape[1]
    num_groups = int(group_N.max()) + 1 if group_N.numel() else 0
    left_NE = probability_NE.clone()
    next_N, expert_N, valid_N = first_N1[:, 0], first_N1[:, 0], valid_N1[:, 0]
    kept_N = torch.zeros_like(valid_N)
    taken = torch.zeros(num_groups * (num_experts + 1), dtype=torch.long, device=group_N.device)
    for _ in range(num_experts):
        standing_N = valid_N & ~kept_N
        if not standing_N.any():
            break
        expert_N = torch.where(standing_N, next_N, expert_N)
        asked_N = torch.where(standing_N, next_N, num_experts)
        place_N = position_in_expert(asked_N[:, None], group_N, num_experts)[:, 0]
        seat_N = group_N * (num_experts + 1) + asked_N
        seated_N = standing_N & (place_N + taken[seat_N] < capacity)
        kept_N = kept_N | seated_N
        taken = taken + torch.bincount(seat_N[seated_N], minlength=taken.numel())
        left_NE.scatter_(1, next_N[:, None], -torch.inf)
        next_N = left_NE.argmax(-1)
    return expert_N[:, None], kept_N[:, None]


@torch.no_grad()
def expert_choice(
    probability_GSE: Tensor, valid_GS: Tensor, capacity: int
) -> tuple[Tensor, Tensor]:
    """Every expert picks its `capacity` most probable tokens of a group (Zhou et al. 2022).

    Returns token_GEC, int64 places within the group, and kept_GEC, false where padding was picked
    for want of tokens. Not causal: for encoders only.
    """
    score_GES = probability_GSE.masked_fill(~valid_GS[..., None], -1.0).transpose(1, 2)
    top = score_GES.topk(min(capacity, score_GES.shape[-1]), dim=-1)
    return top.indices, top.values >= 0
