"""Kernels: grouped matmul, permutation, attention, norms. Tensors in, tensors out."""
