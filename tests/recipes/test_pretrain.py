"""A new model is built where this process computes."""

import pytest
import torch

from switchlm.recipes.pretrain import default_device


def built_for_cuda(check_available: bool = False) -> torch.device | None:
    """What PyTorch built for CUDA says on a machine without a GPU."""
    return None if check_available else torch.device("cuda")


def test_pytorch_built_for_cuda_computes_on_the_cpu_of_a_machine_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", built_for_cuda)
    assert default_device() == torch.device("cpu")
