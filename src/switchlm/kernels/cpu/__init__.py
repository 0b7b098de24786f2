"""Kernels in main memory, in PyTorch's operators and in C (native/)."""
