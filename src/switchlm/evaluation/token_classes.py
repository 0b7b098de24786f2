"""What kind of token each is: letters, digits, signs, spaces, sentinels, starts of words.

Vocabularies of bytes and of pieces get the same classes: a byte of a longer character is of the
class of its character, and whether a letter starts a word is told by the token before it.
"""

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

from switchlm.data.tokenizer import Tokenizer

CLASSES = (
    "word start",
    "inside a word",
    "number",
    "punctuation",
    "space",
    "mixed",
    "part of a character",
    "sentinel",
    "start or end",
)
_CLASS = {name: index for index, name in enumerate(CLASSES)}
_SENTINEL = re.compile(r"<extra_id_\d+>")
_OTHER_SPECIAL = re.compile(r"<pad>|</s>|<id \d+>")
_CUT = "\ufffd"  # what bytes decode to that are no whole character
_LONGEST_CHARACTER = 4  # bytes
_SPACE_MARKS = ("▁", "Ġ")  # how pieces write the space before a word


class TokenClasses:
    """Classifies rows of token ids of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._text = lru_cache(maxsize=2**16)(self._decode)
        self._has_mark = lru_cache(maxsize=2**16)(self._starts_with_mark)

    def of_rows(self, tokens_BS: Tensor) -> Tensor:
        """Return int64 [B, S] on the CPU: the index in CLASSES of every token."""
        rows = [list(self._of_row(row)) for row in tokens_BS.tolist()]
        return torch.tensor(rows, dtype=torch.int64).reshape(tokens_BS.shape)

    def _of_row(self, row: list[int]) -> Iterable[int]:
        before = "x"  # a row may begin anywhere, so its first letters start no word
        place = 0
        while place < len(row):
            length, text = self._character(row, place)
            name = token_class(text, before, marked=self._has_mark(row[place]))
            for offset in range(length):
                started = name == "word start" and offset > 0
                yield _CLASS["inside a word" if started else name]
            if name in ("sentinel", "part of a character"):
                before = "x"  # what stood there is unknown
            else:
                before = text
            place += length

    def _character(self, row: list[int], place: int) -> tuple[int, str]:
        """Return how many tokens from `place` on make up whole characters, and their text."""
        text = self._text((row[place],))
        if _CUT in text:
            for length in range(2, _LONGEST_CHARACTER + 1):
                longer = self._text(tuple(row[place : place + length]))
                if _CUT not in longer:
                    return min(length, len(row) - place), longer
        return 1, text

    def _decode(self, ids: tuple[int, ...]) -> str:
        if len(ids) == 1:
            return _text(self.tokenizer, ids[0])
        return self.tokenizer.decode(ids)

    def _starts_with_mark(self, token: int) -> bool:
        piece = self.tokenizer.backend.id_to_token(token) or ""
        return piece.startswith(_SPACE_MARKS)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return how a token reads; what has no text of its own has a name, as in `<0xE2>`."""
    text = _text(tokenizer, token)
    byte = tokenizer.byte(token) if _CUT in text else None
    return text if byte is None else f"<0x{byte:02X}>"


def _text(tokenizer: Tokenizer, token: int) -> str:
    if token == tokenizer.pad_id:
        return "<pad>"
    if token == tokenizer.end_id:
        return "</s>"
    return tokenizer.decode([token]) or f"<id {token}>"


def token_class(text: str, before: str = "", marked: bool = False) -> str:
    """Return one of CLASSES for the text of a token (or of a character in several tokens).

    before: the text of the token before it. marked: whether the piece begins with a space that
    `text` may lack, since some tokenizers drop the first one.
    """
    bare = text.strip()
    if not bare:
        return "space"
    if _SENTINEL.fullmatch(bare):
        return "sentinel"
    if _OTHER_SPECIAL.fullmatch(bare):
        return "start or end"
    if _CUT in bare:
        return "part of a character"
    kinds = {unicodedata.category(character)[0] for character in bare}
    if kinds <= {"L", "M"}:
        starts = marked or text[0].isspace() or not _in_word(before[-1:])
        return "word start" if starts else "inside a word"
    if kinds == {"N"}:
        return "number"
    if kinds <= {"P", "S"}:
        return "punctuation"
    return "mixed"


def _in_word(character: str) -> bool:
    return bool(character) and unicodedata.category(character)[0] in "LM"
