import random

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.data.text.vocabulary import train_unigram
from switchlm.errors import ConfigError
from switchlm.generation.text_stream import TextStream

BYTES = Tokenizer.bytes()
TEXTS = ["def f(x):\n    return x + 1\n", "größer als 1 €, said the fox", " two  spaces "] * 20


@pytest.fixture(scope="module")
def unigram():
    return train_unigram(TEXTS, 512)


def pieces(tokenizer, tokens, stops=()):
    stream = TextStream(tokenizer, stops)
    found = []
    for token in tokens:
        found.append(stream.push(token))
        if stream.stopped:
            break
    return [*found, stream.finish()], stream


def cut(text, stops):
    """Return the text before the stop string that is complete first: a simple implementation."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


ANY = st.text(st.characters(codec="utf-8"), max_size=90)


@given(ANY)
@example("größe 1 € 😀 " * 12)
@example("中文字符" * 30)
def test_the_pieces_joined_are_the_text_and_have_complete_characters(unigram, text):
    text = text.replace("�", "")
    for tokenizer in (BYTES, unigram):
        tokens = tokenizer.encode_plain([text])[0].tolist()
        found, _ = pieces(tokenizer, tokens)
        assert "".join(found) == tokenizer.decode(tokens)
        assert "�" not in "".join(found[:-1])


@given(st.lists(st.integers(0, 383), max_size=150))
def test_any_bytes_have_the_text_of_decoding_at_once(tokens):
    assert "".join(pieces(BYTES, tokens)[0]) == BYTES.decode(tokens)


def test_sentinels_have_text_and_end_tokens_do_not(unigram):
    for tokenizer in (BYTES, unigram):
        tokens = tokenizer.encode("<extra_id_0> größe<extra_id_1>  x")
        assert "".join(pieces(tokenizer, [*tokens, tokenizer.end_id, tokenizer.pad_id])[0]) == (
            tokenizer.decode(tokens)
        )


def test_text_is_returned_as_early_as_possible():
    stream = TextStream(BYTES, stops=["xy"])
    seen = [stream.push(3 + byte) for byte in "a€xzx".encode()]
    assert seen == ["a", "", "", "€", "", "xz", ""]
    assert stream.finish() == "x"


def test_an_incomplete_character_is_decoded_as_at_once():
    tokens = [3 + byte for byte in b"a\xe2\x82"]
    assert pieces(BYTES, tokens)[0] == ["a", "", "", "�"]
    assert pieces(BYTES, [*tokens, 3 + ord("b")])[0] == ["a", "", "", "�b", ""]


def test_invalid_runs_of_byte_pieces_do_not_change_earlier_text(unigram):
    heart = unigram.encode_plain(["❤"])[0].tolist()
    assert len(heart) == 3
    found, _ = pieces(unigram, [*heart, heart[0], *unigram.encode(" x")])
    assert found[:4] == ["", "", "❤", ""]
    assert "".join(found).startswith("❤�")
    assert "".join(found).endswith(" x")


@given(
    st.lists(st.sampled_from(["return", " ", "x", "größe", "r", "eturn", "\n"]), max_size=12),
    st.lists(
        st.sampled_from(["turn x", "ret", "e", "xr", "öß", "n r", "return", "\n\n"]), max_size=3
    ),
)
@example(["return", "return"], ["nre", "eturnret"])
def test_stop_strings_do_not_depend_on_token_borders(unigram, words, stops):
    text = "".join(words)
    for tokenizer in (BYTES, unigram):
        tokens = tokenizer.encode_plain([text])[0].tolist()
        found, stream = pieces(tokenizer, tokens, stops)
        assert "".join(found) == cut(text, stops)
        assert stream.stopped == any(stop in text for stop in stops)


def test_a_stop_string_may_span_tokens_and_sentinels(unigram):
    for tokenizer in (BYTES, unigram):
        tokens = tokenizer.encode("<extra_id_0>one<extra_id_1>two")
        found, stream = pieces(tokenizer, tokens, ["e<extra_id_1>t"])
        assert "".join(found) == "<extra_id_0>on"
        assert stream.stopped
        assert stream.push(tokens[0]) == stream.finish() == ""


def test_an_incomplete_stop_string_is_returned_at_the_end():
    found, stream = pieces(BYTES, BYTES.encode("one tw"), ["two", "w!"])
    assert "".join(found) == "one tw"
    assert not stream.stopped


def test_long_outputs_are_not_decoded_in_full_at_every_token(unigram):
    text = "def f(x): return größer 中文 😀 " * 40
    for tokenizer in (BYTES, unigram):
        stream = TextStream(tokenizer)
        longest, found = 0, ""
        for token in tokenizer.encode(text):
            found += stream.push(token)
            longest = max(longest, len(stream._run))
        assert found + stream.finish() == text
        assert longest < 80


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ConfigError, match="stop string is empty"):
        TextStream(BYTES, stops=["x", ""])


def test_only_the_space_before_the_first_word_is_dropped_as_in_sentencepiece():
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("▁b", -1.0)]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, 2))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    tokenizer = Tokenizer(backend)
    tokens = [3, 4, tokenizer.sentinel_ids[0], *[3, 4] * 60]
    found, _ = pieces(tokenizer, tokens)
    assert found[:4] == ["a", " b", "<extra_id_0>", " a"]
    assert "".join(found) == tokenizer.decode(tokens)


def test_a_space_that_decoding_removes_is_withheld(tmp_path):
    pieces_ = ["▁a", "▁.", "▁'", "▁s", "s", "▁n", "'", "t", "▁"]
    vocabulary = [(name, 0.0) for name in ("<pad>", "</s>", "<unk>")]
    vocabulary += [(piece, -1.0) for piece in pieces_]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, 2))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = (
        '{"clean_up_tokenization_spaces": true, "tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    (tmp_path / "tokenizer_config.json").write_text(settings)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode([3, 4, 3, 5, 7, 3, 8, 9, 10]) == "a. a's an't"
    draw = random.Random(0)
    for _ in range(300):
        tokens = [draw.randint(3, 11) for _ in range(draw.randint(1, 150))]
        assert "".join(pieces(tokenizer, tokens)[0]) == tokenizer.decode(tokens), tokens
