"""Refuse a tokenizer.json that would take time or memory without bound, or lacks what it names.

The library believes its file: replacements that each double a text make it 2**34 times as long, a
nested regular expression is matched for hours, a few absurd numbers allocate gigabytes, and a
refused allocation ends the process. So the file is checked before the library reads it: ids,
lengths, growth, and the time of regular expressions (`expressions.py`). Normalizers in use could
lengthen a text by thousands and do not, so where one could, every text is checked (`check_growth`).
"""

import base64
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tokenizers
from tokenizers import normalizers

from switchlm.data.config import LARGEST_VOCABULARY
from switchlm.data.text.expressions import check_expression
from switchlm.errors import DataError

LONGEST_PIECE = 4096  # bytes
LONGEST_OUTPUT = 2**14  # bytes; the longest piece, and what the decoder makes of it
LONGEST_STRING = 256  # bytes, of other settings
LARGEST_NUMBER = 10_000
LARGEST_GROWTH = 2**13  # bytes out of one byte, by all parts together; ALBERT's could make 5,808
UNCHECKED_GROWTH = 2**7  # of a normalizer, up to which texts are not checked one by one
MOST_GROWN = 20  # characters out of one character of a text; U+FDFA has 18 letters
MOST_PARTS = 64  # normalizers, pre-tokenizers, decoders, processors; and pieces of a template
MOST_EXPRESSIONS = 16  # regular ones
LONGEST_WORD = 256  # characters; WordPiece takes time cubic in it
_MODELS = ("BPE", "Unigram", "WordLevel", "WordPiece")
# What Unicode's forms make of one byte at most: 33 bytes of U+FDFA, which has 3.
_UNICODE = {"NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11, "Lowercase": 2}
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_PIPELINES = {"normalizers", "pretokenizers", "processors", "decoders"}


@contextmanager
def library(doing: str) -> Iterator[None]:
    """Turn the errors and the panics of `tokenizers` into DataError.

    A panic is no Exception, so that it would end a thread that serves many.
    """
    try:
        yield
    except (DataError, OSError):
        raise
    except BaseException as error:
        # The library raises the base class, and the class of a panic cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"The tokenizer cannot {doing}: {str(error)[:200]}") from None


def parse(text: str) -> dict[str, Any]:
    """Return the values of a tokenizer.json, checked.

    Raises DataError. A key that comes twice is refused, since the library may read the other one.
    """

    def refuse(name: str) -> float:
        raise ValueError(f"{name} is no number")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("a key comes twice")
        return values

    try:
        values = json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise DataError(f"The tokenizer file is not JSON: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise DataError("The tokenizer file has no model: it is not a tokenizer.json.")
    _check(values)
    return values


def _check(values: dict[str, Any]) -> None:
    """Raise DataError unless the values are within the limits above."""
    pieces = _check_model(values["model"])
    added = values.get("added_tokens") or []
    _require(isinstance(added, list), "added_tokens", added)
    for token in added:
        _require(isinstance(token, dict), "an added token", token)
        _check_piece(token.get("content"))
        _check_id(token.get("id"))
        _require(token.get("content") != "", "an empty added token", token)
        pieces.append(token["content"])
    expressions: set[str] = set()
    growth = dict.fromkeys(_PARTS, 1)
    for name in _PARTS:
        parts = list(_parts(values.get(name), name))
        _require(len(parts) <= MOST_PARTS, f"the number of parts of the {name}", len(parts))
        for part in parts:
            _check_part(part, name)
            patterns = (value.get("Regex") for value in part.values() if isinstance(value, dict))
            expressions.update(pattern for pattern in patterns if isinstance(pattern, str))
        growth[name] = math.prod(_growth(part, name) for part in parts)
    encoding = growth["normalizer"] * growth["pre_tokenizer"]
    for factor in (encoding, growth["decoder"]):
        _require(factor <= LARGEST_GROWTH, "parts that lengthen a text by a factor of", factor)
    output = growth["decoder"] * max(map(_size, pieces), default=0)
    _require(output <= LONGEST_OUTPUT, "a decoder that makes of a token as many bytes as", output)
    # Last, as it takes the most time.
    _require(len(expressions) <= MOST_EXPRESSIONS, "this many expressions:", len(expressions))
    for expression in expressions:
        check_expression(expression)


def growing_parts(backend: tokenizers.Tokenizer) -> list[normalizers.Normalizer]:
    """Return the parts of a normalizer for `check_growth`; none if it can lengthen nothing much."""
    if backend.normalizer is None:
        return []
    parts = [json.loads(backend.normalizer.__getstate__())]
    while any(_inner(part) for part in parts):
        parts = [one for part in parts for one in (_inner(part) or [part])]
    if math.prod(_growth(part, "normalizer") for part in parts) <= UNCHECKED_GROWTH:
        return []
    return [_normalizer(part) for part in parts]


def _inner(part: dict[str, Any]) -> list[dict[str, Any]] | None:
    return part.get("normalizers")


def _normalizer(part: dict[str, Any]) -> normalizers.Normalizer:
    made = normalizers.Lowercase()  # of any class
    made.__setstate__(json.dumps(part).encode())
    return made


def check_growth(parts: Sequence[normalizers.Normalizer], text: str) -> None:
    """Raise DataError if a normalizer makes a text far longer, after each of its parts."""
    longest = MOST_GROWN * len(text) + LONGEST_PIECE
    for part in parts:
        text = part.normalize_str(text)
        if len(text) > longest:
            raise DataError(
                f"The tokenizer makes a text more than {MOST_GROWN} times as long before it is "
                "tokenized: it is damaged, or made to exhaust this machine."
            )


def _check_model(model: dict[str, Any]) -> list[str]:
    """Return the pieces of the vocabulary."""
    kind, vocabulary = model.get("type"), model.get("vocab")
    _require(kind is None or kind in _MODELS, "a model of the type", kind)
    if isinstance(vocabulary, dict):
        for piece, number in vocabulary.items():
            _check_piece(piece)
            _check_id(number)
    elif isinstance(vocabulary, list):
        check_vocabulary(vocabulary)
    else:
        raise DataError("The tokenizer file has no vocabulary: it is not a tokenizer.json.")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):  # put beside many pieces
        affix = str(model.get(name) or "")
        _require(_size(affix) <= LONGEST_STRING, f"the {name}", affix)
    longest = model.get("max_input_chars_per_word", 0)
    _require(_is_count(longest, LONGEST_WORD), "max_input_chars_per_word of", longest)
    unknown = model.get("unk_token")
    known = isinstance(unknown, str) and unknown in vocabulary
    if kind in ("WordPiece", "WordLevel") and not known:
        raise DataError(
            f"The tokenizer file names the unknown token {str(unknown)[:60]!r}, which its "
            "vocabulary lacks, so that it cannot encode every text."
        )
    return list(vocabulary) if isinstance(vocabulary, dict) else [piece for piece, _ in vocabulary]


def check_vocabulary(vocabulary: Sequence[Any]) -> None:
    """Raise DataError unless these are pairs of a piece and a finite score."""
    _require(len(vocabulary) <= LARGEST_VOCABULARY, "a vocabulary of the size", len(vocabulary))
    for entry in vocabulary:
        _require(isinstance(entry, list | tuple) and len(entry) == 2, "the entry", entry)
        _check_piece(entry[0])
        _require(_is_finite(entry[1]), "the score", entry[1])


def _parts(value: Any, name: str) -> Iterator[dict[str, Any]]:
    """Yield the parts of a pipeline, of sequences within sequences too."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if part is None:
            continue
        _require(isinstance(part, dict), f"the {name}", part)
        inner = [part[key] for key in part.keys() & _PIPELINES]
        if inner:
            for parts in inner:
                _require(isinstance(parts, list), f"the {name}", parts)
                waiting += parts
        else:
            yield part


def _check_part(part: dict[str, Any], name: str) -> None:
    _require(isinstance(part.get("type"), str), f"in {name} the type", part.get("type"))
    for key, value in part.items():
        if key == "precompiled_charsmap":
            continue
        if isinstance(value, dict) and isinstance(value.get("Regex"), str):
            continue
        for leaf in _leaves(value):
            if isinstance(leaf, str):
                _require(_size(leaf) <= LONGEST_STRING, f"in {name}", leaf)
            elif not isinstance(leaf, bool | None):
                limit = LARGEST_VOCABULARY if name == "post_processor" else LARGEST_NUMBER
                _require(_is_count(leaf, limit), f"in {name} the number", leaf)
    pattern = part.get("pattern")
    _require(pattern != {"String": ""}, f"in {name} an empty pattern of", part.get("type"))
    _require(part.get("type") != "FixedLength" or part.get("length"), "pieces of length", 0)


def _leaves(value: Any) -> Iterator[Any]:
    waiting, found = [value], 0
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict | list):
            waiting += one.values() if isinstance(one, dict) else one
            found += len(one)
            _require(found <= 16 * MOST_PARTS, "a template of this many parts:", found)
        else:
            yield one


def _growth(part: dict[str, Any], name: str) -> int:
    """Return the most bytes that a part makes of one byte, each time that it is applied."""
    kind, pattern = part.get("type"), part.get("pattern")
    if name == "decoder" and kind in ("ByteLevel", "Metaspace"):
        return 1
    if kind in _UNICODE:
        return _UNICODE[str(kind)]
    if kind == "ByteLevel":  # a space before each piece; then two bytes for each that is not ASCII
        return 2 if part.get("add_prefix_space") is False else 4
    if kind == "Metaspace":  # put before each piece, and in the place of each space
        return 1 + _size(part.get("replacement", "▁"))
    if kind == "BertNormalizer":  # spaces around each Chinese character
        return 2
    if kind == "Prepend":
        return 1 + _size(part.get("prepend", ""))
    if kind == "Precompiled":
        return longest_replacement(_decoded(part.get("precompiled_charsmap")))
    if kind != "Replace" or not isinstance(pattern, dict):
        return 1
    content = _size(part.get("content", ""))
    if isinstance(literal := pattern.get("String"), str):
        return max(1, -(-content // max(1, _size(literal))))
    return 1 + content  # an expression may match nothing, between any two characters


def _size(text: Any) -> int:
    return len(str(text).encode("utf-8", "replace"))


def _decoded(charsmap: Any) -> bytes:
    try:
        return base64.b64decode(charsmap, validate=True)
    except (TypeError, ValueError):
        raise DataError("The tokenizer file has a damaged precompiled_charsmap.") from None


def longest_replacement(charsmap: bytes) -> int:
    """Return the length of the longest replacement of a map of SentencePiece, in bytes.

    The map is the size of a trie in four bytes, the trie, and the replacements, each ended by 0.
    """
    size = int.from_bytes(charsmap[:4], "little")
    valid = len(charsmap) >= 4 and size % 4 == 0 and 4 + size <= len(charsmap)
    _require(valid, "a precompiled_charsmap with a trie of the size", size)
    return max(1, *map(len, charsmap[4 + size :].split(b"\0")))


def _check_piece(piece: Any) -> None:
    _require(isinstance(piece, str), "the token", piece)
    _require(_size(piece) <= LONGEST_PIECE, "a token as long as", piece)


def _check_id(number: Any) -> None:
    if not _is_count(number, LARGEST_VOCABULARY - 1):
        raise DataError(
            f"The tokenizer file has the token id {str(number)[:60]}; ids lie between 0 and "
            f"{LARGEST_VOCABULARY}, so it is probably damaged."
        )


def _is_count(number: Any, largest: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number <= largest


def _is_finite(number: Any) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and abs(number) < 1e30


def _require(holds: Any, what: str, value: Any) -> None:
    if not holds:
        raise DataError(
            f"The tokenizer file has {what} {str(value)[:60]!r}, which is not valid or beyond what "
            "tokenizers need. It is damaged, or made to exhaust this machine."
        )
