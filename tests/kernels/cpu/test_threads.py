"""Each part of the work runs on its own thread, and errors are raised."""

import threading

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from switchlm.kernels.cpu import grouped, threads


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
    threads.parallel_for(note, parts)
    assert seen[0][0] == threading.get_ident()
    assert all(threads == 1 for _, threads, _ in seen.values())
    assert torch.get_num_threads() == 3
    with torch.inference_mode():
        threads.parallel_for(note, parts)
    assert all(inference for _, _, inference in seen.values())


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_in_a_thread_reaches_the_caller(failing: int) -> None:
    torch.set_num_threads(2)

    def fail(part: list[int]) -> None:
        if part[0] == failing:
            raise ValueError("broken expert")

    with pytest.raises(ValueError, match="broken expert"):
        threads.parallel_for(fail, [[0], [1]])
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("shared_out")
def test_a_flop_counter_sees_every_thread() -> None:
    x_RD, weight_EDF = torch.randn(12, 4), torch.randn(3, 4, 5)
    with FlopCounterMode(display=False) as counter:
        grouped.grouped_matmul(x_RD, weight_EDF, torch.tensor([4, 4, 4]))
    assert counter.get_total_flops() == 2 * 12 * 4 * 5
