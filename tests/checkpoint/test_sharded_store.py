"""Checkpoints of many processes: on any mesh, with errors on one process, or its death.

The work is done by sharded_driver.py in processes of its own.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests import commands

from switchlm.checkpoint import format
from switchlm.checkpoint.read import load_folder
from switchlm.checkpoint.store import CheckpointStore
from switchlm.errors import CheckpointError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks processes")

Drive = Callable[[str], dict[str, Any]]


@pytest.fixture
def drive(tmp_path: Path) -> Drive:
    def run(scene: str) -> dict[str, Any]:
        driver = Path(__file__).with_name("sharded_driver.py")
        words = [sys.executable, str(driver), scene, str(tmp_path)]
        done = commands.run(words, seconds=900)
        assert done.returncode == 0, done.stderr[-3000:]
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    return run


def edit(folder: Path, change: Callable[[str, dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors in the files of a checkpoint, and update the manifest."""
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(path.name, tensors)
        save_file(tensors, path, metadata=metadata)
    (folder / format.NAME).unlink()
    format.write(folder, 2)


def test_saved_on_any_mesh_and_loaded_on_any_other(drive: Drive, tmp_path: Path) -> None:
    result = drive("layouts")
    assert result["adamw"] == {"states": 3, "wrong": []}
    assert result["adafactor"] == {"states": 2, "wrong": []}

    # One of these checkpoints, by two processes that split d_ff, loses a part, and has one twice.
    folder = tmp_path / "adamw" / "replicas1-data1-expert1-tensor2" / "step-00000002"
    up = "model/encoder.blocks.1.feedforward.experts.up"
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 2
    kept = {path.name: path.read_bytes() for path in files}

    def lose(file: str, tensors: dict[str, torch.Tensor]) -> None:
        if file == files[1].name:
            del tensors[up]

    edit(folder, lose)
    with pytest.raises(CheckpointError, match=f"a part of experts 0 to 5 of {up} is missing"):
        load_folder(folder)
    for path in files:
        path.write_bytes(kept[path.name])
    (folder / "model-00003-of-00003.safetensors").write_bytes(kept[files[0].name])
    edit(folder, lambda file, tensors: None)
    with pytest.raises(CheckpointError, match=r"does not hold every tensor.*stored twice"):
        load_folder(folder)


@pytest.mark.slow
def test_all_meshes_of_4_2_and_1_processes(drive: Drive) -> None:
    result = drive("all_layouts")
    assert result["adamw"] == {"states": 12, "wrong": []}
    assert result["adafactor"] == {"states": 12, "wrong": []}


def test_4_then_2_then_1_then_4_processes_end_as_one_undisturbed(drive: Drive) -> None:
    assert drive("chain") == {"wrong": [], "steps": [0, 2, 4, 6, 8]}


def test_an_error_of_one_rank_is_raised_on_all(drive: Drive) -> None:
    ranks = drive("faults")["ranks"]
    reports = [found.pop("reports") for found in ranks]
    assert ranks[0] == ranks[1]
    found = ranks[0]
    assert "Cannot save the checkpoint of step 2" in found["disk"]
    assert "Rank 1: [Errno 5] Input/output error" in found["disk"]
    assert found["memory"] == "Rank 1: MemoryError: no memory"
    assert "No space left on device" in found["first"]
    assert found["left"] == ["step-00000001"]
    assert found["steps"] == [1]
    assert "the later step 2." in found["later"]
    assert "Rank 1 saves other tensors than rank 0" in found["shapes"]
    assert "Rank 1: The checkpoint" in found["fit"]
    assert "model/b is float32 [3], not float32 [4]" in found["fit"]
    assert found["untouched"]
    assert "is damaged" in found["step_2"]
    assert "Use step 1, the newest valid one." in found["step_2"]
    assert (found["loaded"], found["went_back_to"], found["equal"]) == (1, 1, True)
    assert found["after"] == [1]
    # Rank 0 speaks for all.
    assert len(reports[0]) == 4
    assert "Continuing from step 1 instead" in reports[0][-1]
    assert reports[1] == []


def test_a_rank_that_dies_in_a_save_leaves_the_checkpoint_before(drive: Drive) -> None:
    result = drive("kills")
    assert result["failures"] == []
    assert result["kills"] == 4
    assert result["old"] == 4


@pytest.mark.slow
def test_a_rank_that_dies_at_any_step_of_a_save(drive: Drive) -> None:
    result = drive("all_kills")
    assert result["failures"] == []
    assert result["kills"] > 15
    assert result["old"] > 10
    assert result["new"] > 5


def test_a_part_of_another_dtype_is_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(2, {"model": {"w": torch.zeros(2, 2)}}, wait=True)

    def halve(file: str, tensors: dict[str, torch.Tensor]) -> None:
        tensors["model/w"] = tensors["model/w"].half()

    edit(tmp_path / "step-00000002", halve)
    with pytest.raises(CheckpointError, match=r"holds model/w as F16, not as torch\.float32"):
        store.load()


@pytest.mark.parametrize(
    "offsets", ["[0]", "[[0, 0]]", '{"saved_offsets": ["x", 0]}', "7", "[-1, 0]"]
)
def test_offsets_that_make_no_sense_end_in_our_own_error(tmp_path: Path, offsets: str) -> None:
    store = CheckpointStore(tmp_path)
    store.save(2, {"model": {"w": torch.zeros(2, 2)}}, wait=True)
    path = next((tmp_path / "step-00000002").glob("*.safetensors"))
    table = offsets if offsets.startswith("{") else f'{{"saved_offsets": {offsets}}}'
    metadata = {"DCP_SHARDING_INFO": f'{{"model/w": {table}}}'}
    save_file(load_file(path), path, metadata=metadata)
    (path.parent / format.NAME).unlink()
    format.write(path.parent, 2)
    with pytest.raises(CheckpointError):
        store.load()


def test_a_checkpoint_written_by_dcp_loads(tmp_path: Path) -> None:
    """As checkpoints were written before every rank wrote its own parts."""
    import torch.distributed.checkpoint as dcp

    state = {"model": {"w": torch.randn(4, 3), "b": torch.randn(()).bfloat16()}, "content": 5}
    store = CheckpointStore(tmp_path)
    store.save(2, state, wait=True)
    folder = tmp_path / "step-00000002"
    for path in (*folder.glob("*.safetensors"), folder / format.NAME):
        path.unlink()
    flat = {f"model/{name}": tensor for name, tensor in state["model"].items()}
    writer = dcp.HuggingFaceStorageWriter(str(folder))
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(dict(flat), storage_writer=writer, planner=planner, no_dist=True)
    format.write(folder, 2)
    loaded = store.load()
    assert loaded["content"] == 5
    assert all(torch.equal(loaded["model"][name], state["model"][name]) for name in ("w", "b"))


def test_dcp_reads_what_is_written_here(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    w = torch.randn(4, 3)
    CheckpointStore(tmp_path).save(2, {"model": {"w": w}}, wait=True)
    into = {"model/w": torch.zeros(4, 3)}
    reader = dcp.HuggingFaceStorageReader(str(tmp_path / "step-00000002"))
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False)
    dcp.load(into, storage_reader=reader, planner=planner, no_dist=True)
    assert torch.equal(into["model/w"], w)
