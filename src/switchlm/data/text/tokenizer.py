"""The tokenizer: wraps a `tokenizers.Tokenizer`, with T5's special tokens.

A text is encoded and decoded as transformers' AutoTokenizer does. In tokenizers made here padding
is 0 and the end token 1; sentinels `<extra_id_0>`, `<extra_id_1>`, ... count down from the highest
id. The vocabulary size is rounded up to a multiple of 128.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken

from switchlm.data.order import Int64
from switchlm.data.text import tokenizer_files
from switchlm.data.text.added_tokens import sentinel
from switchlm.data.text.byte_level import (
    END,
    PAD,
    UNKNOWN,
    byte_symbols,
    bytes_backend,
    encode_bytes,
    is_byte_model,
)
from switchlm.data.text.tokenizer_files import SavedTokenizer
from switchlm.data.text.tokenizer_limits import check_growth, growing_parts, library
from switchlm.errors import DataError
from switchlm.files import make_folder, replace_file

NUM_SENTINELS = 100
MULTIPLE = 128
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PADS = (PAD, "[PAD]", "<|pad|>")
_ENDS = (END, "<eos>", "<|endoftext|>", "<|end_of_text|>", "[SEP]")
_UNKNOWNS = (UNKNOWN, "[UNK]")
# What transformers' clean_up_tokenization_spaces replaces, in this order.
_CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The vocabulary of a model: its size, and the ids of padding and of the end token."""

    size: int
    pad_id: int
    end_id: int


