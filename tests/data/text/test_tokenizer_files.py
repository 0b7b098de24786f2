"""Folders of tokenizers are read as transformers' AutoTokenizer reads them."""

import json
import random
import shutil
import sys

import pytest
from tests.data.text.saved_folders import (
    KINDS,
    MT5_PIECES,
    NORMAL,
    SENTINELS,
    USER_DEFINED,
    make_folder,
    num_pieces,
    spiece,
)

from switchlm.data.text.tokenizer import Tokenizer, Vocabulary
from switchlm.errors import DataError, MissingExtraError

WORDS = [
    "The", "dog", "walks", "<extra_id_0>", "<extra_id_1>", "<extra_id_99>", "<sep>", "<ORG>",
    "größe", "x<y", "👩‍👩‍👧", "e\u0301", "שלום", "مرحبا", "日本", "\u200b", "\u00ad", "ﬁ", "①", "½",
    "Å", "İ",
    "n't", "don't", ".", ",", "!", " ' ", "'s", "</s>", "<pad>", "<unk>", "▁", "▁<extra_id_0>",
    "<extra_id_", "{", "}", "🎉", "\u202e", "\u0007", "\x00", "\x85", "\ufeff", "\ufffd", "\uff21",
    "<s>",
]  # fmt: skip
SPACES = [" ", "", "  ", "   ", "\n", "\t", "\r\n", "\u3000", "\u00a0", " \n "]


def hard_texts(count=200):
    draw = random.Random(5)
    texts = ["", " ", "\n", "<extra_id_0>", " <extra_id_0> ", "The <extra_id_0> walks<extra_id_1>."]
    while len(texts) < count:
        parts = [draw.choice(WORDS) + draw.choice(SPACES) for _ in range(draw.randint(1, 9))]
        texts.append("".join(parts))
    return texts


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_equal_those_of_transformers(kind, tmp_path):
    from transformers import AutoTokenizer

    folder = make_folder(kind, tmp_path / "model")
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder, num_sentinels=0)
    ours.save(tmp_path / "again")
    shutil.copy(folder / "config.json", tmp_path / "again")
    again = (
        AutoTokenizer.from_pretrained(tmp_path / "again"),
        Tokenizer.load(tmp_path / "again", num_sentinels=0),
    )
    for text in hard_texts():
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text) == ids, text
        assert ours.encoding(text).ids == ids
        assert again[0](text, add_special_tokens=False).input_ids == ids
        assert again[1].encode(text) == ids
        if not text.strip().endswith("</s>"):  # to which ByT5's adds no second one
            assert ours.complete(ids) == theirs(text).input_ids, text
        inner = [number for number in ids if number not in ours.outer_ids]
        for skip in (False, True):
            expected = theirs.decode(inner, skip_special_tokens=skip)
            writer, writer_again = (
                one.without_special() if skip else one for one in (ours, again[1])
            )
            assert writer.decode([*ids, ours.end_id, ours.pad_id]) == expected
            assert writer_again.decode(ids) == expected
    names = ("pad_id", "end_id", "unknown_id", "sentinel_ids")
    found = [getattr(ours, name) for name in names]
    named = [theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id]
    assert found[:3] == named
    assert found == [getattr(again[1], name) for name in names]
    assert ours.vocabulary_size - 128 < len(theirs) <= ours.vocabulary_size


def test_the_sentinels_of_mt5_are_pieces_of_its_vocabulary(tmp_path):
    for kind in ("mt5", "mt5, user-defined pieces"):
        tokenizer = Tokenizer.load(make_folder(kind, tmp_path / kind))
        assert tokenizer.sentinel_ids == tuple(num_pieces() + 99 - n for n in range(100))
        ids = tokenizer.encode("The <extra_id_0> dog")
        assert tokenizer.sentinel_ids[0] in ids
        assert tokenizer.decode(ids) == "The <extra_id_0> dog"


