"""Saving, loading, keeping and replacing checkpoints, and errors of the disk."""

import errno
import os
import resource
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from switchlm import files
from switchlm.checkpoint import layout
from switchlm.checkpoint.format import DTYPES
from switchlm.checkpoint.read import load_folder
from switchlm.checkpoint.store import CheckpointStore
from switchlm.errors import CheckpointError


def state_of(step: int, size: int = 4) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"w": torch.randn(size, 3, generator=generator)},
        "optimizer": {"state": {"w": {"step": torch.tensor(float(step)), "lr": 1e-3}}},
        "progress": {"step": step},
    }


def assert_is(state: dict[str, Any], step: int) -> None:
    expected = state_of(step)
    assert torch.equal(state["model"]["w"], expected["model"]["w"])
    assert state["progress"] == {"step": step}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run" / "checkpoints")


# --- what comes back -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(DTYPES))
def test_every_dtype_and_shape_comes_back_bit_for_bit(store: CheckpointStore, name: str) -> None:
    dtype = DTYPES[name]
    generator = torch.Generator().manual_seed(0)
    raw_48 = torch.randint(0, 2 if name == "bool" else 256, (48,), generator=generator)
    full = raw_48.to(torch.uint8).view(dtype)  # NaN payloads and infinities among them
    state = {"full": full, "scalar": full[1], "none": full[:0].reshape(0, 3), "part": full[1:5:2]}
    store.save(1, state, wait=True)
    loaded = store.load()
    assert loaded.keys() == state.keys()
    for key, tensor in state.items():
        assert loaded[key].dtype == dtype
        assert loaded[key].shape == tensor.shape
        assert torch.equal(bits(loaded[key]), bits(tensor))


def test_an_optimizer_and_tied_parameters_come_back(store: CheckpointStore) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    expected = optimizer.state_dict()
    store.save(1, {"model": model.state_dict(), "optimizer": expected}, wait=True)
    loaded = store.load()["optimizer"]
    assert loaded["param_groups"] == expected["param_groups"]
    assert loaded["state"].keys() == expected["state"].keys()
    for index, values in expected["state"].items():
        assert all(torch.equal(values[key], loaded["state"][index][key]) for key in values)
    optimizer.load_state_dict(loaded)


def test_a_state_of_many_files_comes_back(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "FILE_BYTES", 100)
    state = {f"t{i}": torch.randn(i, 4) for i in range(9)}
    store.save(1, state, wait=True)
    assert len(list((store.folder / "step-00000001").glob("*.safetensors"))) > 3
    loaded = store.load()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_a_state_without_tensors_comes_back(store: CheckpointStore) -> None:
    store.save(1, {"progress": {"step": 1}, "empty": {}}, wait=True)
    assert store.load() == {"progress": {"step": 1}, "empty": {}}


def test_the_state_may_change_as_soon_as_save_returns(store: CheckpointStore) -> None:
    state = state_of(5)
    store.save(5, state)
    state["model"]["w"].zero_()
    state["progress"]["step"] = 0
    assert_is(store.load(), 5)


def test_tensors_are_filled_in_place(store: CheckpointStore) -> None:
    store.save(5, state_of(5), wait=True)
    weight = nn.Parameter(torch.zeros(3, 4))
    state = store.load(into={"model": {"w": weight.t()}})
    assert torch.equal(weight.detach().t(), state_of(5)["model"]["w"])
    assert state["optimizer"]["state"]["w"] == {"step": torch.tensor(5.0), "lr": 1e-3}


@pytest.mark.parametrize(
    ("into", "message"),
    [
        ({"w": torch.zeros(3, 4)}, r"model/w is float32 \[4, 3\], not float32 \[3, 4\]"),
        ({"w": torch.zeros(4, 3).half()}, r"model/w is float32 \[4, 3\], not float16 \[4, 3\]"),
        ({"w": torch.zeros(4, 3), "v": torch.zeros(1)}, "model/v is missing"),
        ({}, "model/w is not expected"),
    ],
)
def test_a_model_that_does_not_fit_is_left_alone(
    store: CheckpointStore, into: dict[str, torch.Tensor], message: str
) -> None:
    store.save(5, state_of(5), wait=True)
    with pytest.raises(CheckpointError, match=f"does not match: in it {message}"):
        store.load(into={"model": into})
    assert all(bool((tensor == 0).all()) for tensor in into.values())


