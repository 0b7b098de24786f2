import argparse
import inspect
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.data.text.vocabulary import train_unigram
from switchlm.evaluation.routing import CLASSES, TokenClasses, token_class, token_text


def classes(tokenizer, text):
    """Return (text of the token, its class) for every token of a text."""
    ids = tokenizer.encode(text)
    found = TokenClasses(tokenizer).of_rows(torch.tensor([ids]))[0]
    return [
        (token_text(tokenizer, token), CLASSES[kind])
        for token, kind in zip(ids, found, strict=True)
    ]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.bytes()


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("the", "word start"),
        (" größe", "word start"),
        ("42", "number"),
        ("\n", "space"),
        ("():", "punctuation"),
        ("+", "punctuation"),
        ("x1", "mixed"),
        ("\ufffd", "part of a character"),
        ("<extra_id_7>", "sentinel"),
        ("</s>", "start or end"),
        ("<p>", "mixed"),
    ],
)
def test_classes_of_tokens(text, kind):
    assert token_class(text) == kind


@pytest.mark.parametrize(
    ("before", "text", "kind"),
    [
        ("a", "b", "inside a word"),
        ("a", " b", "word start"),
        ("(", "b", "word start"),
        ("1", "b", "word start"),
        ("ि", "क", "inside a word"),
    ],
)
def test_the_token_before_decides_where_words_start(before, text, kind):
    assert token_class(text, before) == kind


def test_a_piece_with_a_mark_starts_a_word_although_its_text_lacks_the_space():
    assert token_class("the", "a", marked=True) == "word start"


def test_bytes_have_the_class_of_their_character(tokenizer):
    found = [kind for _, kind in classes(tokenizer, " да,9。")]
    inside = "inside a word"
    assert found[:5] == ["space", "word start", inside, inside, inside]
    assert found[5:] == ["punctuation", "number", "punctuation", "punctuation", "punctuation"]


def test_incomplete_characters_and_letters_after_a_sentinel(tokenizer):
    ids = [*tokenizer.encode("д")[:1], tokenizer.sentinel_ids[0], *tokenizer.encode("b c")]
    found = TokenClasses(tokenizer).of_rows(torch.tensor([ids]))[0]
    assert [CLASSES[kind] for kind in found] == [
        "part of a character",
        "sentinel",
        "inside a word",
        "space",
        "word start",
    ]


def test_pieces_have_the_same_classes():
    text = Path(inspect.getsourcefile(argparse)).read_text()
    pieces = train_unigram([text], 640)
    assert classes(pieces, "д")[0] == ("<0xD0>", "inside a word")
    found = classes(pieces, text[:4000])
    kinds = dict(found)
    assert {kind for token, kind in found if token[0] == " " and token[1:].isalpha()} == {
        "word start"
    }
    assert kinds["\n"] == "space"
    assert kinds["."] == "punctuation"
    assert [
        kind
        for (before, _), (token, kind) in pairwise(found)
        if token == "ing" and before[-1].isalpha()
    ].count("inside a word")


def test_every_id_has_a_text(tokenizer):
    texts = [token_text(tokenizer, number) for number in range(tokenizer.vocabulary_size + 5)]
    assert all(texts)
    assert texts[0] == "<pad>"
    assert texts[1] == "</s>"
    assert texts[3 + ord("q")] == "q"
    assert texts[3 + 0xE2] == "<0xE2>"
    assert all("\ufffd" not in text for text in texts)
    assert texts[tokenizer.sentinel_ids[4]] == "<extra_id_4>"
