"""Equal to PyTorch's linear, the reference for experts, and the quantised matrices."""

import subprocess

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from switchlm.kernels import reference, select
from switchlm.kernels.cpu import native, norm, quantised, small_batch

ROWS = (1, 2, 3, 6, 7, 16, 64)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.skipif(native.native().library is None, reason=native.native().reason)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def close(found, expected, dtype=torch.float32):
    size = expected.abs().max().item()
    tolerance = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 2e-6)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outputs", [64, 101, 960])
def test_linear(build, rows, dtype, outputs):
    x_RK, weight_NK = torch.randn(rows, 192).to(dtype), torch.randn(outputs, 192).to(dtype)
    y_RN = small_batch.linear(x_RK, weight_NK)
    assert y_RN.dtype == dtype
    close(y_RN, x_RK.double() @ weight_NK.double().t(), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", [[1], [0, 1, 0], [2, 0, 3, 1], [7, 16, 0, 30], [0, 0]], ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (640, 192), (1088, 448)], ids=str)
def test_experts_and_rows_past_the_counts(build, dtype, counts, shape):
    x_RK = torch.randn(sum(counts) + 2, shape[0]).to(dtype)
    weight_EKN = torch.randn(len(counts), *shape).to(dtype)
    y_RN = small_batch.grouped_matmul(x_RK, weight_EKN, torch.tensor(counts))
    expected = reference.grouped_matmul(x_RK.double(), weight_EKN.double(), torch.tensor(counts))
    assert not y_RN[sum(counts) :].any()
    close(y_RN, expected, dtype)


def int8_matrix(outputs=96, inputs=192):
    codes_NK = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    return quantised.Int8Matrix(codes_NK, torch.rand(outputs) + 0.1)


def int4_matrix(outputs=100, inputs=192, groups=3):
    scale_GN2 = torch.randn(groups, -(-outputs // 64) * 64, 2).to(torch.bfloat16)
    codes_NK = torch.randint(0, 16, (outputs, inputs))
    return quantised.Int4Matrix(quantised.pack_int4(codes_NK), scale_GN2, outputs)


@pytest.mark.parametrize("rows", ROWS)
def test_int8_gives_the_bits_of_the_plain_matmul(build, rows, monkeypatch):
    one = int8_matrix()
    x_RK = torch.randn(rows, 192) * torch.logspace(-6, 3, rows)[:, None]
    x_RK[-1, 3:] = 0
    found = small_batch.int8_matmul(x_RK, one.codes, one.scale_N)
    monkeypatch.setattr(small_batch, "is_small", lambda *_: False)
    assert torch.equal(found, one(x_RK))


@pytest.mark.parametrize("rows", ROWS)
def test_int4_equals_matmul_with_the_dequantised_weight(build, rows):
    one = int4_matrix()
    x_RK = torch.randn(rows, 192)
    found = small_batch.int4_matmul(x_RK, one.codes, one.scale_GN2)[:, :100]
    close(found, x_RK.to(torch.bfloat16).double() @ one.dequantise().double().t())


@pytest.mark.parametrize("shape", [(3, 2, 192), (64, 128), (1, 64)], ids=str)
def test_rms_norm(build, shape):
    x, weight_D = torch.randn(shape) * 100, torch.rand(shape[-1])
    expected = torch.nn.functional.rms_norm(x.double(), shape[-1:], weight_D.double(), 1e-6)
    close(norm.rms_norm(x, weight_D, 1e-6), expected)


PRODUCTS = {
    "linear": (torch.randn(960, 640), small_batch.linear),
    "bfloat16": (torch.randn(960, 640).to(torch.bfloat16), small_batch.linear),
    "float16": (torch.randn(960, 640).to(torch.float16), small_batch.linear),
    "expert": (
        torch.randn(1, 640, 960),
        lambda x, w: small_batch.grouped_matmul(x, w, torch.tensor([len(x)])),
    ),
    "int8": (int8_matrix(960, 640), lambda x, m: small_batch.int8_matmul(x, m.codes, m.scale_N)),
    "int4": (
        int4_matrix(960, 640, 5),
        lambda x, m: small_batch.int4_matmul(x, m.codes, m.scale_GN2),
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_row_gives_the_same_bits_beside_any_others_and_on_any_threads(build, name, monkeypatch):
    weight, multiply = PRODUCTS[name]
    monkeypatch.setattr(small_batch, "_LEAST_BYTES", 0)  # as if it were large: all threads
    dtype = weight.dtype if isinstance(weight, torch.Tensor) else torch.float32
    x_RK = (torch.randn(23, 640) * torch.logspace(-2, 2, 23)[:, None]).to(dtype)
    together = multiply(x_RK, weight)
    threads = torch.get_num_threads()
    for first in (0, 5, 20):
        for rows in (1, 2, 3):
            torch.set_num_threads(1 + first % 3)
            found = multiply(x_RK[first : first + rows], weight)
            torch.set_num_threads(threads)
            assert torch.equal(found, together[first : first + rows])


def test_misfit():
    x_RK, weight_NK = torch.randn(4, 64), torch.randn(96, 64)
    assert small_batch.misfit(x_RK, weight_NK) is None
    assert small_batch.misfit(x_RK[None], torch.nn.Parameter(weight_NK)) is None
    with torch.enable_grad():
        assert small_batch.misfit(x_RK, weight_NK)
    with torch.autocast("cpu"):
        assert small_batch.misfit(x_RK, weight_NK)
    assert small_batch.misfit(torch.randn(65, 64), weight_NK), "many rows"
    assert small_batch.misfit(torch.randn(0, 64), weight_NK), "no rows"
    assert small_batch.misfit(x_RK, torch.randn(96, 128)[:, ::2]), "not contiguous"
    assert small_batch.misfit(torch.randn(4, 48), torch.randn(96, 48)), "an odd width"
    assert small_batch.misfit(x_RK, torch.randn(2, 64, 80)), "an odd width of experts"
    assert small_batch.misfit(x_RK.double(), weight_NK.double())
    assert small_batch.misfit(x_RK, weight_NK.to(torch.bfloat16))
    assert small_batch.misfit(x_RK.to("meta"), weight_NK.to("meta"))


def test_experts_with_more_rows_than_there_are_read_no_others():
    with pytest.raises(AssertionError, match="more than the 3 rows"):
        small_batch.grouped_matmul(torch.randn(3, 64), torch.randn(2, 64, 64), torch.tensor([2, 2]))


def test_every_float16_is_read_exactly(build):
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    finite_NK = numbers.masked_fill(~numbers.isfinite(), 0).view(-1, 32)
    y_RN = small_batch.linear(torch.eye(32, dtype=torch.float16), finite_NK)
    assert torch.equal(y_RN.t(), finite_NK), "subnormal numbers too"
    weight_NK = torch.tensor([float("inf"), -float("inf"), float("nan"), 65504.0])
    weight_NK = weight_NK[:, None].expand(4, 32).to(torch.float16).contiguous()
    found = small_batch.linear(torch.ones(1, 32, dtype=torch.float16), weight_NK)[0]
    assert found[:2].tolist() == [float("inf"), -float("inf")]
    assert found[2].isnan()
    assert found[3] == float("inf"), "a sum too large for float16"


def test_in_a_dispatch_mode_pytorchs_operators_run():
    x_RK, weight_NK = torch.randn(4, 64), torch.randn(96, 64)
    with FlopCounterMode(display=False) as counter:
        select.linear(x_RK, weight_NK)
    assert counter.get_total_flops() == 2 * 4 * 64 * 96


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("gated", [False, True])
def test_an_expert_feedforward(activation, gated, monkeypatch):
    counts_E = torch.tensor([1, 0, 3])
    x_RD, up_EDF = torch.randn(4, 64), torch.randn(3, 64, 128)
    down_EFD, gate_EDF = torch.randn(3, 128, 64), torch.randn(3, 64, 128) if gated else None
    arguments = (x_RD, counts_E, up_EDF, down_EFD, activation, gate_EDF)
    assert select.explain(x_RD, up_EDF).name == "small_batch"
    found = select.expert_feedforward(*arguments)
    monkeypatch.setattr(small_batch, "is_small", lambda *_: False)
    assert select.explain(x_RD, up_EDF).name == "cpu"
    close(found, select.expert_feedforward(*arguments).double(), torch.bfloat16)


def test_there_is_one_openmp_library():
    """One OpenMP for both: the library names none of its own (or has no threads)."""
    built = native.native()
    if not built.threads or not native.shutil.which("readelf"):
        pytest.skip("no threads, or nothing that lists what a library needs")
    command = ["readelf", "-d", built.library._name]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "omp" not in listed
