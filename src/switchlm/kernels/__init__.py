"""What costs time: grouped products, permutations, attention, norms. Tensors in, tensors out."""
