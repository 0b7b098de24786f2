"""The tokenizer of a configuration: bytes, a file, or a Unigram model trained on the sources.

A trained tokenizer (Kudo 2018) falls back to bytes, so it is lossless on any text, and is stored
beside the token cache. As in SentencePiece, a space is written `▁` inside pieces (so a `▁` in a
text is decoded as a space, the one exception). Unlike SentencePiece, it does not normalise or
prepend anything: line breaks and indentation of program text are preserved.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from switchlm.data import order
from switchlm.data.config import DataConfig
from switchlm.data.text import sources
from switchlm.data.text.byte_level import END, PAD, UNKNOWN, append_end
from switchlm.data.text.sources import Source
from switchlm.data.text.token_cache import fingerprint
from switchlm.data.text.tokenizer import NUM_SENTINELS, Tokenizer
from switchlm.errors import DataError
from switchlm.files import Report, building

TRAINING_CHARACTERS = 8_000_000
_FORMAT = 2


def open_tokenizer(
    config: DataConfig, parsed: Sequence[Source], folder: Path, report: Report
) -> Tokenizer:
    """Return the tokenizer of `config`; a trained one is cached in `folder`."""
    if config.tokenizer == "bytes":
        return Tokenizer.bytes()
    if config.tokenizer != "unigram":
        return Tokenizer.load(config.tokenizer)
    prints = [fingerprint(one, config.columns, config.max_documents) for one in parsed]
    mixing = [config.mixing, config.mixing_exponent, [one.weight for one in parsed]]
    settings = [_FORMAT, config.vocabulary_size, TRAINING_CHARACTERS, mixing, prints]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:24]
    kept = folder / f"tokenizer-{key}.json"
    with building(kept, report) as part:
        if not kept.exists():
            report(f"Training a tokenizer of {config.vocabulary_size:,} pieces; it will be cached")
            trained = train_unigram(_sample(config, parsed), config.vocabulary_size)
            part.write_text(trained.to_json(), encoding="utf-8")
    return Tokenizer.load(kept)


def _sample(config: DataConfig, parsed: Sequence[Source]) -> Iterator[str]:
    """Yield text of every source in proportion to its share of the mixture.

    So a language has the same weight in the vocabulary as in training; a small source may be read
    several times.
    """
    if len(parsed) == 1:
        yield from _take(config, parsed[0], TRAINING_CHARACTERS)
        return
    characters_S = [sum(len(text) for text in _texts(config, source)) for source in parsed]
    if not any(characters_S):
        return
    shares_S = order.probabilities(
        characters_S,
        [source.weight for source in parsed],
        config.mixing,
        config.mixing_exponent,
    )
    total = min(TRAINING_CHARACTERS, sum(characters_S))
    for source, characters, share in zip(parsed, characters_S, shares_S, strict=True):
        wanted = round(total * share)
        while wanted > 0 and characters:  # a source without text is an error later
            yield from _take(config, source, wanted)
            wanted -= characters


def _take(config: DataConfig, source: Source, characters: int) -> Iterator[str]:
    """Yield texts from the start of a source, at most `characters` in total."""
    for text in _texts(config, source):
        yield text[:characters]
        characters -= len(text)
        if characters <= 0:
            break


def _texts(config: DataConfig, source: Source) -> Iterator[str]:
    documents = sources.read(
        source,
        columns=config.columns,
        max_documents=config.max_documents,
        skipped=Counter(),
    )
    return (document.text for document in documents)


COVERAGE = 0.9995  # of the characters; rarer ones are encoded as bytes, as in mT5's training
_SPECIAL = (PAD, END, UNKNOWN)
_BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_ASCII = tuple(chr(code) for code in range(33, 127))
# Words are split between letters or digits and other characters: with fewer different words,
# training is several times faster.
_WORD = r"\n+|▁*[\p{L}\p{M}\p{N}_]+|▁*[^▁\n\p{L}\p{M}\p{N}_]+|▁+"


def train_unigram(
    texts: Iterable[str], vocabulary_size: int, num_sentinels: int = NUM_SENTINELS
) -> Tokenizer:
    """Return a tokenizer of at most `vocabulary_size` ids, specials, bytes and sentinels included.

    Not deterministic: training sums in several threads.

    Raises DataError if the vocabulary is too small, or there is no text.
    """
    num_pieces = vocabulary_size - len(_SPECIAL) - len(_BYTE_PIECES) - num_sentinels
    if num_pieces < len(_ASCII) + 1:
        least = vocabulary_size - num_pieces + len(_ASCII) + 1
        raise DataError(
            f"A unigram tokenizer needs data.vocabulary_size of at least {least}, "
            f"got {vocabulary_size}."
        )
    texts = list(texts)
    alphabet = _alphabet(texts, limit=num_pieces // 2)
    if not alphabet:
        raise DataError("There is no text to train a tokenizer on.")
    learner = tokenizers.Tokenizer(models.Unigram())
    _add_splitting(learner)
    trainer = trainers.UnigramTrainer(
        vocab_size=num_pieces,
        initial_alphabet=list(_ASCII),
        unk_token=UNKNOWN,
        special_tokens=[UNKNOWN],
        show_progress=False,
    )
    learner.train_from_iterator(_keep_only(texts, alphabet), trainer)
    learned = json.loads(learner.to_str())["model"]["vocab"]
    reserved = {*_SPECIAL, *_BYTE_PIECES}
    # Rounded, since the library does not read its own longer decimals back exactly.
    pieces = [(piece, round(score, 6)) for piece, score in learned if piece not in reserved]
    return _assemble(pieces[:num_pieces], num_sentinels)


def _alphabet(texts: list[str], limit: int) -> set[str]:
    """Return the most common characters that cover the texts, at most `limit`."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    wanted, covered, alphabet = COVERAGE * counts.total(), 0, set(_ASCII)
    for character, count in counts.most_common(limit):
        if covered > wanted:
            break
        alphabet.add(character)
        covered += count
    return alphabet if counts else set()


def _keep_only(texts: list[str], alphabet: set[str]) -> Iterable[str]:
    others = re.compile(f"[^{re.escape(''.join(sorted(alphabet)))}]+")
    return (others.sub("\n", text) for text in texts)


def _add_splitting(backend: tokenizers.Tokenizer) -> None:
    """Cut text at line breaks and before words, each word with the spaces before it."""
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), behavior="isolated")


def _assemble(pieces: list[tuple[str, float]], num_sentinels: int) -> Tokenizer:
    """Build the tokenizer: specials, pieces, bytes, then sentinels on top."""
    # Text such as `</s>` never becomes a special token, since `<` and letters are split first.
    vocabulary = [(name, 0.0) for name in _SPECIAL]
    vocabulary += pieces
    vocabulary += [(name, 0.0) for name in _BYTE_PIECES]
    backend = tokenizers.Tokenizer(
        models.Unigram(vocabulary, unk_id=_SPECIAL.index(UNKNOWN), byte_fallback=True)
    )
    _add_splitting(backend)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in _SPECIAL])
    append_end(backend)
    return Tokenizer(backend, num_sentinels)
