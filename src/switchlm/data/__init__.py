"""Text to batches: sources, tokenizer, span corruption, packing, in an order fixed by the seed."""
