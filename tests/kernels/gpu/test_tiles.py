"""What the Triton kernels share: which configurations are timed, and the precision of matmul."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs the extra `triton`")
import triton

from switchlm.kernels.gpu.tiles import precision, worth_compiling

CONFIGS = [
    triton.Config({"BLOCK_W": w, "BLOCK_V": v})
    for w, v in ((256, 64), (128, 64), (128, 32), (64, 32))
]


def kept(v: int, w: int, dtype: torch.dtype, precision: str) -> list[tuple[int, int]]:
    arguments = {"x_NV": torch.zeros(1, dtype=dtype), "V": v, "W": w, "scale_A": None}
    found = worth_compiling(CONFIGS, arguments, PRECISION=precision)
    return [(config.kwargs["BLOCK_W"], config.kwargs["BLOCK_V"]) for config in found]


def test_large_matrices_try_all() -> None:
    everything = [(256, 64), (128, 64), (128, 32), (64, 32)]
    assert kept(1024, 4096, torch.bfloat16, "ieee") == everything
    assert kept(1024, 4096, torch.float32, "tf32") == everything


def test_no_block_is_wider_than_the_matrix_needs() -> None:
    assert kept(64, 100, torch.bfloat16, "ieee") == [(128, 64), (128, 32), (64, 32)]
    assert kept(33, 48, torch.bfloat16, "ieee") == [(64, 32)]


def test_something_is_left_for_matrices_smaller_than_every_block() -> None:
    assert kept(8, 8, torch.bfloat16, "ieee") == [(64, 32)]


def test_without_tensor_cores_the_smallest_is_taken_untried() -> None:
    assert kept(1024, 4096, torch.float32, "ieee") == [(64, 32)]


@pytest.fixture
def matmul() -> Iterator[Any]:
    """PyTorch's precision of matmul on a GPU; monkeypatch cannot restore it."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    yield settings
    settings.fp32_precision = before


@pytest.mark.parametrize(
    ("setting", "taken"), [("tf32", "tf32"), ("ieee", "ieee"), ("none", "ieee")]
)
def test_precision_follows_pytorchs_setting(setting: str, taken: str, matmul: Any) -> None:
    # The flag of before, allow_tf32, cannot be read once the present one is set.
    matmul.fp32_precision = setting
    assert precision(SimpleNamespace(is_cuda=True)) == taken
    assert precision(torch.zeros(1)) == "ieee"