class Tokenizer:
    """Encodes and decodes.

    backend: the Hugging Face tokenizer behind it.
    sentinel_ids: by their number; mT5's are pieces of its vocabulary.
    unknown_id: the id of text that the vocabulary lacks; None if there is none.
    before, after: ids around a text, see `complete`, without the end token.
    outer_ids: those and padding, which `decode` leaves out.
    skips_special: whether it leaves out all special tokens.
    added_names: matches the added tokens in a text.
    rewrites: texts that lose their outer spaces when decoded, in this order.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        num_sentinels: int = NUM_SENTINELS,
        vocabulary: Vocabulary | None = None,
        saved: SavedTokenizer | None = None,
    ) -> None:
        """Wrap `backend`; adds padding, end token and sentinels if it has none.

        vocabulary: that of the model, whose ids count, and into which added sentinels have to fit.
        saved: the special tokens that its files name.

        Raises DataError for tokens beyond that vocabulary.
        """
        self.backend = backend
        self.backend.no_padding()
        self.backend.no_truncation()
        names = {} if saved is None else saved.names
        self.skips_special = False
        self.rewrites = _CLEANED if saved is not None and saved.cleans_up else ()
        self._vocabulary, self._ends = vocabulary, _named(names, "eos_token", _ENDS)
        if vocabulary is None:
            self.pad_id = self._find_or_add(_named(names, "pad_token", _PADS))
            self.end_id = self._find_or_add(self._ends)
        else:
            self.pad_id, self.end_id = vocabulary.pad_id, vocabulary.end_id
            room = vocabulary.size - 1 - _highest_id(backend)
            if room < 0:
                raise DataError(
                    f"The tokenizer has ids up to {vocabulary.size - 1 - room}, but the model's "
                    f"vocabulary ends at {vocabulary.size - 1}: the tokenizer is that of another "
                    "model, or the embedding was not resized to it."
                )
            num_sentinels = min(num_sentinels, room)
        self.unknown_id = self._find(_named(names, "unk_token", _UNKNOWNS))
        if self._find_sentinel(0) is None:
            new = [sentinel(index) for index in reversed(range(num_sentinels))]
            backend.add_special_tokens([AddedToken(name, normalized=False) for name in new])
        ids: list[int] = []
        while (number := self._find_sentinel(len(ids))) is not None:
            ids.append(number)
        self.sentinel_ids: tuple[int, ...] = tuple(ids)
        self._special = np.array([self.pad_id, self.end_id, *ids], dtype=np.int64)
        self._bytes = is_byte_model(backend)
        self._growing = growing_parts(backend)
        self._plain = _without_special(backend)
        added = [token.content for token in backend.get_added_tokens_decoder().values()]
        # In the reverse order a longer name comes before its beginning.
        longest_first = sorted(map(re.escape, added), reverse=True)
        self.added_names = re.compile(f"({'|'.join(longest_first) or '(?!)'})")
        with library("encode and decode a text"):
            self.before, self.after = _template(backend, self.end_id)
            backend.decode(backend.encode("a b\n<").ids)
        self.outer_ids = frozenset([self.pad_id, self.end_id, *self.before, *self.after])
        rounded = -(-(_highest_id(backend) + 1) // MULTIPLE) * MULTIPLE
        self.vocabulary_size = rounded if vocabulary is None else vocabulary.size

    def _find(self, names: Sequence[str]) -> int | None:
        found = (self.backend.token_to_id(name) for name in names)
        return next((number for number in found if number is not None), None)

    def _find_or_add(self, names: Sequence[str]) -> int:
        if (number := self._find(names)) is not None:
            return number
        self.backend.add_special_tokens([names[0]])
        return self.backend.get_vocab()[names[0]]

    def _find_sentinel(self, index: int) -> int | None:
        name = sentinel(index)
        # mT5's vocabulary has them as pieces, with the space before them.
        added, piece = self._find([name]), self._find([f"▁{name}"])
        if added is None or piece is None:
            return piece if added is None else added
        # Of both, the one that a text with it gets.
        with library("encode a text"):
            return piece if piece in self.backend.encode(name).ids else added

    @classmethod
    def bytes(cls, num_sentinels: int = NUM_SENTINELS) -> "Tokenizer":
        """Return the tokenizer of UTF-8 bytes: byte b has id 3 + b, as in ByT5."""
        return cls(bytes_backend(), num_sentinels)

    @classmethod
    def load(
        cls,
        path: Path | str,
        vocabulary: Vocabulary | None = None,
        num_sentinels: int = NUM_SENTINELS,
    ) -> "Tokenizer":
        """Read a `tokenizer.json` as it is, or a folder as transformers' AutoTokenizer reads it.

        vocabulary: that of the model.
        num_sentinels: the number to add to a tokenizer that has none.

        Raises DataError if missing or invalid.
        """
        path = Path(path)
        if path.is_file():
            backend = tokenizer_files.read_tokenizer_json(tokenizer_files.read_text(path))
            return cls(backend, num_sentinels, vocabulary)
        saved = tokenizer_files.read_folder(path) if path.is_dir() else None
        if saved is None:
            raise DataError(
                f"There is no tokenizer at {str(path)!r}: give a tokenizer.json, a folder that "
                "holds one or a spiece.model, 'bytes' or 'unigram'."
            )
        return cls(saved.backend, num_sentinels, vocabulary, saved)

    @classmethod
    def from_json(cls, text: str, vocabulary: Vocabulary | None = None) -> "Tokenizer":
        """Read the text of a `tokenizer.json`. Raises DataError."""
        return cls(tokenizer_files.read_tokenizer_json(text), vocabulary=vocabulary)

    def byte(self, token: int) -> int | None:
        """Return the byte of a byte token, such as `<0xE2>`; None for other tokens."""
        piece = self.backend.id_to_token(token) or ""
        if match := _BYTE_PIECE.fullmatch(piece):
            return int(match[1], 16)
        # Byte-level vocabularies write a byte that is not ASCII as a printable character.
        symbols = byte_symbols()
        return symbols.index(piece) if piece in symbols and not piece.isascii() else None

    def to_json(self) -> str:
        """Return the text of a `tokenizer.json`."""
        return self.backend.to_str()

    def save(self, folder: Path | str) -> None:
        """Write `tokenizer.json`, and `tokenizer_config.json` for transformers' AutoTokenizer."""
        folder = Path(folder)
        make_folder(folder)
        replace_file(folder / "tokenizer.json", self.backend.to_str(pretty=True).encode())
        added = self.backend.get_added_tokens_decoder()
        names: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": self.backend.id_to_token(self.pad_id),
            "eos_token": self.backend.id_to_token(self.end_id),
            "additional_special_tokens": [
                self.backend.id_to_token(number) for number in self.sentinel_ids if number in added
            ],
            "clean_up_tokenization_spaces": bool(self.rewrites),
        }
        if self.unknown_id is not None:
            names["unk_token"] = self.backend.id_to_token(self.unknown_id)
        if self.backend.encode_special_tokens:
            names["split_special_tokens"] = True
        names = {key: value for key, value in names.items() if value is not None}
        text = json.dumps(names, indent=2, ensure_ascii=False) + "\n"
        replace_file(folder / "tokenizer_config.json", text.encode())

    def fingerprint(self) -> str:
        """Return a hash that is equal for equal tokenizers."""
        text = self.to_json()
        if self._vocabulary is not None and self.end_id != self._find(self._ends):
            text += f" ends {self.end_id}"  # documents in caches end with it
        return hashlib.sha256(text.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without those that `complete` puts around them.

        Added tokens in the text, such as sentinels, are their ids: `</s>` is the end token. Raises
        DataError for text that is not Unicode.
        """
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Return what `encode` returns of each text; other threads run meanwhile."""
        for text in texts:
            _check_unicode(text)
        if self._bytes:
            return [self._encode_bytes(text) for text in texts]
        with library("encode a text"):
            self._check_growth(texts)
            found = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def _check_growth(self, texts: Sequence[str]) -> None:
        if self._growing:
            for text in texts:
                check_growth(self._growing, text)

    def _encode_bytes(self, text: str) -> list[int]:
        ids: list[int] = []
        # Splitting by a group puts the added tokens at the odd places.
        for place, part in enumerate(self.added_names.split(text)):
            if place % 2:
                ids.append(self.backend.token_to_id(part) or 0)
            else:
                ids += encode_bytes(part).tolist()
        return ids

    def encoding(self, text: str) -> tokenizers.Encoding:
        """Return what `backend` makes of a text, with offsets; other threads run meanwhile."""
        with library("encode the text"):
            self._check_growth([text])
            return self.backend.encode_batch([text], add_special_tokens=False)[0]

    def complete(self, ids: Sequence[int], end_id: int | None = None) -> list[int]:
        """Return the ids of a whole input or target: the end token is the last.

        The tokens around a text are those of transformers, such as CodeT5's `<s>` before it, but
        the end token is there without a template, as in training, and unlike ByT5Tokenizer's after
        a text's own `</s>` too.

        end_id: the model's, if it differs from the tokenizer's.
        """
        return [*self.before, *ids, *self.after, self.end_id if end_id is None else end_id]

    def encode_plain(self, texts: Sequence[str]) -> list[Int64]:
        """Encode documents, with special tokens in them as ordinary text; int64 arrays.

        So `</s>` in a corpus does not end a document.
        """
        if self._bytes:
            return [encode_bytes(text) for text in texts]
        with library("encode a text"):
            self._check_growth(texts)
            encodings = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
        # Some tokenizers keep the special names among their ordinary pieces.
        return [tokens[~np.isin(tokens, self._special)] for tokens in ids]

    def without_special(self) -> "Tokenizer":
        """Return this tokenizer, but its `decode` leaves out all special tokens.

        Sentinels are such, but not where they are pieces of the vocabulary, as in mT5's.
        """
        other = copy(self)
        other.skips_special = True
        return other

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text without `outer_ids`."""
        return self.decode_all([ids])[0]

    def decode_all(self, rows: Iterable[Iterable[int]]) -> list[str]:
        """Return what `decode` returns of each row."""
        kept = [[n for n in map(int, row) if n not in self.outer_ids] for row in rows]
        with library("decode the tokens"):
            texts = self.backend.decode_batch(kept, skip_special_tokens=self.skips_special)
        for found in self.rewrites:
            texts = [text.replace(found, found.strip()) for text in texts]
        return texts


def _highest_id(backend: tokenizers.Tokenizer) -> int:
    return max(backend.get_vocab(with_added_tokens=True).values(), default=-1)


def _named(names: Mapping[str, str], name: str, usual: Sequence[str]) -> Sequence[str]:
    return (names[name],) if name in names else usual


def _template(
    backend: tokenizers.Tokenizer, end_id: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids before and after a text, without the end token at the end."""
    encoding = backend.encode("a")
    text = [place for place, special in enumerate(encoding.special_tokens_mask) if not special]
    first, last = (text[0], text[-1] + 1) if text else (0, 0)
    after = encoding.ids[last:]
    if after[-1:] == [end_id]:
        after.pop()
    return tuple(encoding.ids[:first]), tuple(after)


def _without_special(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Return a tokenizer with the same model that encodes special tokens as ordinary text.

    Setting `encode_special_tokens` of `backend` would change it for all threads.
    """
    plain = tokenizers.Tokenizer(backend.model)
    plain.normalizer = backend.normalizer
    plain.pre_tokenizer = backend.pre_tokenizer
    added = backend.get_added_tokens_decoder().values()
    for special, tokens in groupby(added, key=lambda token: token.special):
        (plain.add_special_tokens if special else plain.add_tokens)(list(tokens))
    plain.encode_special_tokens = True
    return plain


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError("The text holds half of a surrogate pair, which is not Unicode.") from None
