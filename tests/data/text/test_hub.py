"""Datasets of the hub, with its two packages replaced by small ones: there is no network here."""

import re
import sys
import types
from collections import Counter

import pytest
import torch

from switchlm.data.config import Columns, DataConfig
from switchlm.data.pretraining import streamed
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


@pytest.fixture
def large(hub, monkeypatch):
    """A dataset of ten windows."""
    monkeypatch.setattr(streamed, "WINDOW", 4000)
    hub.rows = [{"text": f"Row {number:04} of a large dataset. "} for number in range(1250)]
    return hub


def open_large(folder, **settings):
    shape = {"input_length": 32, "batch_size": 4, "cache": str(folder)}
    return open_data(DataConfig(**({"sources": ("hub:org/name",)} | shape | settings)), seed=0)


def windows(folder):
    return len([path for path in folder.glob("tokens-*") if path.is_dir()])


@pytest.mark.parametrize("pack", [False, True])
def test_training_starts_before_all_is_read(large, tmp_path, pack):
    loader = open_large(tmp_path, pack=pack)
    loader.batch(0)
    assert windows(tmp_path) <= 2  # the first, and the one made ahead
    loader.batch(100)
    assert 3 <= windows(tmp_path) <= 7


@pytest.mark.parametrize("pack", [False, True])
def test_batches_do_not_depend_on_what_is_cached(large, tmp_path, pack):
    first = open_large(tmp_path / "a", pack=pack)
    steps = (0, 3, 60, 130, 700)  # the last are of later epochs
    batches = [first.batch(step) for step in steps]
    large.answers = False  # all is cached: neither the hub nor the rows are asked
    large.rows = []
    for step, batch in reversed(list(zip(steps, batches, strict=True))):
        again = open_large(tmp_path / "a", pack=pack).batch(step)
        assert torch.equal(again.inputs_BS, batch.inputs_BS)
        assert torch.equal(again.targets_BT, batch.targets_BT)


def test_a_resumed_run_reads_on_where_the_stream_was(large, tmp_path):
    whole = open_large(tmp_path / "a")
    expected = whole.batch(200)
    open_large(tmp_path / "b").batch(50)
    again = open_large(tmp_path / "b").batch(200)
    assert torch.equal(again.inputs_BS, expected.inputs_BS)


def test_an_epoch_takes_the_rows_of_all_windows_once(large, tmp_path):
    loader = open_large(tmp_path, batch_size=1, held_out_share=0.01)
    seen = Counter()
    for step in range(1150):
        text = loader.tokenizer.decode(loader.batch(step).inputs_BS[0].tolist())
        seen.update(re.findall(r"Row (\d{4})", text))
    assert len(seen) > 500  # numbers that are cut or masked are not found
    assert max(seen.values()) <= 2
    assert min(map(int, seen)) < 10
    assert max(map(int, seen)) > 1240


def test_text_that_is_held_out_is_not_trained_on_in_any_window(large, tmp_path):
    large.rows = [{"text": f"Repeated {number % 40:02}! " * 3} for number in range(1000)]
    loader = open_large(tmp_path, pack=True, held_out_share=0.2)
    decode = loader.tokenizer.decode
    held = {
        found
        for batch in loader.held_out(8)
        for row in batch.inputs_BS.tolist()
        for found in re.findall(r"Repeated (\d\d)!", decode(row))
    }
    trained = {
        found
        for step in range(0, 400, 5)
        for row in loader.batch(step).inputs_BS.tolist()
        for found in re.findall(r"Repeated (\d\d)!", decode(row))
    }
    assert held
    assert trained
    assert not held & trained


def test_the_end_of_the_text_at_the_end_of_a_window_is_found(large, tmp_path):
    large.rows = [{"text": "x" * 399 + str(number % 10)} for number in range(20)]  # two windows
    loader = open_large(tmp_path)
    assert loader.batch(500).inputs_BS.shape == (4, 32)
    assert windows(tmp_path) == 2


def test_a_stream_among_other_sources_needs_a_weight(large, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Some other words. " * 200)
    with pytest.raises(DataError, match="Give every source a weight"):
        open_large(tmp_path / "cache", sources=("hub:org/name", str(text)))
    loader = open_large(tmp_path / "cache", sources=("hub:org/name:0.5", f"{text}:0.5"))
    assert set(loader.batch(0).source_B.tolist()) == {0, 1}
