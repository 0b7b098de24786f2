"""A small corpus that every test of this package may open."""

import random

import pytest

from switchlm.data.config import DataConfig
from switchlm.data.pretraining.loader import open_data

WORDS = ["router", "token", "expert", "gate", "the", "sends", "scales", "each", "to", "one"]


@pytest.fixture
def corpus(tmp_path):
    """A folder of 60 text files of 5 to 120 words, every one different."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    chance = random.Random(0)
    for number in range(60):
        words = [chance.choice(WORDS) for _ in range(chance.randrange(5, 120))]
        (folder / f"{number:02}.txt").write_text(f"{number}: {' '.join(words)}\n", encoding="utf-8")
    return folder


@pytest.fixture
def open_corpus(corpus, tmp_path):
    """Return a function that opens the corpus as tiny rows; settings may be overridden."""

    def open_corpus(*, seed=0, report=None, **settings):
        defaults = {
            "sources": (str(corpus),),
            "input_length": 32,
            "batch_size": 8,
            "held_out_share": 0.1,
        }
        config = DataConfig(**(defaults | settings))
        return open_data(config, seed=seed, cache_dir=tmp_path / "cache", report=report)

    return open_corpus
