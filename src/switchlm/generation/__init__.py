"""Decoding with a key-value cache, by greedy choice or sampling."""
