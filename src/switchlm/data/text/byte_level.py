"""Tokenizers of bytes: byte b has id 3 + b, after padding, end and unknown token, as in ByT5."""

import json

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from switchlm.data.order import Int64

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
FIRST_BYTE = 3  # after the three special tokens


def bytes_backend(strip: bool = False) -> tokenizers.Tokenizer:
    """Return a tokenizer of UTF-8 bytes without sentinels.

    strip: whether white space around a special token in a text is part of it, as in ByT5.
    """
    symbols = byte_symbols()
    vocabulary = {PAD: 0, END: 1, UNKNOWN: 2}
    vocabulary |= {symbol: FIRST_BYTE + byte for byte, symbol in enumerate(symbols)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(name, lstrip=strip, rstrip=strip) for name in (PAD, END, UNKNOWN)]
    )
    append_end(backend)
    return backend


def append_end(backend: tokenizers.Tokenizer) -> None:
    """Let the tokenizer of transformers append the end token, as T5's does."""
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, 1)]
    )


def byte_symbols() -> list[str]:
    """Return the printable character for each byte in GPT-2's byte-level scheme."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable}
    symbols |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    return [symbols[byte] for byte in range(256)]


def is_byte_model(backend: tokenizers.Tokenizer) -> bool:
    """Return whether numpy can encode as `backend` does: text between added tokens is its bytes."""
    added = backend.get_added_tokens_decoder().values()
    if backend.encode_special_tokens or any(
        token.lstrip or token.rstrip or token.single_word for token in added
    ):
        return False
    model = json.loads(backend.to_str()) if backend.get_vocab_size(False) == 259 else {}
    if model.get("normalizer") is not None or model.get("model", {}).get("merges") != []:
        return False
    symbols = enumerate(byte_symbols())
    return all(backend.token_to_id(symbol) == FIRST_BYTE + byte for byte, symbol in symbols)


def encode_bytes(text: str) -> Int64:
    """Return the ids of the bytes of a text, special tokens in it too."""
    return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64) + FIRST_BYTE
