"""Generate text: decoding with a KV cache, sampling, beam search."""