def test_a_copy_under_any_name_loads(store: CheckpointStore, tmp_path: Path) -> None:
    store.save(5, state_of(5), wait=True)
    subprocess.run(["cp", "-r", store.folder / "step-00000005", tmp_path / "mine"], check=True)
    subprocess.run(["cp", "-r", store.folder, tmp_path / "other"], check=True)
    assert_is(load_folder(tmp_path / "mine"), 5)
    assert_is(CheckpointStore(tmp_path / "other").load(5), 5)


# --- which ones there are ------------------------------------------------------------------------


def test_the_newest_are_kept(store: CheckpointStore) -> None:
    keeping = CheckpointStore(store.folder, keep=2)
    for step in (1, 2, 30, 4_000_000_000):
        keeping.save(step, state_of(step))
    keeping.wait()
    assert keeping.steps() == [30, 4_000_000_000]
    assert len(list(store.folder.iterdir())) == 2
    assert_is(keeping.load(30), 30)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 1 .* has 30, 4000000000"):
        keeping.load(1)


def test_the_same_step_is_replaced(store: CheckpointStore) -> None:
    store.save(5, state_of(4), wait=True)
    store.save(5, state_of(5), wait=True)
    assert_is(store.load(), 5)
    assert [path.name for path in store.folder.iterdir()] == ["step-00000005"]


def test_a_checkpoint_that_was_moved_and_linked_is_retired(store: CheckpointStore) -> None:
    keeping = CheckpointStore(store.folder, keep=1)
    keeping.save(1, state_of(1), wait=True)
    elsewhere = store.folder.with_name("elsewhere")
    (store.folder / "step-00000001").rename(elsewhere)
    (store.folder / "step-00000001").symlink_to(elsewhere)
    assert_is(keeping.load(), 1)
    keeping.save(2, state_of(2), wait=True)
    assert [path.name for path in store.folder.iterdir()] == ["step-00000002"]
    assert elsewhere.is_dir()


def test_an_earlier_step_is_saved_only_once_later_ones_are_discarded(
    store: CheckpointStore,
) -> None:
    for step in (5, 10, 15):
        store.save(step, state_of(step), wait=True)
    with pytest.raises(CheckpointError, match=r"the later step 15\."):
        store.save(6, state_of(6))
    store.discard_after(5)
    assert store.steps() == [5]
    store.save(6, state_of(6), wait=True)
    assert_is(store.load(), 6)


def test_nothing_there(store: CheckpointStore) -> None:
    assert store.newest() is None
    assert store.steps() == []
    store.discard_after(0)
    with pytest.raises(CheckpointError, match="There is no checkpoint in"):
        store.load()
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3 .* has none"):
        store.load(3)
    with pytest.raises(CheckpointError, match="There is no checkpoint folder"):
        load_folder(store.folder)
    assert not store.folder.exists()


def test_keeping_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="at least one checkpoint, not 0"):
        CheckpointStore(tmp_path, keep=0)


def test_leftovers_of_dead_saves_go_and_those_of_living_ones_stay(store: CheckpointStore) -> None:
    store.folder.mkdir(parents=True)
    dead = subprocess.Popen(["true"])
    dead.wait()
    for kind in ("partial", "deleted"):
        (store.folder / f".step-00000001.{kind}-{dead.pid}").mkdir()
    living = store.folder / f".step-00000001.partial-{os.getppid()}"
    living.mkdir()
    store.save(5, state_of(5), wait=True)
    names = {path.name for path in store.folder.iterdir()}
    assert names == {"step-00000005", living.name}


# --- what goes wrong -----------------------------------------------------------------------------


