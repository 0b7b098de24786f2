"""Text: sources and readers, tokenizers, and the cache of their tokens."""
