"""Experts are shared out evenly, every row to exactly one thread, and errors come back."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from switchlm.kernels import cpu, workers


@given(counts=st.lists(st.integers(0, 500), min_size=1, max_size=80), threads=st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_every_row_is_someones_once(counts: list[int], threads: int) -> None:
    torch.set_num_threads(threads)
    plan = workers.plan(counts, sum(counts) + 3, work_per_row=2**22)
    busy = sorted(expert for part in plan.parts for expert in part)
    assert busy == [expert for expert, count in enumerate(counts) if count]
    assert plan.idle == [expert for expert, count in enumerate(counts) if not count]
    assert plan.sizes == [*counts, 3]
    assert len(plan.parts) in (1, threads)


def test_even_loads_are_shared_and_lopsided_ones_are_not() -> None:
    torch.set_num_threads(2)
    assert len(workers.plan([900, 1000, 1100, 1000], 4000, 2**16).parts) == 2
    assert len(workers.plan([3990, 10, 0, 0], 4000, 2**16).parts) == 1
    assert len(workers.plan([4000], 4000, 2**16).parts) == 1


def test_little_work_stays_on_one_thread() -> None:
    torch.set_num_threads(2)
    assert len(workers.plan([10, 10], 20, 16).parts) == 1


def test_parts_run_on_threads_of_their_own_without_gradients() -> None:
    torch.set_num_threads(3)
    seen = {}

    def note(part: list[int]) -> None:
        seen[part[0]] = (
            threading.get_ident(),
            torch.get_num_threads(),
            torch.is_inference_mode_enabled(),
        )
        if threading.current_thread() is not threading.main_thread():
            assert not torch.is_grad_enabled()

    parts = [[0], [1], [2]]
    workers.share(note, parts)
    assert seen[0][0] == threading.get_ident()
    assert all(threads == 1 for _, threads, _ in seen.values())
    assert torch.get_num_threads() == 3
    with torch.inference_mode():
        workers.share(note, parts)
    assert all(inference for _, _, inference in seen.values())


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_in_a_thread_reaches_the_caller(failing: int) -> None:
    torch.set_num_threads(2)

    def fail(part: list[int]) -> None:
        if part[0] == failing:
            raise ValueError("broken expert")

    with pytest.raises(ValueError, match="broken expert"):
        workers.share(fail, [[0], [1]])
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("shared_out")
def test_a_flop_counter_sees_every_thread() -> None:
    x_RD, weight_EDF = torch.randn(12, 4), torch.randn(3, 4, 5)
    with FlopCounterMode(display=False) as counter:
        cpu.grouped_matmul(x_RD, weight_EDF, torch.tensor([4, 4, 4]))
    assert counter.get_total_flops() == 2 * 12 * 4 * 5
