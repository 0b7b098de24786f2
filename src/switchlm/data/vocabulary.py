"""Which tokenizer a configuration means: bytes, a file, or one trained on the sources and kept."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from switchlm.data import mixture, sources
from switchlm.data.atomic import Report, building, flush
from switchlm.data.cache import fingerprint
from switchlm.data.config import DataConfig
from switchlm.data.sources import Source
from switchlm.data.tokenizer import Tokenizer
from switchlm.data.unigram import train_unigram

TRAINING_CHARACTERS = 8_000_000
_FORMAT = 2


def open_tokenizer(
    config: DataConfig, parsed: Sequence[Source], folder: Path, report: Report
) -> Tokenizer:
    """Return the tokenizer that `config` names; a trained one is kept in `folder`."""
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
            report(f"Training a tokenizer of {config.vocabulary_size:,} pieces; kept for next time")
            trained = train_unigram(_sample(config, parsed), config.vocabulary_size)
            with part.open("w", encoding="utf-8") as file:
                file.write(trained.to_json())
                flush(file)
    return Tokenizer.load(kept)


def _sample(config: DataConfig, parsed: Sequence[Source]) -> Iterator[str]:
    """Yield text of every source, as much of each as its share of the mixture.

    So a language counts as much for the vocabulary as it will in training: one that the mixture
    draws more often than its size is read again.
    """
    if len(parsed) == 1:
        yield from _take(config, parsed[0], TRAINING_CHARACTERS)
        return
    characters_S = [sum(len(text) for text in _texts(config, source)) for source in parsed]
    if not any(characters_S):
        return
    shares_S = mixture.probabilities(
        characters_S,
        [source.weight for source in parsed],
        config.mixing,
        config.mixing_exponent,
    )
    total = min(TRAINING_CHARACTERS, sum(characters_S))
    for source, characters, share in zip(parsed, characters_S, shares_S, strict=True):
        wanted = round(total * share)
        while wanted > 0 and characters:  # a source without text is refused later, by name
            yield from _take(config, source, wanted)
            wanted -= characters


def _take(config: DataConfig, source: Source, characters: int) -> Iterator[str]:
    """Yield texts from the start of a source, at most so many characters in all."""
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
