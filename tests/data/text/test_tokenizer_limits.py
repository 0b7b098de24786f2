"""Hostile and damaged tokenizer files are refused in bounded time and memory."""

import base64
import copy
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.data.text.tokenizer_limits import parse
from switchlm.errors import DataError


def unigram(**changes):
    vocabulary = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["▁", -1.0], ["a", -2.0]]
    model = {"type": "Unigram", "unk_id": 2, "vocab": vocabulary, "byte_fallback": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "model": model,
    } | changes  # fmt: skip


def replace(pattern, content, kind="String"):
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def sequence(name, parts):
    return {"type": "Sequence", name: parts}


def added(**changes):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return [{"id": 5, "content": "<x>"} | flags | changes]


DOUBLING = [replace("a", "aa")] * 34
CHARSMAP = base64.b64encode((0).to_bytes(4, "little") + b"x" * 5000 + b"\0").decode()
WORDPIECE = {
    "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 100, "vocab": {"a": 0, "</s>": 1, "<pad>": 2},
}  # fmt: skip
TEMPLATE = {
    "type": "TemplateProcessing", "pair": [],
    "single": [{"SpecialToken": {"id": "</s>", "type_id": 0}}] * 5000,
    "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
}  # fmt: skip
BYTE_LEVEL = {
    "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True
}  # fmt: skip
METASPACES = [
    {"type": "Metaspace", "replacement": mark, "prepend_scheme": "always", "split": True}
    for mark in "▁é"
]
HOSTILE = {
    "doubling normalizers": {"normalizer": sequence("normalizers", DOUBLING)},
    "doubling decoders": {"decoder": sequence("decoders", DOUBLING)},
    "nested doubling": {
        "normalizer": sequence("normalizers", [sequence("normalizers", DOUBLING[:17])] * 2)
    },
    "bytes of bytes": {"normalizer": sequence("normalizers", [{"type": "ByteLevel"}] * 34)},
    "bytes of bytes in pieces": {
        "pre_tokenizer": sequence("pretokenizers", [BYTE_LEVEL | {"use_regex": False}] * 34)
    },
    "Unicode forms with replacements between": {
        "normalizer": sequence("normalizers", [{"type": "NFKD"}, replace("جل", "ﷻ")] * 31)
    },
    "spaces before spaces": {"pre_tokenizer": sequence("pretokenizers", [BYTE_LEVEL] * 8)},
    "marks before marks": {"pre_tokenizer": sequence("pretokenizers", METASPACES * 32)},
    "a normalizer and pieces": {
        "normalizer": sequence("normalizers", DOUBLING[:8]),
        "pre_tokenizer": sequence("pretokenizers", [BYTE_LEVEL] * 3),
    },
    "a long prefix of pieces": {
        "model": WORDPIECE | {"unk_token": "a", "continuing_subword_prefix": "#" * 1_000_000}
    },
    "long pieces and long replacements": {
        "model": unigram()["model"] | {"vocab": [["a" * 4000, 0.0]] * 3},
        "decoder": sequence("decoders", [replace("a", "b" * 45)] * 2),
    },
    "expressions that insert": {
        "normalizer": sequence("normalizers", [replace("x*", "yyyy", "Regex")] * 12)
    },
    "an empty pattern": {"normalizer": replace("", "a")},
    "a long prepend": {"normalizer": {"type": "Prepend", "prepend": "a" * 1_000_000}},
    "a long replacement": {"decoder": replace("a", "b" * 1_000_000)},
    "many prepends": {
        "normalizer": sequence("normalizers", [{"type": "Prepend", "prepend": "a" * 200}] * 8)
    },
    "a long piece": {"model": unigram()["model"] | {"vocab": [["a" * 1_000_000, 0.0]] * 3}},
    "a long added token": {"added_tokens": added(content="a" * 1_000_000)},
    "a charsmap of long texts": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": CHARSMAP}
    },
    "a damaged charsmap": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "////////AAAA"}
    },
    "a charsmap of another type": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": [7]}
    },
    "a strip that panics": {
        "decoder": {"type": "Strip", "content": "a", "start": 2**62, "stop": 0}
    },
    "pieces of length 0": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "nested repeats": {
        "pre_tokenizer": {
            "type": "Split", "pattern": {"Regex": "(a+)+b"},
            "behavior": "Isolated", "invert": False,
        }
    },
    "nested repeats in a decoder": {"decoder": replace("(a*)*b", "", "Regex")},
    "a long template": {"post_processor": TEMPLATE},
    "long words": {
        "model": WORDPIECE | {"unk_token": "a", "max_input_chars_per_word": 1_000_000_000}
    },
    "no unknown token": {"model": WORDPIECE},
    "a list as unknown token": {"model": WORDPIECE | {"unk_token": []}},
    "a bool as id": {"added_tokens": added(id=True)},
    "an infinite id": {"added_tokens": added(id=1e400)},
    "a bool as a token": {"added_tokens": True},
    "a number as content": {"added_tokens": added(content=3)},
    "an empty added token": {"added_tokens": added(content="")},
    "a text as flag": {"added_tokens": added(special="yes")},
    "no scores": {"model": unigram()["model"] | {"vocab": ["a", "b", "c"]}},
    "an infinite score": {"model": unigram()["model"] | {"vocab": [["a", 1e400]]}},
    "no vocabulary": {"model": unigram()["model"] | {"vocab": None}},
    "an unknown id beyond": {"model": unigram()["model"] | {"unk_id": 9}},
    "another model": {"model": {"type": "Other", "vocab": {}}},
    "a pipeline of numbers": {"normalizer": sequence("normalizers", [7])},
    "a pipeline of a text": {"decoder": "ByteLevel"},
    "deep nesting": {"padding": json.loads("[" * 900 + "]" * 900)},
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_at_once(name):
    text = json.dumps(unigram(**HOSTILE[name]))
    start = time.thread_time()
    with pytest.raises(DataError):
        Tokenizer.from_json(text)
    assert time.thread_time() - start < 1


