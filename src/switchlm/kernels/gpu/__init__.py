"""Kernels on NVIDIA GPUs: PyTorch's grouped matmul, and fused kernels in Triton."""

import torch


def allows_tf32() -> bool:
    """Whether PyTorch may multiply float32 in TF32, on tensor cores."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
