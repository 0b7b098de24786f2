"""The Triton kernels compile for GPUs, down to machine code, though none is here."""

import json
import os
import sys
from pathlib import Path

import pytest
from tests.commands import run

pytest.importorskip("triton", reason="needs the extra `triton`")
DRIVER = Path(__file__).with_name("compile_triton.py")
HOPPER, AMPERE = 90, 80
SHARED_BYTES = {HOPPER: 227 << 10, AMPERE: 163 << 10}  # what a program may have


def compiled(tmp_path: Path, *arguments: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = run([sys.executable, str(DRIVER), *arguments], env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles_and_uses_tensor_cores(tmp_path: Path) -> None:
    lines = compiled(tmp_path, str(HOPPER))
    assert {line["kernel"] for line in lines} == {
        "_lay_out", "_hidden", "_scatter", "_hidden_gradients", "_weight_gradient",
    }  # fmt: skip
    for line in lines:
        assert line["bytes_of_code"] > 0
        assert (line["tensor_cores"] > 0) == (line["kernel"] != "_lay_out"), line


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED_BYTES)
def test_every_kernel_has_a_configuration_that_fits(architecture: int, tmp_path: Path) -> None:
    smallest: dict[tuple[str, str], int] = {}
    for line in compiled(tmp_path, str(architecture), "all"):
        key = line["kernel"], line["dtype"]
        smallest[key] = min(line["shared_bytes"], smallest.get(key, 1 << 30))
    assert len(smallest) == 10
    assert max(smallest.values()) <= SHARED_BYTES[architecture]
