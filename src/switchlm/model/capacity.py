"""Expert capacity: how many tokens an expert takes from a group, and which ones.

Shapes: N tokens, K choices a token, A = N * K assignments, E experts.
"""

import math

import torch
from torch import Tensor

from switchlm.model.semantics import Semantics


def group_size(num_tokens: int, row_tokens: int, semantics: Semantics) -> int:
    """Return how many consecutive tokens share capacity; the last group may be shorter.

    A row is a group in `hf`; elsewhere tokens are split over the fewest groups that keep each at
    most `semantics.group_tokens` long, evenly.
    """
    if semantics.group_tokens is None:
        return row_tokens
    num_groups = math.ceil(num_tokens / semantics.group_tokens)
    return math.ceil(num_tokens / max(num_groups, 1))


def expert_capacity(tokens: int, factor: float, num_experts: int, semantics: Semantics) -> int:
    """Return tokens / experts * factor (equation 3), rounded and bounded as the semantics say."""
    capacity = semantics.capacity_rounding(tokens * factor / num_experts)
    return max(min(tokens, capacity), semantics.min_capacity)


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
