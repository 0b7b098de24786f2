import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from switchlm.model.selection import (
    count_by_group,
    expert_capacity,
    group_size,
    grouped,
    position_in_expert,
)
from switchlm.model.semantics import SEMANTICS

PAPER, T5X, HF = SEMANTICS["paper"], SEMANTICS["t5x"], SEMANTICS["hf"]


@pytest.mark.parametrize(
    ("mode", "tokens", "factor", "experts", "capacity"),
    [
        ("paper", 1024, 1.25, 128, 10),
        ("paper", 1024, 1.25, 64, 20),
        ("paper", 1024, 1.99, 128, 15),  # 15.92: the floor
        ("paper", 1024, 1.0, 512, 4),  # 2 raised to the minimum
        ("paper", 64, 2.0, 1, 64),  # never more than the group holds
        ("paper", 2, 1.0, 1, 4),  # but the minimum is not bounded by the group
        ("t5x", 1000, 1.25, 128, 10),  # 9.77 is rounded
        ("t5x", 20, 1.25, 10, 4),  # 2.5 to even is 2, raised to the minimum
        ("t5x", 36, 1.25, 10, 4),  # 4.5 goes to even
        ("t5x", 44, 1.25, 10, 6),  # 5.5 goes to even
        ("hf", 512, 1.0, 8, 64),
    ],
)
def test_capacity_of_the_named_semantics(
    mode: str, tokens: int, factor: float, experts: int, capacity: int
) -> None:
    assert expert_capacity(tokens, factor, experts, SEMANTICS[mode]) == capacity


@pytest.mark.parametrize(
    ("tokens", "size"),
    [(1024, 1024), (2048, 1024), (1025, 513), (12288, 1024), (3648, 912), (7, 7), (0, 1)],
)
def test_groups_of_the_paper_span_rows_and_hold_1024_tokens_at_most(tokens: int, size: int) -> None:
    assert group_size(tokens, 192, PAPER) == size


def test_a_row_is_a_group_in_hf() -> None:
    assert group_size(12288, 192, HF) == 192
    assert group_size(0, 0, HF) == 1


@given(st.integers(0, 10_000), st.integers(1, 700))
def test_groups_are_even_and_within_the_limit(tokens: int, limit: int) -> None:
    size = group_size(tokens, 1, dataclasses.replace(T5X, group_tokens=limit))
    assert 1 <= size <= limit
    groups = -(-tokens // size)
    assert groups == 0 or (groups - 1) * size < tokens <= groups * size
    assert groups <= -(-tokens // limit), "no more groups than needed"


def test_a_short_last_group_is_filled_with_zeros() -> None:
    values_NX = torch.arange(10.0).view(5, 2)
    values_GSX = grouped(values_NX, 3)
    assert values_GSX.shape == (2, 3, 2)
    assert torch.equal(values_GSX.view(6, 2)[:5], values_NX)
    assert values_GSX[1, 2].eq(0).all()
    assert grouped(torch.empty(0, 2), 3).shape == (1, 1, 2)
    assert grouped(values_NX, 10**12).shape == (1, 5, 2)  # a single group needs no zeros


assignments = st.integers(1, 6).flatmap(
    lambda experts: st.tuples(
        st.just(experts),
        st.integers(1, 5),
        st.integers(1, 3).flatmap(
            lambda choices: st.lists(
                st.lists(st.integers(0, experts), min_size=choices, max_size=choices),
                min_size=1,
                max_size=20,
            )
        ),
    )
)


@given(assignments)
def test_positions_are_a_running_count_of_first_choices_before_second(
    drawn: tuple[int, int, list[list[int]]],
) -> None:
    experts, size, choices = drawn
    expert_NK = torch.tensor(choices)
    group_N = torch.arange(len(choices)) // size
    place_NK = position_in_expert(expert_NK, group_N, experts)
    queues: dict[tuple[int, int], int] = {}
    for k in range(expert_NK.shape[1]):
        for n in range(len(choices)):
            queue = (int(group_N[n]), choices[n][k])
            assert place_NK[n, k] == queues.get(queue, 0)
            queues[queue] = queues.get(queue, 0) + 1


@given(assignments, st.randoms(use_true_random=False))
def test_counts_leave_padding_out(drawn: tuple[int, int, list[list[int]]], random) -> None:
    experts, size, choices = drawn
    expert_NK = torch.tensor(choices)
    valid = [random.random() < 0.7 for _ in choices]
    count_GE = count_by_group(expert_NK, torch.tensor(valid), size, experts + 1)
    assert count_GE.sum() == sum(valid) * expert_NK.shape[1]
    for group in range(count_GE.shape[0]):
        members = range(group * size, min((group + 1) * size, len(choices)))
        for expert in range(experts + 1):
            expected = sum(choices[n].count(expert) for n in members if valid[n])
            assert count_GE[group, expert] == expected
