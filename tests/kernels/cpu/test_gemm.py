"""Equals torch.mm in float64, for every memory layout of experts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from switchlm.kernels.cpu import grouped, native, small_matmul
from switchlm.kernels.cpu.grouped import matmul_into

pytestmark = pytest.mark.skipif(native.native().library is None, reason=native.native().reason)
SHAPES = [(1, 64, 256), (7, 48, 80), (16, 600, 192), (130, 32, 16), (64, 16, 48), (3, 5, 16)]


def plain(rows, columns):
    return torch.randn(rows, columns)


def transposed(rows, columns):
    return torch.randn(columns, rows).t()


def cut(rows, columns):
    """A few columns of a wider matrix, as of an expert that two threads share."""
    return torch.randn(rows, columns + 32)[:, 16 : columns + 16]


def cut_and_transposed(rows, columns):
    return cut(columns, rows).t()


@pytest.fixture
def ours(monkeypatch):
    """Fail where PyTorch would multiply."""

    def refuse(*_arguments, **_options):
        raise AssertionError("PyTorch was asked")

    monkeypatch.setattr(torch, "mm", refuse)
    monkeypatch.setattr(grouped, "MOST_ROWS", 1000)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("a", "b", "y"),
    [
        (plain, plain, plain),  # up, down
        (plain, cut, cut),
        (cut, plain, plain),
        (plain, transposed, plain),  # gradients of rows
        (cut, cut_and_transposed, cut),
        (transposed, plain, plain),  # gradients of weights
        (transposed, cut, cut),
    ],
)
@pytest.mark.parametrize("large", [False, True])
def test_equals_torch_mm(shape, a, b, y, large, ours):
    rows, inputs, outputs = shape
    if b in (transposed, cut_and_transposed) and inputs % 16:
        pytest.skip("no whole vectors: PyTorch's")
    torch.manual_seed(0)
    a_MK, b_KN, y_MN = a(rows, inputs), b(inputs, outputs), y(rows, outputs)
    expected = a_MK.double() @ b_KN.double()
    assert matmul_into(a_MK, b_KN, y_MN, large=large) is y_MN
    torch.testing.assert_close(y_MN.double(), expected, rtol=1e-5, atol=1e-4)
    matmul_into(a_MK, b_KN, y_MN, add=True, large=large)
    torch.testing.assert_close(y_MN.double(), 2 * expected, rtol=1e-5, atol=1e-4)


def test_it_writes_nothing_beside_the_result(ours):
    whole = torch.full((9, 96), 7.0)
    for large in (False, True):
        matmul_into(torch.randn(5, 64), torch.randn(64, 48), whole[2:7, 16:64], large=large)
    whole[2:7, 16:64] = 7
    assert (whole == 7).all()


@pytest.mark.parametrize("case", ["many rows", "bfloat16", "odd width", "without a library"])
def test_what_does_not_fit_is_pytorchs(case, monkeypatch):
    rows = grouped.MOST_ROWS + 1 if case == "many rows" else 4
    width = 40 if case == "odd width" else 48
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    if case == "without a library":
        monkeypatch.setattr(native, "native", lambda: native.Native(None, "none"))
    monkeypatch.setattr(small_matmul, "is_slow", lambda dtype: False)
    a_MK, b_KN = torch.randn(rows, 32).to(dtype), torch.randn(32, width).to(dtype)
    called = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **o: called.append(1) or real(*a, **o))
    found = matmul_into(a_MK, b_KN, torch.empty(rows, width, dtype=dtype))
    assert called
    torch.testing.assert_close(found, a_MK @ b_KN)
    torch.testing.assert_close(
        matmul_into(a_MK, b_KN, found.clone(), add=True), found + a_MK @ b_KN
    )


@pytest.mark.parametrize("other", ["b", "result"])
@pytest.mark.parametrize("add", [False, True])
def test_another_dtype_of_any_factor_is_not_read_as_float32(other, add):
    a_MK, b_KN, y_MN = torch.randn(4, 32), torch.randn(32, 48), torch.zeros(4, 48)
    if other == "b":
        b_KN = b_KN.double()
    else:
        y_MN = y_MN.double()
    with pytest.raises(RuntimeError, match=r"dtype|same type"):
        matmul_into(a_MK, b_KN, y_MN, add=add)


def test_in_a_dispatch_mode_pytorchs_operators_run():
    with FlopCounterMode(display=False) as counter:
        matmul_into(torch.randn(4, 32), torch.randn(32, 48), torch.empty(4, 48))
    assert counter.get_total_flops() == 2 * 4 * 32 * 48
