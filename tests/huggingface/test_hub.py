"""Names on the hub, over a cache made by hand: nothing here goes to the network."""

from pathlib import Path

import pytest
import torch

import switchlm
from switchlm.errors import CheckpointError, MissingExtraError
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer

REVISION = "a" * 40


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub that holds me/nano in one revision; returns the snapshot."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "models--me--nano"
    torch.manual_seed(0)
    snapshot = home / "snapshots" / REVISION
    switchlm.save(SwitchTransformer(preset("nano")), None, snapshot)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(REVISION)
    return snapshot


@pytest.mark.parametrize("revision", [None, "main", REVISION])
def test_cached_models_load_without_a_network(revision, cached):
    model, tokenizer = switchlm.load("me/nano", revision=revision, local_files_only=True)
    assert model.config == preset("nano")
    assert tokenizer is None


@pytest.mark.parametrize(
    ("name", "revision"), [("me/other", None), ("me/nano", "b" * 40), ("a name with spaces", None)]
)
def test_what_the_hub_has_not_is_named(name, revision, cached):
    with pytest.raises(CheckpointError, match=f"no folder '{name}'"):
        switchlm.load(name, revision=revision, local_files_only=True)


@pytest.mark.parametrize("name", ["a/b/c", "/nowhere/at/all", "../up", ".", "a//b", "~/model"])
def test_paths_are_never_asked_of_the_hub(name, cached, monkeypatch):
    def asked(*args: object, **kwargs: object) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)
    with pytest.raises(CheckpointError, match=r"no name on the hub|neither a model folder"):
        switchlm.load(name)


def test_the_extra_is_named_where_it_is_missing(cached, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"switchlm\[hub\]"):
        switchlm.load("me/nano")
