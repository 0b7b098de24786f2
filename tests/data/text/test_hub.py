"""Datasets of the hub, with its two packages replaced by small ones: there is no network here."""

import sys
import types
from collections import Counter

import pytest

from switchlm.data.config import Columns, DataConfig
from switchlm.data.pretraining.loader import open_data
from switchlm.data.text.hub import find_revision, parse_location, read_hub
from switchlm.errors import DataError, MissingExtraError


class Hub:
    """A dataset whose revision and rows a test may change, or which does not answer."""

    def __init__(self, monkeypatch):
        self.revision, self.answers, self.calls = "a" * 40, True, []
        self.rows = [{"text": f"Row {number} of a dataset. "} for number in range(200)]
        client = types.SimpleNamespace(HfApi=lambda: self)
        datasets = types.SimpleNamespace(load_dataset=self.load_dataset)
        monkeypatch.setitem(sys.modules, "huggingface_hub", client)
        monkeypatch.setitem(sys.modules, "datasets", datasets)

    def dataset_info(self, name, *, timeout):
        if not self.answers:
            raise ConnectionError("no network")
        assert timeout
        return types.SimpleNamespace(sha=self.revision)

    def load_dataset(self, name, config, *, split, revision, streaming):
        self.calls.append((name, config, split, revision))
        assert streaming
        return iter(self.rows)


@pytest.fixture
def hub(monkeypatch):
    return Hub(monkeypatch)


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("hub:org/name", ("org/name", None, "train")),
        ("hub:org/name:test", ("org/name", None, "test")),
        ("hub:org/name:en:test", ("org/name", "en", "test")),
    ],
)
def test_rows_are_streamed_of_one_revision(hub, location, expected):
    hub.rows = [{"text": "one"}, {"text": None}]
    skipped = Counter()
    documents = list(read_hub(location, "rev", Columns(), skipped))
    assert [document.text for document in documents] == ["one"]
    assert hub.calls == [(*expected, "rev")]
    assert skipped == {"without text in 'text'": 1}


@pytest.mark.parametrize("location", ["hub:", "hub:a:b:c:d"])
def test_a_location_that_cannot_be_read_is_refused(location):
    with pytest.raises(DataError, match="write hub:NAME"):
        parse_location(location)


@pytest.mark.parametrize("missing", ["datasets", "huggingface_hub"])
def test_a_missing_extra_is_named(hub, monkeypatch, tmp_path, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    config = DataConfig(sources=("hub:org/name",), cache=str(tmp_path))
    with pytest.raises(MissingExtraError, match=r"switchlm\[hub\]"):
        open_data(config, seed=0)


def test_a_changed_dataset_is_read_again(hub, tmp_path):
    config = DataConfig(sources=("hub:org/name",), input_length=32, cache=str(tmp_path))

    def tokens():
        open_data(config, seed=0)
        return sorted(path.name for path in tmp_path.glob("tokens-*") if path.is_dir())

    first = tokens()
    assert tokens() == first
    assert len(hub.calls) == 1
    hub.revision = "b" * 40
    assert len(tokens()) == 2
    assert hub.calls[1] == ("org/name", None, "train", "b" * 40)


def test_without_a_network_the_last_revision_is_used(hub, tmp_path):
    lines = []
    hub.answers = False
    with pytest.raises(DataError, match=r"Cannot find the dataset 'org/name'.*no network"):
        find_revision("hub:org/name", tmp_path, lines.append)
    hub.answers = True
    assert find_revision("hub:org/name", tmp_path, lines.append) == "a" * 40
    hub.answers, hub.revision = False, "b" * 40
    assert not lines
    assert find_revision("hub:org/name:en:test", tmp_path, lines.append) == "a" * 40
    assert "is read as of revision aaaaaaaaaaaa" in lines[0]
