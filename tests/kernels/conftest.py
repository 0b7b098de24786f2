from collections.abc import Iterator

import pytest
import torch


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
