import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """One thread a test process: the inputs are tiny, and the processes share the cores."""
    torch.set_num_threads(1)
