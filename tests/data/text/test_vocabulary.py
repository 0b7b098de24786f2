"""Vocabularies trained on a mixture: a language counts as the mixture draws it."""

from collections import Counter

import pytest

from switchlm.data.config import DataConfig
from switchlm.data.text import vocabulary
from switchlm.data.text.sources import parse_all
from switchlm.data.text.vocabulary import _sample


def sample(tmp_path, sizes, weights=None, **settings):
    """Return how many characters of each letter are trained on; a source is one letter."""
    texts = []
    for letter, size in sizes.items():
        (tmp_path / f"{letter}.txt").write_text(letter * size)
        weight = "" if weights is None else f":{weights[letter]}"
        texts.append(f"{letter}={tmp_path}/{letter}.txt{weight}")
    config = DataConfig(sources=tuple(texts), **settings)
    return Counter("".join(_sample(config, parse_all(texts))))


SIZES = {"a": 16_000, "b": 1000}


@pytest.mark.parametrize(
    ("settings", "ratio"),
    [
        ({"mixing": "proportional"}, 16.0),
        ({"mixing": "temperature", "mixing_exponent": 0.5}, 4.0),
        ({"mixing": "temperature", "mixing_exponent": 0.0}, 1.0),
        ({"weights": {"a": 2, "b": 1}}, 2.0),
    ],
)
def test_every_source_counts_by_its_share_of_the_mixture(tmp_path, settings, ratio):
    counts = sample(tmp_path, SIZES, **settings)
    assert counts["a"] / counts["b"] == pytest.approx(ratio, rel=0.01)
    assert counts.total() == pytest.approx(17_000, abs=2)


def test_no_more_text_is_read_than_training_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "TRAINING_CHARACTERS", 500)
    assert sample(tmp_path, SIZES, mixing="temperature").total() == pytest.approx(500, abs=2)
    assert sample(tmp_path, {"a": 2000}).total() == 500


@pytest.mark.parametrize("settings", [{}, {"mixing": "temperature", "mixing_exponent": 0.0}])
def test_a_source_without_text_takes_no_part(tmp_path, settings):
    assert set(sample(tmp_path, {"a": 1000, "b": 0}, **settings)) == {"a"}
    assert not sample(tmp_path, {"a": 0, "b": 0}, **settings)
