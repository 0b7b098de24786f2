"""Kernels on NVIDIA GPUs: PyTorch's grouped product, and fused ones in Triton."""
