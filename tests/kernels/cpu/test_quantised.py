"""Equal to integer sums in int64, and to matmul with the dequantised weight."""

import time

import pytest
import torch

from switchlm.kernels.cpu import quantised, small_batch
from switchlm.kernels.cpu.quantised import Int4Matrix, Int8Matrix, matrix, pack_int4, quantise_rows

ROWS = (1, 2, 7, 16, quantised.MANY_ROWS + 3)
CHECKS = ("int8_matmul_works", "int4_matmul_works")


def int8_matrix(outputs=96, inputs=128):
    codes_NK = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    return Int8Matrix(codes_NK, torch.rand(outputs) + 0.1)


def int4_matrix(outputs=100, inputs=192, groups=3):
    codes_NK = torch.randint(0, 16, (outputs, inputs))
    scale_GN2 = torch.randn(groups, -(-outputs // 64) * 64, 2).to(torch.bfloat16)
    return matrix(pack_int4(codes_NK), scale_GN2, outputs), codes_NK, scale_GN2[:, :outputs]


@pytest.fixture(params=["native", "operators", "none"])
def operators(request, monkeypatch):
    """By C, by PyTorch's private operators, and as if a version of PyTorch had none of them."""
    if request.param != "native":
        monkeypatch.setattr(small_batch, "is_small", lambda *_: False)
    if request.param == "none":
        for name in CHECKS:
            monkeypatch.setattr(quantised, name, lambda: False)


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="no instructions for it here")
def test_the_operators_are_there():
    assert quantised.int8_matmul_works()


@pytest.mark.parametrize("name", CHECKS)
def test_a_bfloat16_model_may_be_the_first_to_ask(name):
    works = getattr(quantised, name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert works.__wrapped__() == works()


def test_an_operator_that_is_slow_is_not_used(monkeypatch):
    quick = torch._int_mm

    def slow(x, w):
        time.sleep(0.05)
        return quick(x, w)

    monkeypatch.setattr(torch, "_int_mm", slow)
    assert not quantised.int8_matmul_works.__wrapped__()


def test_sums_too_large_for_float32_are_taken_in_exact_parts(monkeypatch):
    monkeypatch.setattr(quantised, "int8_matmul_works", lambda: False)
    monkeypatch.setattr(small_batch, "is_small", lambda *_: False)
    codes_NK = torch.full((32, 2048), 127, dtype=torch.int8)
    codes_NK[:, 1] = 126
    y_RN = Int8Matrix(codes_NK, torch.ones(32))(torch.full((3, 2048), 127.0))
    assert (y_RN == 127 * (2047 * 127 + 126)).all()


@pytest.mark.parametrize("rows", ROWS)
def test_int8_sums_are_those_of_integers(rows, operators):
    plain = int8_matrix()
    x_RK = torch.randn(rows, 128)
    codes_RK, scale_R1 = quantise_rows(x_RK)
    sums_RN = codes_RK.long() @ plain.codes.long().t()
    expected = sums_RN.double() * plain.scale_N * scale_R1
    torch.testing.assert_close(plain(x_RK).double(), expected, rtol=1e-6, atol=1e-6)


def test_rows_of_int8_do_not_depend_on_other_rows():
    one = int8_matrix()
    x_RK = torch.randn(40, 128) * torch.logspace(-3, 3, 40)[:, None]
    together = one(x_RK)
    for row in range(40):
        assert torch.equal(one(x_RK[row : row + 1])[0], together[row])


def test_quantised_rows_are_within_half_a_step():
    x_RK = torch.randn(5, 64)
    x_RK[3] = 0
    codes_RK, scale_R1 = quantise_rows(x_RK)
    assert codes_RK.dtype == torch.int8
    assert ((codes_RK * scale_R1 - x_RK).abs() <= 0.501 * scale_R1).all()
    assert not codes_RK[3].any()


def test_int4_codes_follow_the_layout():
    one, codes_NK, scale_GN2 = int4_matrix()
    for output, source in ((0, 0), (31, 5), (32, 40), (63, 191), (99, 128)):
        scale, offset = scale_GN2[source // 64, output].float()
        expected = (codes_NK[output, source] - 8) * scale + offset
        assert one.dequantise()[output, source] == expected
    pair = one.codes[0, 7, 3]
    assert (pair & 15, pair >> 4) == (codes_NK[3, 7], codes_NK[35, 7])
    index = torch.tensor([0, 99, 33, 64])
    assert torch.equal(one.rows(index), one.dequantise()[index])


@pytest.mark.parametrize("rows", ROWS)
def test_int4_equals_matmul_with_the_dequantised_weight(rows, operators):
    one, _, _ = int4_matrix()
    x_RK = torch.randn(rows, 192)
    expected = x_RK.to(torch.bfloat16).double() @ one.dequantise().double().t()
    error = (one(x_RK).double() - expected).abs().max() / expected.abs().max()
    assert error < 2**-7  # two roundings to bfloat16


@pytest.mark.parametrize("make", [int8_matrix, lambda: int4_matrix()[0]], ids=["int8", "int4"])
def test_the_output_has_the_dtype_of_the_rows(make):
    one = make()
    inputs = one.dequantise().shape[1]
    assert one(torch.randn(2, inputs, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert one(torch.randn(0, inputs)).shape == (0, one.num_outputs)


def test_a_missing_operator_is_no_error(monkeypatch):
    def missing(*_arguments):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(torch, "_int_mm", missing)
    monkeypatch.setattr(torch, "_weight_int4pack_mm_for_cpu", missing)
    assert not quantised.int8_matmul_works.__wrapped__()
    assert not quantised.int4_matmul_works.__wrapped__()


def test_an_operator_that_multiplies_wrongly_is_not_used(monkeypatch):
    monkeypatch.setattr(torch, "_int_mm", lambda x, w: (x.int() @ w.int()).clamp(max=2**15 - 1))
    assert not quantised.int8_matmul_works.__wrapped__()


@pytest.mark.parametrize(("inputs", "most", "found"), [
    (768, 64, 64), (96, 64, 32), (96, 256, 32), (256, 256, 256), (24, 64, None),
])  # fmt: skip
def test_groups_divide_the_inputs(inputs, most, found):
    assert quantised.group_size_of(inputs, most) == found


def test_it_is_a_matrix_of_the_right_kind():
    assert isinstance(int4_matrix()[0], Int4Matrix)
    assert isinstance(matrix(torch.zeros(4, 4, dtype=torch.int8), torch.ones(4), 4), Int8Matrix)