def check_failure(store: CheckpointStore, message: str, size: int = 4) -> None:
    """The next save fails with `message`; the checkpoint of step 1 is as it was; no litter."""
    with pytest.raises(CheckpointError, match=message) as caught:
        store.save(2, state_of(2, size), wait=True)
    assert "Earlier checkpoints are unchanged" in str(caught.value)
    assert [path.name for path in store.folder.iterdir()] == ["step-00000001"]
    assert_is(CheckpointStore(store.folder).load(), 1)


@pytest.mark.parametrize("fails_at", range(6))
def test_an_error_of_the_disk_at_any_sync_is_reported(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    store.save(1, state_of(1), wait=True)
    syncs = iter(range(100))
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        if next(syncs) == fails_at:
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    reports: list[str] = []
    failing_store = CheckpointStore(store.folder, report=reports.append)
    with pytest.raises(
        CheckpointError, match=r"Cannot save the checkpoint of step 2 .*Input/output"
    ):
        failing_store.save(2, state_of(2), wait=True)
    assert len(reports) == 1
    found = CheckpointStore(store.folder).newest()
    assert found is not None
    assert found.damaged == ()
    assert next(syncs) > fails_at


def test_a_failed_save_is_reported_at_once_and_raised_by_the_next(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.save(1, state_of(1), wait=True)
    reports: list[str] = []
    failing = CheckpointStore(store.folder, report=reports.append)
    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", lambda path: (_ for _ in ()).throw(OSError("broken")))
        failing.save(2, state_of(2))
        while not reports:
            threading.Event().wait(0.01)
    assert "Cannot save the checkpoint of step 2" in reports[0]
    with pytest.raises(CheckpointError, match=r"step 2 .*broken"):
        failing.save(3, state_of(3))
    failing.save(3, state_of(3), wait=True)
    assert failing.steps() == [1, 3]


def test_an_unexpected_error_is_raised_too(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(folder: Path, places: object, parts: dict[str, torch.Tensor]) -> None:
        raise MemoryError("no memory for the file")

    monkeypatch.setattr(layout, "save", failing)
    store.save(2, state_of(2))
    with pytest.raises(MemoryError):
        store.wait()
    assert list(store.folder.iterdir()) == []


def test_leaving_the_store_waits_and_raises(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store:
        store.save(1, state_of(1))
    assert store.steps() == [1]
    monkeypatch.setattr(files, "sync", lambda path: (_ for _ in ()).throw(OSError("broken")))
    with pytest.raises(CheckpointError, match="broken"), CheckpointStore(store.folder) as failing:
        failing.save(2, state_of(2))
    interrupted = CheckpointStore(store.folder)
    interrupted.save(2, state_of(2))
    interrupted.__exit__(KeyError, KeyError(), None)  # the error on its way matters more


def test_a_file_past_the_limit_of_the_process(store: CheckpointStore) -> None:
    store.save(1, state_of(1), wait=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        check_failure(store, "Cannot save the checkpoint of step 2 .*File too large", size=10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("may not mount a tmpfs here")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    store = CheckpointStore(small_disk / "checkpoints")
    store.save(1, state_of(1), wait=True)
    check_failure(store, "Cannot save the checkpoint of step 2 .*No space left", size=50_000)
    store.save(2, state_of(2), wait=True)
    assert_is(store.load(), 2)


def test_a_disk_that_turns_read_only(small_disk: Path) -> None:
    store = CheckpointStore(small_disk / "checkpoints")
    store.save(1, state_of(1), wait=True)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    check_failure(store, "Cannot save the checkpoint of step 2 .*Read-only file system")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(store: CheckpointStore) -> None:
    store.save(1, state_of(1), wait=True)
    store.folder.chmod(0o555)
    try:
        check_failure(store, "Cannot save the checkpoint of step 2 .*Permission denied")
    finally:
        store.folder.chmod(0o755)


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(CheckpointError, match="Cannot save the checkpoint of step 1"):
        CheckpointStore(tmp_path / "run" / "checkpoints").save(1, state_of(1), wait=True)
