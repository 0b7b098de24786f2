"""Every column of every expert with rows belongs to one thread, and threads have equal work."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from switchlm.kernels.cpu.grouped import FIXED_ROWS, Sums, make_schedule

COUNTS = st.lists(st.integers(0, 500), min_size=1, max_size=80)


@given(counts=COUNTS, threads=st.integers(1, 8), width=st.sampled_from([1, 40, 1024]))
def test_pieces_cover_every_number_once(counts: list[int], threads: int, width: int) -> None:
    torch.set_num_threads(threads)
    counts = [count * 4 for count in counts]  # some of several blocks
    plan = make_schedule(counts, sum(counts) + 3, work_per_row=2**22)
    seen = torch.zeros(sum(counts) + 3, width)
    for piece in plan.rows(seen, cut=True):
        piece += 1
    assert bool((seen[: sum(counts)] == 1).all())
    assert bool((seen[sum(counts) :] == 0).all())
    assert [p for part in plan.parts for p in part] == list(range(len(plan.pieces)))
    assert plan.idle == [expert for expert, count in enumerate(counts) if not count]
    assert plan.sizes == [*counts, 3]
    assert len(plan.parts) <= threads


@given(counts=COUNTS, threads=st.integers(1, 8))
def test_every_column_of_a_weight_begins_once_and_on_one_thread(
    counts: list[int], threads: int
) -> None:
    torch.set_num_threads(threads)
    counts = [count * 4 for count in counts]
    plan = make_schedule(counts, sum(counts), work_per_row=2**22)
    begun = torch.zeros(len(counts), 1, 48)
    thread_of: dict[tuple[int, float], int] = {}
    columns_P = plan.columns(begun, 1)
    for thread, part in enumerate(plan.parts):
        for p in part:
            piece = plan.pieces[p]
            columns_P[p] += piece.begins
            assert thread_of.setdefault((piece.expert, piece.start), thread) == thread
    assert begun[:, 0].tolist() == [[float(count > 0)] * 48 for count in counts]


@pytest.mark.parametrize(
    "counts", [[1000] * 4, [3990, 10, 0, 0], [4000], [10, 3990], [0, 900, 30, 70, 2000, 1000]]
)
def test_two_threads_have_equal_work_whatever_the_loads(counts: list[int]) -> None:
    torch.set_num_threads(2)
    plan = make_schedule(counts, 4000, 2**16)
    assert len(plan.parts) == 2
    first, second = (
        sum(
            (counts[piece.expert] + FIXED_ROWS) * (piece.stop - piece.start)
            for piece in (plan.pieces[p] for p in part)
            if piece.begins
        )
        for part in plan.parts
    )
    assert first == pytest.approx(second, rel=0.05)


def test_little_work_runs_on_one_thread() -> None:
    torch.set_num_threads(2)
    assert len(make_schedule([10, 10], 20, 16).parts) == 1


def test_rows_that_pieces_share_are_summed() -> None:
    torch.set_num_threads(3)
    plan = make_schedule([90, 10], 101, 2**22)
    rows = plan.empty(torch.empty(1), 2)
    sums = Sums(plan, rows)
    for out in sums.out_P:
        out.fill_(1)
    sums.add_up()
    pieces = [sum(piece.expert == expert for piece in plan.pieces) for expert in (0, 1)]
    assert pieces[0] > 1
    assert rows[:90].unique().tolist() == [pieces[0]]
    assert rows[90:100].unique().tolist() == [pieces[1]]
    assert rows[100].tolist() == [0, 0]