@pytest.mark.parametrize("text", ['{"model": {}, "model": {}}', '{"model": NaN}', "[" * 100_000])
def test_json_that_two_programs_may_read_differently_is_refused(text):
    with pytest.raises(DataError, match="not JSON"):
        Tokenizer.from_json(text)


def test_padding_and_truncation_of_a_file_have_no_effect():
    padding = {
        "strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>",
    }  # fmt: skip
    truncation = {
        "direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    tokenizer = Tokenizer.from_json(json.dumps(unigram(padding=padding, truncation=truncation)))
    assert tokenizer.encode("aaa") == [4, 4, 4]
    assert [ids.tolist() for ids in tokenizer.encode_plain(["aaa"])] == [[4, 4, 4]]


def test_a_text_that_becomes_far_longer_is_refused_and_others_are_not():
    tokenizer = Tokenizer.from_json(
        json.dumps(unigram() | {"normalizer": sequence("normalizers", DOUBLING[:10])})
    )
    assert len(tokenizer.encode("ab")) > 0
    text = "a" * 1000
    for encode in (tokenizer.encode, tokenizer.encoding):
        with pytest.raises(DataError, match="20 times as long"):
            encode(text)
    with pytest.raises(DataError, match="20 times as long"):
        tokenizer.encode_plain([text])


def test_the_normalizers_of_albert_and_xlnet_are_taken():
    """Their parts could lengthen a text by 5,808 at most, and do not."""
    charsmap = base64.b64encode((0).to_bytes(4, "little") + b"x" * 33 + b"\0").decode()
    parts = [
        replace("``", '"'), replace("''", '"'), {"type": "NFKD"}, {"type": "StripAccents"},
        {"type": "Lowercase"}, {"type": "Precompiled", "precompiled_charsmap": charsmap},
        replace(" {2,}", " ", "Regex"),
    ]  # fmt: skip
    pieces = sequence("pretokenizers", [{"type": "WhitespaceSplit"}, METASPACES[0]])
    parse(
        json.dumps(
            unigram() | {"normalizer": sequence("normalizers", parts), "pre_tokenizer": pieces}
        )
    )


def test_a_panic_of_the_library_is_an_error_of_this_request_alone():
    tokenizer = Tokenizer.from_json(json.dumps(unigram()))
    assert tokenizer.decode([4]) == "a"

    class Panicking:
        def decode_batch(self, rows, **options):
            raise type("PanicException", (BaseException,), {})("index out of bounds")

        encode_batch_fast = decode_batch

    broken = copy.copy(tokenizer)
    broken.backend = Panicking()
    with pytest.raises(DataError, match="cannot decode the tokens: index out of bounds"):
        broken.decode([4])
    with pytest.raises(DataError, match="cannot encode a text"):
        broken.encode_all([])
    assert tokenizer.decode([4]) == "a"


def _places(values, path=()):
    """Yield the path of every value within a JSON value."""
    yield path
    if isinstance(values, dict | list):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from _places(value, (*path, key))


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
SINGLE = [{"Sequence": {"id": "A", "type_id": 0}}, *TEMPLATE["single"][:1]]
BASE = unigram(
    added_tokens=added(),
    normalizer=sequence("normalizers", [replace(" ", "▁"), {"type": "NFC"}]),
    pre_tokenizer=METASPACE,
    decoder=sequence("decoders", [replace("▁", " "), STRIP]),
    post_processor=TEMPLATE | {"single": SINGLE},
)
VALUES = st.sampled_from(
    [None, True, False, -1, 0, 1, 2**31, 2**63, 10**30, 1.5, 1e400, "", "a", [], {}, [7], {"a": 1}]
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_fuzzed_files_raise_nothing_but_data_errors(data):
    values = copy.deepcopy(BASE)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from([place for place in _places(values) if place]))
        holder = values
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = copy.deepcopy(data.draw(VALUES))  # or it may come to hold itself
    try:
        tokenizer = Tokenizer.from_json(json.dumps(values))
        tokenizer.decode(tokenizer.encode("a b<x> </s>"))
    except DataError:
        return
    assert tokenizer.end_id < tokenizer.vocabulary_size