def write_pieces(folder, pieces, kind, settings=None):
    """Write a spiece.model with these pieces at its end, and what tokenizer_config.json says."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "mt5"}')
    (folder / "spiece.model").write_bytes(spiece(pieces, kind))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


PIECES = {
    "mt5": (MT5_PIECES, NORMAL),
    "mt5, user-defined": (MT5_PIECES, USER_DEFINED),
    "without a space": (tuple(piece[1:] for piece in MT5_PIECES), NORMAL),
}


@pytest.mark.parametrize("name", PIECES)
def test_pieces_are_the_sentinels_where_no_file_says_what_is(tmp_path, name):
    from transformers import AutoTokenizer

    alone = write_pieces(tmp_path / "spiece", *PIECES[name])
    # Transformers adds 100 sentinels, unless it is told that there are none.
    theirs = AutoTokenizer.from_pretrained(
        write_pieces(tmp_path / "said", *PIECES[name], {"extra_ids": 0})
    )
    saved = tmp_path / "json"
    theirs.save_pretrained(saved)
    (saved / "tokenizer_config.json").unlink()
    shutil.copy(alone / "config.json", saved)
    if adds := name == "without a space":  # such sentinels are not only pieces, but added tokens
        theirs = AutoTokenizer.from_pretrained(alone)
    first = num_pieces() + 99
    for folder in (alone, saved):
        vocabulary = Vocabulary(size=first + 5, pad_id=0, end_id=1)
        ours = Tokenizer.load(folder, vocabulary)
        assert ours.sentinel_ids == tuple(range(first, first - 100, -1))
        for number in (0, 99):
            assert ours.sentinel_ids[number] in ours.encode(f"The <extra_id_{number}> dog")
        for text in hard_texts():
            ids = theirs(text, add_special_tokens=False).input_ids
            if adds:
                ids = [number - 100 if number > first else number for number in ids]
            assert ours.encode(text) == ids, text


def test_of_two_tokens_for_a_sentinel_the_one_that_texts_get_counts(tmp_path):
    from transformers import AutoTokenizer

    folder = write_pieces(tmp_path / "both", MT5_PIECES, USER_DEFINED, {"extra_ids": 100})
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    ids = ours.encode("The <extra_id_0> dog")
    assert ids == theirs("The <extra_id_0> dog", add_special_tokens=False).input_ids
    assert ours.sentinel_ids[0] in ids
    assert len(theirs) == num_pieces() + 200


def test_umt5_of_a_spiece_model_encodes_as_sentencepiece_does(tmp_path):
    """Transformers reads it from tokenizer.json only."""
    import sentencepiece

    (tmp_path / "config.json").write_text('{"model_type": "umt5"}')
    (tmp_path / "spiece.model").write_bytes(spiece())
    tokenizer = Tokenizer.load(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_proto=spiece())
    for text in ("The quick  dog.", " a\nb\t c ", "Größe naïve", "日本語 שלום", "ﬁ ½"):
        assert tokenizer.encode(text) == reference.encode(text), text


def test_a_byt5_needs_no_file_of_a_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "byt5"}')
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("é<extra_id_1>") == [3 + 0xC3, 3 + 0xA9, 260]
    assert (tokenizer.vocabulary_size, len(tokenizer.sentinel_ids)) == (384, 125)


def test_sentinels_are_added_only_where_they_are_wanted(tmp_path):
    folder = make_folder("byte-level bpe with a template", tmp_path)
    values = json.loads((folder / "tokenizer.json").read_text())
    values["added_tokens"] = [t for t in values["added_tokens"] if t["content"] not in SENTINELS]
    names = {f"s{piece[1:]}" if piece in SENTINELS else piece: number
             for piece, number in values["model"]["vocab"].items()}  # fmt: skip
    values["model"]["vocab"] = names
    (folder / "tokenizer.json").write_text(json.dumps(values))
    assert Tokenizer.load(folder, num_sentinels=0).sentinel_ids == ()
    assert len(Tokenizer.load(folder).sentinel_ids) == 100


def test_a_missing_package_for_spiece_model_is_named(tmp_path, monkeypatch):
    (tmp_path / "spiece.model").write_bytes(spiece())
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    with pytest.raises(MissingExtraError, match=r"switchlm\[sentencepiece\]"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("spiece.model", b"\x0a\xff\xff"),
        ("spiece.model", b""),
        ("tokenizer_config.json", b"["),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"a": {}}}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"3": {"content": 4}}}'),
        ("tokenizer_config.json", b'{"pad_token": {"content": "x", "special": 1}}'),
        ("tokenizer_config.json", b'{"extra_ids": 1000000000}'),
        ("tokenizer_config.json", b'{"extra_ids": true}'),
        ("tokenizer_config.json", b'{"extra_special_tokens": "abc"}'),
        ("tokenizer_config.json", b'{"eos_token": {"content": ""}}'),
        ("added_tokens.json", b'{"<x>": "7"}'),
        ("added_tokens.json", b'{"<x>": Infinity}'),
        ("special_tokens_map.json", b'{"additional_special_tokens": [7]}'),
        ("config.json", b"{" * 100_000),
    ],
)  # fmt: skip
def test_damaged_files_raise_data_errors(tmp_path, name, content):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    (tmp_path / "spiece.model").write_bytes(spiece())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError):
        Tokenizer.load(tmp_path)
