"""Rows are padded to few sizes, and results have no padding."""

import pytest
import torch

from switchlm.kernels.cpu import small_matmul
from switchlm.kernels.cpu.memory import EXACT_ROWS, Workspace, keep, padded


@pytest.fixture(autouse=True)
def with_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_matmul, "is_slow", lambda dtype: False)


def test_there_are_few_sizes_and_little_is_wasted() -> None:
    sizes = {padded(rows, torch.bfloat16) for rows in range(1, 2049)}
    assert len(sizes) < 60
    for rows in range(EXACT_ROWS + 1, 2049):
        size = padded(rows, torch.bfloat16)
        assert rows <= size < rows + max(16, rows / 8)
        assert padded(size, torch.bfloat16) == size


def test_no_padding_where_shapes_are_not_compiled() -> None:
    rows = torch.randn(33, 4)
    assert Workspace(rows).filled("x", rows) is rows


def test_no_padding_where_matmul_is_upcast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_matmul, "is_slow", lambda dtype: dtype == torch.bfloat16)
    rows = torch.ones(33, 4, dtype=torch.bfloat16)
    assert Workspace(rows).filled("x", rows) is rows


@pytest.mark.parametrize("rows", [1, 16])
def test_few_rows_are_not_padded(rows: int) -> None:
    x = torch.ones(rows, 3, dtype=torch.bfloat16)
    assert Workspace(x).filled("x", x) is x


def test_rows_are_followed_by_zeros_whatever_the_buffer_held() -> None:
    spare = Workspace(torch.empty(0, dtype=torch.bfloat16))
    spare("x", 64, 3).fill_(float("nan"))
    full = spare.filled("x", torch.ones(33, 3, dtype=torch.bfloat16))
    assert full.shape == (48, 3)
    assert (full[:33] == 1).all()
    assert (full[33:] == 0).all()


def test_a_result_gets_its_rows_alone() -> None:
    result = torch.zeros(33, 2, dtype=torch.bfloat16)
    out = Workspace(result).output_for("y", result, 48)
    keep(out.fill_(7), result)
    assert (result == 7).all()
    assert Workspace(result).output_for("y", result, 33) is result
