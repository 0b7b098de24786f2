"""Selection of experts by tokens, or of tokens by experts, within capacity.

Functions take probability_NE (float32) and return choices, without gradients: gates are taken from
the probabilities afterwards. In training noise on the router's input explores experts (appendix C).

Shapes: N tokens, K choices per token, A = N * K assignments, E experts, G groups of S tokens, C
capacity.
"""

import torch
from torch import Tensor, nn

from switchlm import _torch
from switchlm.model.semantics import Semantics


def group_size(
    num_tokens: int, row_tokens: int, semantics: Semantics, group_rows: int | None = None
) -> int:
    """Return S, how many consecutive tokens share capacity; the last group may be shorter.

    A row is a group in `hf`; elsewhere the tokens of a process are split evenly over the fewest
    groups of at most `semantics.group_tokens`. Mesh TensorFlow and Flaxformer start from
    num_tokens // group_tokens groups, so that theirs may be up to twice as long, and look for a
    number of groups that divides the tokens; in Flaxformer it is a multiple of the experts times
    their replicas, so that no group spans devices.

    group_rows: the number of rows per group instead.
    """
    if group_rows is not None:
        return at_least(1, row_tokens * group_rows)
    if semantics.group_tokens is None:
        return at_least(1, row_tokens)
    num_groups = at_least(1, _ceil_div(num_tokens, semantics.group_tokens))
    return at_least(1, _ceil_div(num_tokens, num_groups))


def expert_capacity(tokens: int, factor: float, num_experts: int, semantics: Semantics) -> int:
    """Return tokens / experts * factor (equation 3), rounded and bounded as the semantics say."""
    capacity = semantics.capacity_rounding(tokens * factor / num_experts)
    return at_least(semantics.min_capacity, torch.sym_min(tokens, capacity))


def at_least(least: int, number: int) -> int:
    """Return the larger one; of a symbolic number the branch of `max` would become a condition."""
    larger: int = torch.sym_max(number, least)
    return larger


def _ceil_div(number: int, by: int) -> int:
    return (number + by - 1) // by  # torch.export fails at -(-number // by)


def count_groups(num_tokens: int, tokens_per_group: int) -> int:
    """Return G, at least one group.

    For torch.export it is a number of its own, or programs were for as many groups as the example.
    """
    num_groups = at_least(1, _ceil_div(num_tokens, tokens_per_group))
    return _torch.unknown_size(num_groups) if torch.compiler.is_exporting() else num_groups


def grouped(values_NX: Tensor, tokens_per_group: int) -> Tensor:
    """Return values_GSX, the last group padded with zeros; at least one group.

    A single group has no padding, however large groups may be.
    """
    num_tokens = values_NX.shape[0]
    tokens_per_group = torch.sym_min(tokens_per_group, at_least(1, num_tokens))
    num_groups = count_groups(num_tokens, tokens_per_group)
    missing = num_groups * tokens_per_group - num_tokens
    if torch.compiler.is_exporting() or missing:
        values_NX = nn.functional.pad(values_NX, (0, 0, 0, missing))
    return values_NX.view(num_groups, tokens_per_group, values_NX.shape[1])


def sum_by_group(values_NX: Tensor, tokens_per_group: int, num_groups: int) -> Tensor:
    """Return sum_GX; for torch.export without a view by group, whose number is unknown."""
    if not torch.compiler.is_exporting():
        return grouped(values_NX, tokens_per_group).sum(1)
    group_N = torch.arange(values_NX.shape[0], device=values_NX.device) // tokens_per_group
    return values_NX.new_zeros(num_groups, values_NX.shape[1]).index_add(0, group_N, values_NX)


@torch.no_grad()
def count_by_group(
    expert_NK: Tensor, valid_N: Tensor | None, tokens_per_group: int, num_experts: int
) -> Tensor:
    """Return float32 count_GE: how often the real tokens of a group chose each expert."""
    num_tokens = expert_NK.shape[0]
    num_groups = count_groups(num_tokens, tokens_per_group)
    group_N = torch.arange(num_tokens, device=expert_NK.device) // tokens_per_group
    cell_NK = group_N[:, None] * num_experts + expert_NK
    weight_NK = torch.ones(expert_NK.shape, device=expert_NK.device)
    if valid_N is not None:
        weight_NK = weight_NK * valid_N[:, None]
    count = torch.zeros(num_groups * num_experts, device=expert_NK.device)
    count.scatter_add_(0, cell_NK.reshape(-1), weight_NK.reshape(-1))
    return count.view(num_groups, num_experts)


