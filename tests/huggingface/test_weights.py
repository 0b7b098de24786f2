"""Untrusted weight files: refused with the project's own errors, quickly, and no code is run.

At the end names on the hub, over a cache made by hand: nothing here goes to the network.
"""

import json
import os
import pickle
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import switchlm
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import CheckpointError, MissingExtraError, UserError
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a sharded nano model with a tokenizer."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    torch.manual_seed(0)
    model = SwitchTransformer(preset("nano"))
    switchlm.save(model, Tokenizer.bytes(), folder, max_shard_bytes=200_000)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(saved: dict[str, bytes], tmp_path: Path) -> Path:
    """A fresh copy of them."""
    path = tmp_path / "model"
    path.mkdir()
    for name, content in saved.items():
        (path / name).write_bytes(content)
    return path


def refused(folder: Path, match: str | None = None) -> str:
    """The model is refused in under a second of computing, by a CheckpointError."""
    start = time.process_time()
    with pytest.raises(CheckpointError, match=match) as caught:
        switchlm.load(folder, report=lambda message: None)
    assert time.process_time() - start < 1
    return str(caught.value)


def edit(path: Path, change: Callable[[dict], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def redirect(folder: Path, name: str) -> None:
    """Point one shard of the index at another name."""
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    shard = min(weight_map.values())
    edit(
        folder / INDEX,
        lambda values: values["weight_map"].update(
            {key: name for key, file in weight_map.items() if file == shard}
        ),
    )


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/secret.safetensors",
        "..\\secret.safetensors",
        "\0.safetensors",
        "config.json",
        "..",
        "",
    ],
)
def test_an_index_may_not_leave_the_folder(name, folder):
    outside = folder.parent / "secret.safetensors"
    outside.write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    redirect(folder, name)
    refused(folder, "not a plain file name|not a .safetensors file")


def test_links_may_not_leave_the_folder(folder):
    shard = folder / "model-00001-of-00002.safetensors"
    outside = folder.parent / "secret.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)
    refused(folder, "outside of the model folder")
    shard.unlink()
    inside = folder / "elsewhere.safetensors"
    outside.rename(inside)
    shard.symlink_to(inside.name)
    assert switchlm.load(folder)[0].config == preset("nano")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_small_files_may_not_be_links_out_of_the_folder(name, folder):
    outside = folder.parent / name
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    refused(folder, "outside of the model folder")


def test_links_in_the_cache_of_the_hub_are_followed(folder, tmp_path):
    snapshot = tmp_path / "models--me--nano" / "snapshots" / "abc"
    blobs = tmp_path / "models--me--nano" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert switchlm.load(snapshot)[0].config == preset("nano")


def test_a_pipe_does_not_hang_the_loader(folder):
    for name in ("config.json", INDEX, "model-00001-of-00002.safetensors"):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(CheckpointError):
            switchlm.load(folder)
        (folder / name).unlink()
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    "changes",
    [
        {"d_model": 1e12},
        {"d_model": 2**30, "d_ff": 2**30},
        {"vocab_size": 2**31 - 1},
        {"num_experts": 1e9},
        {"num_experts": 65536},
        {"num_layers": 2**31 - 1, "num_decoder_layers": 2**31 - 1},
        {"num_heads": 2**30, "d_kv": 2**30},
        {"relative_attention_num_buckets": 2**31},
        {"d_model": True},
        {"d_ff": None},
        {"d_kv": []},
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_allocated(changes, folder):
    edit(folder / "config.json", lambda values: values.update(changes))
    refused(folder)


def test_code_named_by_a_config_is_not_run(folder, tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    monkeypatch.syspath_prepend(folder)
    auto_map = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoTokenizer": "evil.T"}
    for name in ("config.json", "tokenizer_config.json"):
        edit(folder / name, lambda values: values.update(auto_map=auto_map))
    assert switchlm.load(folder)[0].config == preset("nano")
    assert not marker.exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{",
        "[" * 100_000,
        '{"a": ' * 100_000,
        '{"a": 1' + "0" * 5000 + "}",
        "\x00",
    ],
)
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_broken_json(name, text, folder):
    (folder / name).write_text(text)
    refused(folder, name)


@pytest.mark.parametrize(
    "weight_map", [None, [], {}, {"a": 1}, {"a": None}, {"a": ["x"]}, "x", {"a": "b.bin"}]
)
def test_broken_indexes(weight_map, folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, "weight_map|safetensors")


def test_integer_weights_are_refused(folder):
    from safetensors.torch import save_file

    path = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(path)
    key = min(tensors)
    tensors[key] = tensors[key].to(torch.int32)
    save_file(tensors, path)
    assert key in refused(folder, "is of type I32")


MUTATED = (
    "config.json",
    INDEX,
    "model-00001-of-00002.safetensors",
    "tokenizer.json",
)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    name=st.sampled_from(MUTATED),
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(["flip", "cut", "insert", "swap", "empty"]),
)
def test_damaged_files_give_only_own_errors(name, seed, kind, folder, saved):
    content = bytearray(saved[name])
    rng = random.Random(seed)
    # The header of a weight file has names, shapes and offsets: mutations there matter most.
    reach = min(len(content), 3000)
    place = rng.randrange(reach)
    if kind == "flip":
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[place:]
    elif kind == "insert":
        content[place:place] = rng.randbytes(rng.randint(1, 9))
    elif kind == "swap":
        digits = [i for i in range(reach) if chr(content[i]).isdigit()]
        if digits:
            content[rng.choice(digits)] = ord(rng.choice("0123456789"))
    else:
        content.clear()
    (folder / name).write_bytes(bytes(content))
    start = time.process_time()
    try:
        switchlm.load(folder, report=lambda message: None)
    except UserError:
        pass
    finally:
        (folder / name).write_bytes(saved[name])
    assert time.process_time() - start < 1


