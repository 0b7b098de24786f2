"""Kernels on NVIDIA GPUs: PyTorch's grouped product, and fused ones in Triton."""

import torch


def allows_tf32() -> bool:
    """Whether PyTorch may take float32 products in TF32, on tensor cores."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
