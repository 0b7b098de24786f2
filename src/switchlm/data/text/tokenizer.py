"""The tokenizer: wraps a `tokenizers.Tokenizer`, and adds T5's special tokens.

In tokenizers made here padding is 0 and the end token 1; sentinels `<extra_id_0>`, `<extra_id_1>`,
... count down from the highest id. The vocabulary size is rounded up to a multiple of 128.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from switchlm.data.config import LARGEST_VOCABULARY
from switchlm.data.order import Int64
from switchlm.errors import DataError

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
NUM_SENTINELS = 100
MULTIPLE = 128
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_FIRST_BYTE = 3  # after the three special tokens, as in ByT5
_PADS = (PAD, "[PAD]", "<|pad|>")
_ENDS = (END, "<eos>", "<|endoftext|>", "<|end_of_text|>", "[SEP]")


def sentinel(index: int) -> str:
    """Return T5's sentinel number `index`."""
    return f"<extra_id_{index}>"


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The vocabulary of a model: its size, and the ids of padding and of the end token."""

    size: int
    pad_id: int
    end_id: int


class Tokenizer:
    """Encodes and decodes; `backend` is the Hugging Face tokenizer behind it."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        num_sentinels: int = NUM_SENTINELS,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """Wrap `backend`; adds padding, end token and sentinels if it has none.

        vocabulary: that of the model, whose ids count, and into which added sentinels have to fit.

        Raises DataError for tokens beyond that vocabulary.
        """
        self.backend = backend
        self.backend.no_padding()
        self.backend.no_truncation()
        self._vocabulary = vocabulary
        if vocabulary is None:
            self.pad_id = self._find_or_add(_PADS)
            self.end_id = self._find_or_add(_ENDS)
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
        if backend.token_to_id(sentinel(0)) is None:
            names = [sentinel(index) for index in reversed(range(num_sentinels))]
            backend.add_special_tokens([AddedToken(name, normalized=False) for name in names])
        ids: list[int] = []
        while (number := backend.token_to_id(sentinel(len(ids)))) is not None:
            ids.append(number)
        self.sentinel_ids: tuple[int, ...] = tuple(ids)
        self._sentinels = {number: sentinel(index) for index, number in enumerate(ids)}
        self._special = np.array([self.pad_id, self.end_id, *ids], dtype=np.int64)
        self._bytes = _is_byte_model(backend)
        self._plain = _without_special(backend)
        added = [token.content for token in backend.get_added_tokens_decoder().values()]
        self._special_names = re.compile(f"({'|'.join(map(re.escape, added))})")
        rounded = -(-(_highest_id(backend) + 1) // MULTIPLE) * MULTIPLE
        self.vocabulary_size = rounded if vocabulary is None else vocabulary.size

    def _find(self, names: Sequence[str]) -> int | None:
        ids = map(self.backend.token_to_id, names)
        return next((number for number in ids if number is not None), None)

    def _find_or_add(self, names: Sequence[str]) -> int:
        number = self._find(names)
        if number is None:
            self.backend.add_special_tokens([names[0]])
            number = self.backend.get_vocab()[names[0]]
        return number

    @classmethod
    def bytes(cls, num_sentinels: int = NUM_SENTINELS) -> "Tokenizer":
        """Return the tokenizer of UTF-8 bytes: byte b has id 3 + b, as in ByT5."""
        symbols = _byte_symbols()
        vocabulary = {PAD: 0, END: 1, UNKNOWN: 2}
        vocabulary |= {symbol: _FIRST_BYTE + byte for byte, symbol in enumerate(symbols)}
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([PAD, END, UNKNOWN])
        append_end(backend)
        return cls(backend, num_sentinels)

    @classmethod
    def load(cls, path: Path | str, vocabulary: Vocabulary | None = None) -> "Tokenizer":
        """Read a `tokenizer.json`, or that of a folder; DataError if missing or invalid.

        vocabulary: that of the model, see `__init__`.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise DataError(
                f"There is no tokenizer at {str(path)!r}: give a tokenizer.json, a folder that "
                "holds one, 'bytes' or 'unigram'."
            )
        try:
            return cls.from_json(file.read_text(encoding="utf-8"), vocabulary)
        except UnicodeDecodeError as error:
            raise DataError(f"The tokenizer {str(file)!r} is not UTF-8: {error}") from None

    @classmethod
    def from_json(cls, text: str, vocabulary: Vocabulary | None = None) -> "Tokenizer":
        """Read the text of a `tokenizer.json`."""
        try:
            _check_ids(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise DataError(f"The tokenizer file is not JSON: {error}") from None
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        # The library raises the base class.
        except Exception as error:
            raise DataError(f"The tokenizer file cannot be read by `tokenizers`: {error}") from None
        return cls(backend, vocabulary=vocabulary)

    def byte(self, token: int) -> int | None:
        """Return the byte of a byte token, such as `<0xE2>`; None for other tokens."""
        piece = self.backend.id_to_token(token) or ""
        if match := _BYTE_PIECE.fullmatch(piece):
            return int(match[1], 16)
        # Byte-level vocabularies write a byte that is not ASCII as a printable character.
        symbols = _byte_symbols()
        return symbols.index(piece) if piece in symbols and not piece.isascii() else None

    def to_json(self) -> str:
        """Return the text of a `tokenizer.json`."""
        return self.backend.to_str()

    def save(self, folder: Path | str) -> None:
        """Write `tokenizer.json`, and `tokenizer_config.json` for transformers' AutoTokenizer."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        names: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": self.backend.id_to_token(self.pad_id),
            "eos_token": self.backend.id_to_token(self.end_id),
            "additional_special_tokens": [
                self.backend.id_to_token(number) for number in self.sentinel_ids
            ],
            "clean_up_tokenization_spaces": False,
        }
        if self.backend.token_to_id(UNKNOWN) is not None:
            names["unk_token"] = UNKNOWN
        names = {key: value for key, value in names.items() if value is not None}
        text = json.dumps(names, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def fingerprint(self) -> str:
        """Return a hash that is equal for equal tokenizers."""
        text = self.to_json()
        if self._vocabulary is not None and self.end_id != self._find(_ENDS):
            text += f" ends {self.end_id}"  # documents in caches end with it
        return hashlib.sha256(text.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return token ids without an end token; parses special tokens in the text.

        Raises DataError for text that is not Unicode.
        """
        _check_unicode(text)
        if self._bytes:
            ids: list[int] = []
            # Splitting by a group puts the special tokens at the odd places.
            for place, part in enumerate(self._special_names.split(text)):
                if place % 2:
                    ids.append(self.backend.token_to_id(part) or 0)
                else:
                    ids += _encode_bytes(part).tolist()
            return ids
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_plain(self, texts: Sequence[str]) -> list[Int64]:
        """Encode documents, with special tokens in them as ordinary text; int64 arrays.

        So `</s>` in a corpus does not end a document.
        """
        if self._bytes:
            return [_encode_bytes(text) for text in texts]
        encodings = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]
        # Some tokenizers keep the special names among their ordinary pieces.
        return [tokens[~np.isin(tokens, self._special)] for tokens in ids]

    def decode(self, ids: Iterable[int], *, keep_sentinels: bool = True) -> str:
        """Return the text, without padding and end tokens."""
        dropped = {self.pad_id, self.end_id}
        if not keep_sentinels:
            dropped |= self._sentinels.keys()
        pieces: list[str] = []
        plain: list[int] = []
        # Consecutive ordinary ids are decoded together: a character may span several of them.
        for number in ids:
            number = int(number)
            if number in dropped:
                continue
            if number in self._sentinels:
                pieces += [self.backend.decode(plain), self._sentinels[number]]
                plain = []
            else:
                plain.append(number)
        return "".join([*pieces, self.backend.decode(plain)])


