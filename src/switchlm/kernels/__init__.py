"""Grouped matrix products and the permutations around them: tensors in, tensors out."""
