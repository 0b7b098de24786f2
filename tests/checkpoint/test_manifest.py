"""Every damage of a checkpoint is detected before any state changes."""

import json
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from switchlm.checkpoint import format, layout
from switchlm.checkpoint.read import load_folder
from switchlm.checkpoint.store import CheckpointStore
from switchlm.errors import CheckpointError


def state_of(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {name: torch.randn(4, 3, generator=generator) for name in ("a", "b", "c")},
        "progress": {"step": step},
    }


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CheckpointStore:
    """Steps 10 and 20, one tensor per file."""
    monkeypatch.setattr(layout, "FILE_BYTES", 48)
    store = CheckpointStore(tmp_path / "checkpoints")
    for step in (10, 20):
        store.save(step, state_of(step), wait=True)
    return store


def damage(folder: Path, older: Path, generator: random.Random) -> str:
    """Do one random harm to a checkpoint; returns what it was."""
    paths = sorted(folder.iterdir())
    path = generator.choice(paths)
    content = bytearray(path.read_bytes())
    shards = sorted(folder.glob("*.safetensors"))
    kind = generator.choice(
        ["flip", "flip", "flip", "cut", "longer", "delete", "swap", "stale", "extra", "all"]
    )
    if kind == "flip":
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
    elif kind == "cut":
        path.write_bytes(content[: generator.randrange(len(content))])
    elif kind == "longer":
        path.write_bytes(content + generator.randbytes(generator.randint(1, 8)))
    elif kind == "delete":
        path.unlink()
    elif kind == "swap":
        one, other = generator.sample(shards, 2)
        kept = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(kept)
    elif kind == "stale":
        stale = generator.choice([*shards, folder / format.NAME])
        shutil.copy(older / stale.name, stale)
    elif kind == "extra":
        shutil.copy(older / shards[0].name, folder / "model-00004-of-00004.safetensors")
    else:  # a whole checkpoint under the name of another
        shutil.rmtree(folder)
        shutil.copytree(older, folder)
    return f"{kind} {path.name}"


def test_a_thousand_damages_are_all_found_before_any_tensor_changes(
    store: CheckpointStore, tmp_path: Path
) -> None:
    newer, older = store.folder / "step-00000020", store.folder / "step-00000010"
    sound = tmp_path / "sound"
    shutil.copytree(newer, sound)
    into = {"model": {name: torch.full((4, 3), 7.0) for name in ("a", "b", "c")}}
    generator = random.Random(0)
    for _ in range(1000):
        what = damage(newer, older, generator)
        with pytest.raises(CheckpointError, match=r"damaged.*Use step 10,"):
            pytest.fail(f"not found: {what} gave {store.load(20, into)}")
        assert all(bool((tensor == 7).all()) for tensor in into["model"].values()), what
        shutil.rmtree(newer)
        shutil.copytree(sound, newer)
    assert store.load(20, into)["progress"] == {"step": 20}
    assert torch.equal(into["model"]["a"], state_of(20)["model"]["a"])


def test_the_newest_sound_checkpoint_is_taken_and_the_damaged_one_named(
    store: CheckpointStore,
) -> None:
    (store.folder / "step-00000020" / "state.json").write_text("{}")
    found = store.newest()
    assert found is not None
    assert found.step == 10
    assert found.damaged[0].endswith(
        "is damaged: state.json has 2 bytes, not those of the manifest."
    )
    reports: list[str] = []
    reporting = CheckpointStore(store.folder, report=reports.append)
    assert reporting.load()["progress"]["step"] == 10
    assert "step-00000020" in reports[0]
    assert reports[0].endswith("Continuing from step 10 instead.")


def test_only_damaged_checkpoints_are_an_error_not_a_fresh_start(store: CheckpointStore) -> None:
    for step in (10, 20):
        (store.folder / f"step-{step:08d}" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* can be used.*manifest.json is"):
        store.newest()


def test_files_that_do_not_matter_do_no_harm(store: CheckpointStore) -> None:
    (store.folder / "step-00000020" / ".DS_Store").write_text("x")
    (store.folder / "notes.txt").write_text("x")
    assert store.load()["progress"]["step"] == 20


def test_a_symlink_does_not_pass_as_a_shard(store: CheckpointStore, tmp_path: Path) -> None:
    shard = next((store.folder / "step-00000020").glob("*.safetensors"))
    shutil.move(shard, tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="does not belong"):
        store.load(20)


def test_a_newer_format_is_no_damage(store: CheckpointStore) -> None:
    path = store.folder / "step-00000020" / format.NAME
    content = json.loads(path.read_bytes()) | {"format": 2}
    path.write_bytes(format._encode(content))
    with pytest.raises(CheckpointError, match="has format 2; this version of switchlm reads"):
        load_folder(path.parent)


class Malice:
    """What a pickle can do: run a function when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    "name",
    [
        ".metadata",
        "__0_0.distcp",
        "state.json",
        "manifest.json",
        "model-00001-of-00003.safetensors",
    ],
)
def test_no_pickle_is_ever_read(store: CheckpointStore, tmp_path: Path, name: str) -> None:
    folder, mark = store.folder / "step-00000020", tmp_path / "executed"
    (folder / name).write_bytes(pickle.dumps(Malice(mark)))
    if name != format.NAME:
        (folder / format.NAME).unlink()
        format.write(folder, 20)  # an attacker can do that too
    try:
        assert load_folder(folder)["progress"] == {"step": 20}
        assert name in (".metadata", "__0_0.distcp")
    except CheckpointError:
        assert name not in (".metadata", "__0_0.distcp")
    assert not mark.exists()


@pytest.mark.parametrize(
    "structure",
    [
        "[" * 100_000,
        '{"model": ' * 5_000 + "1" + "}" * 5_000,
        "[]",
        "null",
        '"text"',
        '{"model": {"$tensor": "model/a", "dtype": "float32", "shape": [1000000000000]}}',
        '{"model": {"$tensor": "model/a", "dtype": "float32", "shape": [-4, -3]}}',
        '{"model": {"$tensor": "model/a", "dtype": "float32", "shape": [3, 4]}}',
        '{"$tensor": "model/a", "dtype": "float32", "shape": [4, 3]}',
        '{"model": {"$tensor": "model/a", "dtype": "load", "shape": [4, 3]}}',
        '{"model": {"$tensor": "model/unknown", "dtype": "float32", "shape": [4, 3]}}',
        '{"model": {"$tensor": 5, "dtype": "float32", "shape": "x"}}',
        '{"model": {"$tuple": 5}, "x": {"$items": [[1]]}, "y": {"$float": "x"}}',
        '{"model": {"$items": [[{}, 1]]}}',
    ],
)
def test_a_hostile_structure_ends_in_our_own_error(store: CheckpointStore, structure: str) -> None:
    folder = store.folder / "step-00000020"
    (folder / "state.json").write_text(structure)
    (folder / format.NAME).unlink()
    format.write(folder, 20)
    with pytest.raises(CheckpointError):
        load_folder(folder)
