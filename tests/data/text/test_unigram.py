import argparse
import ast
import inspect
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.data.text.vocabulary import train_unigram
from switchlm.errors import DataError

TEXTS = [Path(inspect.getsourcefile(module)).read_text() for module in (argparse, ast, random)]


@pytest.fixture(scope="module")
def trained():
    return train_unigram(TEXTS, 640)


def test_the_vocabulary_has_the_configured_size(trained):
    assert trained.vocabulary_size == 640
    assert (trained.pad_id, trained.end_id) == (0, 1)
    assert len(trained.sentinel_ids) == 100
    assert list(trained.sentinel_ids) == sorted(trained.sentinel_ids, reverse=True)
    assert trained.sentinel_ids[0] == max(trained.backend.get_vocab().values())


def test_pieces_are_longer_than_bytes(trained):
    assert len(trained.encode(TEXTS[0])) < len(TEXTS[0]) / 2


@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=20)
        | st.sampled_from(
            ["\n\n", "    ", " \t", "return", "<0x0A>", "</s>", "<unk>", "漢字", "🎉"]
        ),
        max_size=8,
    ).map("".join)
)
def test_any_text_comes_back_unchanged(trained, text):
    assert trained.decode(trained.encode_plain([text])[0]) == text


def test_names_of_reserved_pieces_are_ordinary_text(trained):
    for name in ("<0x0A>", "</s>", "<unk>", "<pad>", " <0xFF>x"):
        assert trained.decode(trained.encode_plain([name])[0]) == name


def test_it_is_saved_for_transformers(trained, tmp_path):
    from transformers import AutoTokenizer

    trained.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "  def f(x): # <extra_id_0> 漢\n\n"
    assert theirs(text).input_ids == [*trained.encode(text), trained.end_id]
    assert theirs.decode(trained.encode(text)) == text
    assert Tokenizer.load(tmp_path).fingerprint() == trained.fingerprint()


def test_a_vocabulary_without_room_for_pieces_is_refused():
    with pytest.raises(DataError, match="at least 454"):
        train_unigram(TEXTS, 400)


def test_no_text_is_refused():
    with pytest.raises(DataError, match="no text to train"):
        train_unigram([], 640)
