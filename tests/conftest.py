import os
import signal
import traceback
from collections.abc import Iterator

import hypothesis
import pytest
import torch

# Few examples in `make test`, many in `make test-slow` (--hypothesis-profile thorough).
hypothesis.settings.register_profile("quick", max_examples=15, deadline=None)
hypothesis.settings.register_profile("thorough", max_examples=200, deadline=None)
hypothesis.settings.load_profile("quick")

# Before anything imports Triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell that starts the tests in the background has SIGINT ignored, and children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """One thread a test process: the inputs are tiny, and the processes share the cores."""
    torch.set_num_threads(1)


_forks: list[str] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=lambda: _forks.append("".join(traceback.format_stack(limit=12))))


@pytest.fixture(autouse=True)
def no_fork() -> Iterator[None]:
    """A test forks in a program of its own: a forked copy of pytest shares the file of its captured
    output, and of its threads only one goes on. (What subprocess starts is no such copy.)
    """
    _forks.clear()
    yield
    assert not _forks, f"A copy of the test process was made here:\n{_forks[0]}"