def position_in_expert(expert_NK: Tensor, group_N: Tensor, num_experts: int) -> Tensor:
    """Return each assignment's place in the queue of its expert within its group, from 0.

    Tokens queue in token order, all first choices before any second choice. An expert of
    `num_experts` (padding) has its own queue. All int64; returns position_NK.
    """
    num_tokens, num_choices = expert_NK.shape
    key_A = (group_N[:, None] * (num_experts + 1) + expert_NK).T.reshape(-1)
    sorted_A, order_A = torch.sort(key_A, stable=True)
    first_A = torch.searchsorted(sorted_A, sorted_A)
    position_A = torch.empty_like(order_A)
    position_A[order_A] = torch.arange(key_A.numel(), device=key_A.device) - first_A
    return position_A.view(num_choices, num_tokens).T


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

    The largest of probability / exponential noise is each with its probability. torch.multinomial
    does the same, but the host waits for it to check the probabilities.
    """
    probability_NE = probability_NE.float()
    noise_NE = torch.empty_like(probability_NE).exponential_()
    return (probability_NE / noise_NE).argmax(-1, keepdim=True)


@torch.no_grad()
def reroute_overflow(
    probability_NE: Tensor,
    first_N1: Tensor,
    valid_N1: Tensor,
    group_N: Tensor,
    num_groups: int,
    capacity: int,
) -> tuple[Tensor, Tensor]:
    """No-token-left-behind (appendix B): overflow goes to the next best expert, round by round.

    In each round the tokens without a slot queue for their next expert in token order.

    first_N1: int64, the first choice of each token; further ones are by probability.

    Returns expert_N1 (the one that took the token, or the last choice) and kept_N1.
    """
    num_experts = probability_NE.shape[1]
    left_NE = probability_NE.clone()
    next_N, expert_N, valid_N = first_N1[:, 0], first_N1[:, 0], valid_N1[:, 0]
    kept_N = torch.zeros_like(valid_N)
    taken = torch.zeros(num_groups * (num_experts + 1), dtype=torch.long, device=group_N.device)
    for _ in range(num_experts):
        overflow_N = valid_N & ~kept_N
        if not torch.compiler.is_exporting() and not overflow_N.any():
            break
        expert_N = torch.where(overflow_N, next_N, expert_N)
        queued_N = torch.where(overflow_N, next_N, num_experts)
        place_N = position_in_expert(queued_N[:, None], group_N, num_experts)[:, 0]
        slot_N = group_N * (num_experts + 1) + queued_N
        placed_N = overflow_N & (place_N + taken[slot_N] < capacity)
        kept_N = kept_N | placed_N
        taken = taken.index_add(0, slot_N, placed_N.long())
        left_NE.scatter_(1, next_N[:, None], -torch.inf)
        next_N = left_NE.argmax(-1)
    return expert_N[:, None], kept_N[:, None]


@torch.no_grad()
def expert_choice(
    probability_GSE: Tensor, valid_GS: Tensor, capacity: int
) -> tuple[Tensor, Tensor]:
    """Every expert picks its `capacity` most probable tokens of a group (Zhou et al. 2022).

    Returns token_GEC, int64 positions in the group, and kept_GEC, false where padding was picked
    since there were too few tokens. Not causal: for encoders only.
    """
    score_GES = probability_GSE.masked_fill(~valid_GS[..., None], -1.0).transpose(1, 2)
    top = score_GES.topk(torch.sym_min(capacity, score_GES.shape[-1]), dim=-1)
    return top.indices, top.values >= 0


def explore(x_ND: Tensor, kind: str, rate: float) -> Tensor:
    """Return the router's input in training.

    `jitter` multiplies every element with U(1 - rate, 1 + rate), in float32; `input_dropout` drops
    elements with that rate; other kinds do not change the input.
    """
    if rate == 0 or kind not in ("jitter", "input_dropout"):
        return x_ND
    if kind == "input_dropout":
        return nn.functional.dropout(x_ND, rate)
    noise_ND = torch.empty_like(x_ND, dtype=torch.float32).uniform_(1 - rate, 1 + rate)
    return x_ND.float() * noise_ND
