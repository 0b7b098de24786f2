"""Which tokenizer a configuration means: bytes, a file, or one trained on the sources and kept."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from switchlm.data import sources
from switchlm.data.atomic import Report, building, flush
from switchlm.data.cache import fingerprint
from switchlm.data.config import DataConfig
from switchlm.data.sources import Source
from switchlm.data.tokenizer import Tokenizer
from switchlm.data.unigram import train_unigram

TRAINING_CHARACTERS = 8_000_000
_FORMAT = 1


def open_tokenizer(
    config: DataConfig, parsed: Sequence[Source], folder: Path, report: Report
) -> Tokenizer:
    """Return the tokenizer that `config` names; a trained one is kept in `folder`."""
    if config.tokenizer == "bytes":
        return Tokenizer.bytes()
    if config.tokenizer != "unigram":
        return Tokenizer.load(config.tokenizer)
    prints = [fingerprint(one, config.text_column, config.max_documents) for one in parsed]
    settings = [_FORMAT, config.vocabulary_size, TRAINING_CHARACTERS, prints]
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
    """Yield text of every source, as much of each, so that no language is left without pieces."""
    for source in parsed:
        left = TRAINING_CHARACTERS // len(parsed)
        documents = sources.read(
            source,
            text_column=config.text_column,
            max_documents=config.max_documents,
            skipped=Counter(),
        )
        for document in documents:
            yield document.text[:left]
            left -= len(document.text)
            if left <= 0:
                break
