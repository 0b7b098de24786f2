import fcntl
import platform
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from switchlm.kernels.cpu import native

BUILDS = {"this processor": None, "AVX2": "-march=x86-64-v3", "SSE2": "-march=x86-64"}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads, for any amount of work."""
    monkeypatch.setattr("switchlm.kernels.cpu.grouped.LEAST_WORK", 0)
    torch.set_num_threads(2)


@pytest.fixture(params=BUILDS)
def build(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> native.Native:
    """The library as compiled for this processor, and for those with narrower vectors."""
    if native.native().library is None:
        pytest.skip(native.native().reason)
    flag = BUILDS[request.param]
    if flag is None:
        return native.native()
    if platform.machine() != "x86_64":
        pytest.skip("narrower vectors are another compiler's flags here")
    built = _built(flag, tmp_path_factory.getbasetemp().parent / "libraries")
    monkeypatch.setattr(native, "native", lambda: built)
    return built


@cache
def _built(flag: str, home: Path) -> native.Native:
    """Compile for that processor, once for all test processes."""
    home.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, (home / f"lock{flag}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        patch.setattr(native, "_PROCESSOR", {"x86_64": flag})
        patch.setattr(native.Path, "home", lambda: home)
        built = native.native.__wrapped__()
    assert built.library is not None, built.reason
    return built
