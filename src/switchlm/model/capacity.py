"""Expert capacity: how many tokens an expert takes from a group, and which ones.

Shapes: N tokens, K choices a token, A = N * K assignments, E experts, G groups of S tokens.
"""

import math

import torch
from torch import Tensor, nn

from switchlm.model.semantics import Semantics


def group_size(
    num_tokens: int, row_tokens: int, semantics: Semantics, group_rows: int | None = None
) -> int:
    """Return S, how many consecutive tokens share capacity; the last group may be shorter.

    A row is a group in `hf`; elsewhere tokens are split over the fewest groups that keep each at
    most `semantics.group_tokens` long, evenly, so that only the last may be shorter. Mesh
    TensorFlow and Flaxformer start from num_tokens // group_tokens groups, so that theirs may be up
    to twice as long, and look for a number of groups that divides the tokens; Flaxformer also asks
    for a multiple of the number of experts times their replicas, which keeps groups from spanning
    devices. Here the tokens of one process are split, and never span anything.

    group_rows: that many rows are a group instead, however many rows a process has.
    """
    if group_rows is not None:
        return max(row_tokens * group_rows, 1)
    if semantics.group_tokens is None:
        return max(row_tokens, 1)
    num_groups = math.ceil(num_tokens / semantics.group_tokens)
    return max(math.ceil(num_tokens / max(num_groups, 1)), 1)


def expert_capacity(tokens: int, factor: float, num_experts: int, semantics: Semantics) -> int:
    """Return tokens / experts * factor (equation 3), rounded and bounded as the semantics say."""
    capacity = semantics.capacity_rounding(tokens * factor / num_experts)
    return max(min(tokens, capacity), semantics.min_capacity)


def grouped(values_NX: Tensor, tokens_a_group: int) -> Tensor:
    """Return values_GSX, a short last group filled up with zeros; at least one group."""
    num_tokens = values_NX.shape[0]
    num_groups = max(math.ceil(num_tokens / tokens_a_group), 1)
    missing = num_groups * tokens_a_group - num_tokens
    if missing:
        values_NX = nn.functional.pad(values_NX, (0, 0, 0, missing))
    return values_NX.view(num_groups, tokens_a_group, values_NX.shape[1])


@torch.no_grad()
def count_by_group(
    expert_NK: Tensor, valid_N: Tensor | None, tokens_a_group: int, num_experts: int
) -> Tensor:
    """Return float32 count_GE: how often the real tokens of a group named each expert."""
    num_tokens = expert_NK.shape[0]
    num_groups = max(math.ceil(num_tokens / tokens_a_group), 1)
    group_N = torch.arange(num_tokens, device=expert_NK.device) // tokens_a_group
    cell_NK = group_N[:, None] * num_experts + expert_NK
    weight_NK = torch.ones(expert_NK.shape, device=expert_NK.device)
    if valid_N is not None:
        weight_NK = weight_NK * valid_N[:, None]
    count = torch.zeros(num_groups * num_experts, device=expert_NK.device)
    count.scatter_add_(0, cell_NK.reshape(-1), weight_NK.reshape(-1))
    return count.view(num_groups, num_experts)


def position_in_expert(expert_NK: Tensor, group_N: Tensor, num_experts: int) -> Tensor:
    """Return each assignment's place in the queue of its expert within its group, from 0.

    Tokens queue in token order; every first choice stands before any second choice. An expert of
    `num_experts` (padding) queues apart. All int64; returns position_NK.
    """
    num_tokens, num_choices = expert_NK.shape
    key_A = (group_N[:, None] * (num_experts + 1) + expert_NK).T.reshape(-1)
    sorted_A, order_A = torch.sort(key_A, stable=True)
    first_A = torch.searchsorted(sorted_A, sorted_A)
    position_A = torch.empty_like(order_A)
    position_A[order_A] = torch.arange(key_A.numel(), device=key_A.device) - first_A
    return position_A.view(num_choices, num_tokens).T
