"""The words of a text in any script, for metrics that count them.

A word is a run of letters, their marks, and digits. Chinese, Japanese, Thai, Lao, Khmer and Burmese
are written without spaces: each of their characters, with its marks, counts as a word, as in the
multilingual evaluations of XL-Sum (Hasan et al. 2021) and MLQA (Lewis et al. 2020). Of ASCII text
the words are those of rouge-score, and the answers those of SQuAD's script.

Texts are compared in Unicode's form NFKC, into which the tokenizers of T5 and mT5 put what they
write: a full-width digit equals the usual one, and an accent may be a character of its own.
"""

import re
import string
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain

_ASCII_WORD = re.compile("[a-z0-9]+")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ZERO_WIDTH_SPACE = "\u200b"
# First and last characters of the scripts without spaces.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Burmese
    "\u1780-\u17ff"  # Khmer
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"  # Japanese syllables
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"  # Chinese characters
)


def words(text: str) -> list[str]:
    """Return the lower-case words of a text; everything but letters, marks and digits is left out.

    An underscore ends a word, as in rouge-score; characters that only format do not.
    """
    text = normalise(text)
    if text.isascii():
        return _ASCII_WORD.findall(text)
    kept = (character for character in text if _kind(character) != "format")
    spaced = "".join(c if _kind(c) in ("word", "mark") else " " for c in kept)
    return list(chain.from_iterable(map(_characters, spaced.split())))


def answer_words(text: str) -> list[str]:
    """Return the words of an answer after `normalise_answer`, for F1."""
    return list(chain.from_iterable(map(_characters, normalise_answer(text).split())))


def normalise_answer(text: str) -> str:
    """Return lower-case words without punctuation and English articles (Rajpurkar et al. 2016).

    Punctuation is that of every script, as in MLQA's script, and ASCII's symbols.
    """
    bare = "".join(c for c in normalise(text) if _kind(c) not in ("punctuation", "format"))
    return " ".join(_ARTICLES.sub(" ", bare).split())


def normalise(text: str) -> str:
    """Return the text in NFKC and lower case, with a space for each zero-width one."""
    if text.isascii():
        return text.lower()
    folded = unicodedata.normalize("NFKC", text.replace(_ZERO_WIDTH_SPACE, " ")).lower()
    return unicodedata.normalize("NFC", folded)


def is_unspaced(character: str) -> bool:
    """Whether a character belongs to a script that is written without spaces."""
    return _UNSPACED.match(character) is not None


def _characters(word: str) -> Iterator[str]:
    """Yield each unspaced character of a word with its marks, and what lies between whole."""
    start = 0
    for place, character in enumerate(word):
        joins = place > 0 and (
            _kind(character) == "mark"
            or not (is_unspaced(character) or is_unspaced(_base(word, place - 1)))
        )
        if place > start and not joins:
            yield word[start:place]
            start = place
    if word:
        yield word[start:]


def _base(word: str, place: int) -> str:
    """Return the character that the marks before and at a place belong to."""
    while place > 0 and _kind(word[place]) == "mark":
        place -= 1
    return word[place]


@lru_cache(maxsize=2**16)
def _kind(character: str) -> str:
    """Return `word`, `mark`, `punctuation`, `format` or `other`."""
    category = unicodedata.category(character)
    if category[0] in "LN":
        return "word"
    if category[0] == "P" or character in string.punctuation:
        return "punctuation"
    if category[0] == "M":
        return "mark"
    return "format" if category == "Cf" else "other"
