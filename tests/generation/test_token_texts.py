from itertools import pairwise

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import DataError
from switchlm.generation.text_stream import texts_of_tokens, tokens_of_text

BYTES = Tokenizer.bytes()
PIECES = ("▁", "▁self", "▁return", "self", ".", "size", "▁=", "▁x", "e", "r", "t", "u", "n", "s")


def pieces_with_bytes():
    """A vocabulary like the released models': words with their space, and bytes."""
    names = ["<pad>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    scores = [(name, 0.0 if len(name) == 1 else len(name) - 12.0) for name in names]
    backend = tokenizers.Tokenizer(models.Unigram(scores, unk_id=2, byte_fallback=True))
    backend.normalizer = normalizers.Replace(tokenizers.Regex(" +"), " ")
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]
    )
    return Tokenizer(backend, num_sentinels=4)


UNIGRAM = pieces_with_bytes()
BOTH = pytest.mark.parametrize("tokenizer", [BYTES, UNIGRAM], ids=["bytes", "unigram"])
TEXT = st.text(
    st.sampled_from("self retun.size= x\n\t<é€🙂\u0301中") | st.characters(codec="utf-8")
)


@BOTH
@given(text=TEXT)
def test_there_is_a_text_per_token_and_joined_they_are_the_text(tokenizer, text):
    ids, texts = tokens_of_text(text, tokenizer)
    assert ids == tokenizer.encode(text)
    assert len(texts) == len(ids)
    assert "".join(texts) == (text if ids else "")


def test_spaces_are_kept_and_the_first_byte_has_the_character():
    assert tokens_of_text("a é<extra_id_1> b", BYTES)[1] == [
        "a", " ", "é", "", "<extra_id_1>", " ", "b",
    ]  # fmt: skip
    assert tokens_of_text("self  =<extra_id_1> x", UNIGRAM)[1] == [
        "self", "  =", "<extra_id_1>", " x",
    ]  # fmt: skip


def by_prefixes(ids, tokenizer):
    """Return what each token adds to the decoded text: a simple implementation."""
    decoded = [tokenizer.decode(ids[:length]) for length in range(len(ids) + 1)]
    return [after[len(before) :] for before, after in pairwise(decoded)]


@BOTH
@given(text=st.text("self retun.size= x", min_size=1))
def test_decoded_tokens_are_what_each_adds_to_those_before(tokenizer, text):
    ids = tokenizer.encode(text)
    assert texts_of_tokens(ids, tokenizer) == by_prefixes(ids, tokenizer)


@BOTH
@given(text=TEXT)
def test_decoded_tokens_joined_are_the_decoded_text(tokenizer, text):
    ids = [number for number in tokenizer.encode(text) if number > 1]  # those are named
    texts = texts_of_tokens(ids, tokenizer)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids)


@given(st.lists(st.integers(3, 258), max_size=12))
def test_invalid_bytes_have_one_text_each(ids):
    texts = texts_of_tokens(ids, BYTES)
    assert len(texts) == len(ids)
    assert "".join(texts) == BYTES.decode(ids)


def test_tokens_without_a_text_are_named():
    ids = [BYTES.pad_id, *BYTES.encode("é<extra_id_3>"), BYTES.end_id]
    assert texts_of_tokens(ids, BYTES) == ["<pad>", "é", "", "<extra_id_3>", "</s>"]


def test_half_a_surrogate_pair_is_an_error():
    with pytest.raises(DataError, match="surrogate"):
        tokens_of_text("\ud800", BYTES)