class Evil:
    """A pickle that makes a file when it is read by an ordinary unpickler."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def to_pickle(folder: Path, change: Callable[[dict], object] = lambda tensors: None) -> Path:
    """Turn the shards into one pytorch_model.bin."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (folder / INDEX).unlink(missing_ok=True)
    change(tensors)
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def test_pickles_are_read_with_a_warning(folder):
    expected = switchlm.load(folder)[0].state_dict()
    to_pickle(folder)
    with pytest.warns(UserWarning, match="pickles"):
        model, _ = switchlm.load(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_pickles_of_the_old_format_and_in_shards(folder):
    expected = switchlm.load(folder)[0].state_dict()
    path = to_pickle(folder)
    tensors = torch.load(path, weights_only=True)
    path.unlink()
    keys = list(tensors)
    shards = {"pytorch_model-1.bin": keys[::2], "pytorch_model-2.bin": keys[1::2]}
    for number, (name, names) in enumerate(shards.items()):
        torch.save(
            {key: tensors[key] for key in names},
            folder / name,
            _use_new_zipfile_serialization=bool(number),
        )
    places = {key: name for name, names in shards.items() for key in names}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    model, _ = switchlm.load(folder, report=lambda message: None)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize("plain", [True, False])
def test_code_in_pickles_is_not_run(plain, folder, tmp_path):
    marker = tmp_path / "ran"
    path = to_pickle(folder, lambda tensors: tensors.update(evil=Evil(marker)))
    if plain:
        path.write_bytes(pickle.dumps({"evil": Evil(marker)}))
    refused(folder, "damaged, or has objects other than tensors")
    assert not marker.exists()


def test_pickles_with_sizes_beyond_the_file_are_refused(folder):
    huge = torch.zeros(1).expand(384, 2**40)
    to_pickle(folder, lambda tensors: tensors.update({"shared.weight": huge}))
    refused(folder, "'shared.weight' in pytorch_model.bin claims more than the file holds")


def test_pickles_with_many_tensors_of_one_storage_are_refused(folder):
    memory = torch.zeros(10_000)
    to_pickle(folder, lambda tensors: tensors.update({f"{i}": memory for i in range(1000)}))
    refused(folder, "claims more than the file holds")


@pytest.mark.parametrize(
    "content", [3, [1], {"a": 3}, {3: torch.ones(2)}, {"a": torch.ones(2).to_sparse()}]
)
def test_pickles_of_other_things(content, folder):
    torch.save(content, to_pickle(folder))
    refused(folder)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(seed=st.integers(0, 2**32), old=st.booleans())
def test_damaged_pickles_give_only_own_errors(seed, old, folder):
    rng = random.Random(seed)
    path = folder / "pytorch_model.bin"
    tensors = {f"{i}": torch.ones(3) for i in range(4)} | {"shared.weight": torch.ones(4, 2)}
    torch.save(tensors, path, _use_new_zipfile_serialization=not old)
    content = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 6)):
        content[rng.randrange(min(len(content), 1200))] = rng.randrange(256)
    path.write_bytes(bytes(content))
    for shard in folder.glob("*.safetensors*"):
        shard.unlink()
    with pytest.raises(UserError):
        switchlm.load(folder, report=lambda message: None)


REVISION = "a" * 40


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with me/nano in one revision; returns the snapshot."""
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
def test_a_model_missing_on_the_hub_is_named(name, revision, cached):
    with pytest.raises(CheckpointError, match=f"no folder '{name}'"):
        switchlm.load(name, revision=revision, local_files_only=True)


@pytest.mark.parametrize("name", ["a/b/c", "/nowhere/at/all", "../up", ".", "a//b", "~/model"])
def test_paths_are_never_requested_from_the_hub(name, cached, monkeypatch):
    def asked(*args: object, **kwargs: object) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)
    with pytest.raises(CheckpointError, match=r"not a name on the hub|neither a model folder"):
        switchlm.load(name)


def test_the_extra_is_named_where_it_is_missing(cached, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"switchlm\[hub\]"):
        switchlm.load("me/nano")
