"""The library is compiled when needed, atomically; without it PyTorch's operators run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from switchlm.kernels import select
from switchlm.kernels.cpu import native, small_batch

here = pytest.mark.skipif(native.native().library is None, reason=native.native().reason)


QUICKLY = ("-O0", *native._FLAGS[1:])  # compiled in a tenth of the time


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(native, "_FLAGS", QUICKLY)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(native.Path, "home", lambda: tmp_path)
    return tmp_path


def compiler(folder: Path, script: str) -> None:
    """Write a compiler into the folder, which runs that shell script."""
    place = folder / "gcc"
    place.write_text(f"#!/bin/sh\n{script}\n")
    place.chmod(0o755)


@here
def test_it_is_compiled_once_for_a_home(home):
    first = native.native.__wrapped__()
    assert "compiled by" in first.reason
    (made,) = home.rglob("*.so")
    assert made.parent == home / ".cache" / "switchlm" / "native"
    left = sorted(made.parent.iterdir())
    assert left == [made.with_suffix(".sha256"), made]  # and nothing else
    time = made.stat().st_mtime_ns
    assert native.native.__wrapped__().library is not None
    assert made.stat().st_mtime_ns == time


@here
def test_a_bfloat16_model_may_be_the_first_to_ask(home):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert native.native.__wrapped__().library is not None


@here
@pytest.mark.parametrize("size", [0, 100, 30_000])
def test_a_cut_library_is_compiled_again(home, size):
    native.native.__wrapped__()
    (made,) = home.rglob("*.so")
    whole = made.read_bytes()
    made.unlink()  # another file, since this process has the first one mapped
    made.write_bytes(whole[:size])
    assert native.native.__wrapped__().library is not None
    assert len(made.read_bytes()) == len(whole)


@here
def test_another_processor_or_source_is_another_library(home, monkeypatch):
    native.native.__wrapped__()
    monkeypatch.setattr(native, "_processor", lambda: b"another")
    native.native.__wrapped__()
    assert len(list(home.rglob("*.so"))) == 2


@here
def test_a_home_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(native.Path, "home", lambda: tmp_path / "file")
    assert native.native.__wrapped__().library is not None

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(native.Path, "home", homeless)
    assert native.native.__wrapped__().library is not None


def test_no_compiler(monkeypatch):
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    found = native.native.__wrapped__()
    assert found.library is None
    assert "there is no C compiler (gcc, cc, clang)" in found.reason


def test_a_compiler_that_fails_says_why(home, tmp_path, monkeypatch):
    compiler(tmp_path, "echo 'no such header' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = native.native.__wrapped__()
    assert found.library is None
    assert found.reason == "no such header"
    assert not list(home.rglob("*.so"))


@here
def test_a_compiler_that_makes_no_library_leaves_nothing(home, tmp_path, monkeypatch):
    compiler(tmp_path, 'case "$*" in *--version*) echo 1;; *) touch a.out;; esac')
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = native.native.__wrapped__()
    assert found.library is None
    assert found.reason


def test_all_works_without_it(monkeypatch):
    monkeypatch.setattr(native, "native", lambda: native.Native(None, "none"))
    x_RK, weight_NK = torch.randn(3, 64), torch.randn(64, 64)
    with torch.no_grad():
        assert small_batch.misfit(x_RK, weight_NK)
        assert torch.equal(
            select.linear(x_RK, weight_NK), torch.nn.functional.linear(x_RK, weight_NK)
        )


@here
def test_processes_that_compile_at_once_agree(tmp_path):
    code = (
        f"from switchlm.kernels.cpu import native as n; n._FLAGS = {QUICKLY}\n"
        "assert n.native().library, n.native()"
    )
    environment = os.environ | {"HOME": str(tmp_path)}
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    for process in running:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error.decode()
    assert len(list(tmp_path.rglob("*.so"))) == 1


@pytest.mark.parametrize("name", ["small_batch_matmul", "gemm", "rms_norm", "cross_entropy"])
def test_a_function_that_computes_nothing_is_noticed(name):
    built = native.native().library
    if built is None:
        pytest.skip(native.native().reason)

    class Broken:
        def __getattr__(self, asked):
            return (lambda *_: 0) if asked == name else getattr(built, asked)

    assert native._works(built, threads=False)
    assert not native._works(Broken(), threads=False)