def append_end(backend: tokenizers.Tokenizer) -> None:
    """Let the tokenizer of transformers append the end token, as T5's does."""
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, 1)]
    )


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


def _highest_id(backend: tokenizers.Tokenizer) -> int:
    return max(backend.get_vocab(with_added_tokens=True).values(), default=-1)


def _check_ids(file: Any) -> None:
    """Raise DataError for huge ids, since the library allocates memory up to the largest."""
    model = file.get("model") if isinstance(file, dict) else None
    if not isinstance(model, dict):
        raise DataError("The tokenizer file has no model: it is not a tokenizer.json.")
    vocabulary = model.get("vocab")
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    added = file.get("added_tokens") or []
    ids += [token.get("id") for token in added if isinstance(token, dict)]
    for number in ids:
        if not isinstance(number, int) or not 0 <= number < LARGEST_VOCABULARY:
            raise DataError(
                f"The tokenizer file has the token id {number!r}; ids lie between 0 and "
                f"{LARGEST_VOCABULARY}, so it is probably damaged."
            )


def _byte_symbols() -> list[str]:
    """Return the printable character for each byte in GPT-2's byte-level scheme."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable}
    symbols |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    return [symbols[byte] for byte in range(256)]


def _is_byte_model(backend: tokenizers.Tokenizer) -> bool:
    """Return whether `backend` equals that of `Tokenizer.bytes`, so that numpy can encode."""
    model = json.loads(backend.to_str()) if backend.get_vocab_size(False) == 259 else {}
    if model.get("normalizer") is not None or model.get("model", {}).get("merges") != []:
        return False
    symbols = enumerate(_byte_symbols())
    return all(backend.token_to_id(symbol) == _FIRST_BYTE + byte for byte, symbol in symbols)


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError("The text holds half of a surrogate pair, which is not Unicode.") from None


def _encode_bytes(text: str) -> Int64:
    return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64) + _FIRST_BYTE
