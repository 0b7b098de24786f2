"""Read the tokenizer of a model folder as transformers' AutoTokenizer does.

The class of the tokenizer, which config.json and tokenizer_config.json name, decides how its files
are read. T5's class takes pieces and normalization from tokenizer.json, or from spiece.model where
there is none, and cuts words in its own way whatever the file says. ByT5's needs no file. Of all
others, tokenizer.json is used as it is.
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, processors

from switchlm.data.text.added_tokens import AddedTokens
from switchlm.data.text.byte_level import END, PAD, UNKNOWN, bytes_backend
from switchlm.data.text.sentencepiece_model import read_pieces, t5_backend
from switchlm.data.text.tokenizer_limits import library, parse
from switchlm.errors import DataError

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
SPIECE = "spiece.model"
_SPECIAL, _ADDED = "special_tokens_map.json", "added_tokens.json"
FILES = (TOKENIZER, SETTINGS, SPIECE, _SPECIAL, _ADDED)  # that a tokenizer may consist of
_LARGEST_SETTINGS = 2**24  # bytes
_T5, _BYT5, _AS_IT_IS = "T5Tokenizer", "ByT5Tokenizer", "TokenizersBackend"
_CLASS_OF_MODEL = {"t5": _T5, "mt5": _T5, "switch_transformers": _T5, "byt5": _BYT5}
_NAMES = {"pad_token": PAD, "eos_token": END, "unk_token": UNKNOWN}
# White space around ByT5's is part of them.
_BYT5_NAMES = {
    name: AddedToken(content, lstrip=True, rstrip=True) for name, content in _NAMES.items()
}
_BYT5_SENTINELS, _T5_SENTINELS = 125, 100


@dataclass(frozen=True, kw_only=True)
class SavedTokenizer:
    """A tokenizer as its files describe it.

    names: of special tokens, such as `eos_token`.
    cleans_up: whether spaces before punctuation are removed from decoded text.
    """

    backend: tokenizers.Tokenizer
    names: Mapping[str, str] = field(default_factory=dict)
    cleans_up: bool = False


def read_tokenizer_json(text: str) -> tokenizers.Tokenizer:
    """Return the tokenizer of the text of a tokenizer.json, as it is. Raises DataError."""
    parse(text)
    return _from_text(text)


def read_text(file: Path) -> str:
    """Return the text of a file. Raises DataError for one that is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"The tokenizer {str(file)!r} is not UTF-8: {error}") from None


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has the files of a tokenizer, or needs none."""
    named = _class(folder, _read_json(folder / SETTINGS))
    return named == _BYT5 or (folder / TOKENIZER).is_file() or (folder / SPIECE).is_file()


def read_folder(folder: Path) -> SavedTokenizer | None:
    """Read the tokenizer of a folder, None if it has none. Raises DataError."""
    settings = _read_json(folder / SETTINGS)
    named = _class(folder, settings)
    has_file, has_spiece = (folder / TOKENIZER).is_file(), (folder / SPIECE).is_file()
    text = read_text(folder / TOKENIZER) if has_file and named != _BYT5 else ""
    values = parse(text) if has_file and named != _BYT5 else {}
    added = AddedTokens(
        settings,
        _read_json(folder / _SPECIAL),
        _read_json(folder / _ADDED),
        values.get("added_tokens") or [],
    )
    if named == _BYT5:
        backend = bytes_backend(strip=True)
        added.default(_BYT5_NAMES, added.sentinels(_BYT5_SENTINELS, ()))
    elif has_file:
        backend = _from_text(text)
        if named == _T5 and values["model"].get("type") == "Unigram":
            vocabulary = [(piece, score) for piece, score in values["model"]["vocab"]]
            backend = _t5(vocabulary, _charsmap(values.get("normalizer")))
            names = {piece for piece, _ in vocabulary}
            added.default(_NAMES, added.sentinels(_T5_SENTINELS, names))
    elif has_spiece:
        backend = _converted(folder / SPIECE, added)
    else:
        return None
    with library("take its added tokens"):
        backend.add_tokens(added.tokens())
        if backend.post_processor is None and (named == _T5 or not has_file):
            end = added.names["eos_token"]
            backend.post_processor = processors.TemplateProcessing(
                single=f"$A {end}",
                pair=f"$A {end} $B {end}",
                special_tokens=[(end, backend.token_to_id(end))],
            )
    backend.encode_special_tokens = settings.get("split_special_tokens") is True
    return SavedTokenizer(
        backend=backend, names=added.names, cleans_up=_cleans_up(settings, backend)
    )


def _class(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """Return the class that transformers reads the files with, None if nothing names one."""
    config = _read_json(folder / "config.json")
    model_type = config.get("model_type")
    declared = settings.get("tokenizer_class") or config.get("tokenizer_class")
    if model_type == "umt5":
        return _AS_IT_IS
    if isinstance(declared, str):
        known = declared.removesuffix("Fast")
        return known if known in (_T5, _BYT5) else _AS_IT_IS
    return _CLASS_OF_MODEL.get(str(model_type))


def _converted(spiece: Path, added: AddedTokens) -> tokenizers.Tokenizer:
    """Return the tokenizer of a spiece.model: T5's, whatever class is named."""
    pieces = read_pieces(spiece)
    names = {piece for piece, _ in pieces.vocabulary}
    sentinels = added.sentinels(_T5_SENTINELS, names)
    added.default(_NAMES, sentinels, pieces.added)
    known = names if added.num_sentinels is None else ()
    further = [(name, 0.0) for name in reversed(sentinels) if name not in known]
    return _t5([*pieces.vocabulary, *further], pieces.charsmap)


def _from_text(text: str) -> tokenizers.Tokenizer:
    with library("be read"):
        return tokenizers.Tokenizer.from_str(text)


def _t5(vocabulary: list[tuple[str, float]], charsmap: bytes) -> tokenizers.Tokenizer:
    with library("be read"):
        return t5_backend(vocabulary, charsmap)


def _charsmap(normalizer: dict[str, Any] | None) -> bytes:
    """Return the first map of SentencePiece among the normalizers, empty without one."""
    steps = (normalizer or {}).get("normalizers") or [normalizer or {}]
    for step in steps:
        if step.get("type") == "Precompiled":
            return base64.b64decode(step["precompiled_charsmap"])
    return b""


def _cleans_up(settings: Mapping[str, Any], backend: tokenizers.Tokenizer) -> bool:
    name = "clean_up_tokenization_spaces"
    forced = settings.get(f"{name}_for_bpe_even_though_it_will_corrupt_output") is True
    return settings.get(name) is True and (type(backend.model).__name__ != "BPE" or forced)


def _read_json(file: Path) -> dict[str, Any]:
    """Return the object of a small JSON file, empty if there is no file."""
    if not file.is_file():
        return {}
    if file.stat().st_size > _LARGEST_SETTINGS:
        raise DataError(f"{file.name} has {file.stat().st_size:,} bytes; that is no configuration.")
    try:
        values = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file.name} is not JSON: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise DataError(f"{file.name} must hold a JSON object.")
    return values
