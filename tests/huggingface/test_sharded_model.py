"""Sharded models are saved to and loaded from the Hugging Face format, never gathered.

The work is done by export_driver.py in processes of its own.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.commands import run

import switchlm
from switchlm.errors import CheckpointError
from switchlm.huggingface.load import load_config, load_weights
from switchlm.model.transformer import SwitchTransformer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks processes")

MESHES = ("replicas1-data2-expert2-tensor1", "replicas1-data1-expert2-tensor2")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folders that four ranks wrote, and their results."""
    folder = tmp_path_factory.mktemp("exported")
    command = [sys.executable, "-m", "tests.huggingface.export_driver", str(folder)]
    done = run(command, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads(done.stdout.splitlines()[-1])


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_sharded_model_has_the_weights_of_the_unsharded_one(exported) -> None:
    for found in exported[1]["ranks"]:
        assert found["wrong"] == {mesh: [] for mesh in MESHES}


@pytest.mark.parametrize("mesh", MESHES)
def test_four_ranks_write_the_files_of_one(exported, mesh: str) -> None:
    folder = exported[0]
    assert len(list((folder / mesh).glob("*.safetensors"))) >= 4
    assert same(tensors_in(folder / mesh), tensors_in(folder / "single"))
    for name in ("config.json", "generation_config.json", "README.md"):
        assert (folder / mesh / name).read_text() == (folder / "single" / name).read_text()
    whole, _ = switchlm.load(folder / "single")
    again, _ = switchlm.load(folder / mesh)
    assert same(again.state_dict(), whole.state_dict())


def test_transformers_loads_the_files_of_four_ranks(exported) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    build = transformers.SwitchTransformersForConditionalGeneration.from_pretrained
    sharded, told = build(exported[0] / MESHES[0], output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert same(sharded.state_dict(), build(exported[0] / "single").state_dict())


def test_no_rank_allocates_more_than_one_matrix(exported) -> None:
    result = exported[1]
    for found in result["ranks"]:
        assert max(found["loading"] + found["saving"]) <= result["largest_matrix"]


def test_an_error_of_one_rank_is_raised_on_all_and_leaves_nothing(exported) -> None:
    result = exported[1]
    for found in result["ranks"]:
        assert found["disk"] == "Rank 1: [Errno 5] Input/output error"
        assert "There are no weights in" in found["elsewhere"]
    assert "bad" not in result["left"]
    assert not [name for name in result["left"] if name.startswith(".")]


def test_weights_are_loaded_in_the_dtype_of_the_model(exported) -> None:
    folder = exported[0] / "single"
    model = SwitchTransformer(load_config(folder)).bfloat16()
    load_weights(model, folder)
    whole, _ = switchlm.load(folder, dtype=torch.bfloat16)
    assert same(model.state_dict(), whole.state_dict())


def test_a_model_on_the_meta_device_or_of_another_shape_is_refused(exported) -> None:
    folder = exported[0] / "single"
    with torch.device("meta"):
        model = SwitchTransformer(load_config(folder))
    with pytest.raises(CheckpointError, match=r"meta device.*to_empty"):
        load_weights(model, folder)
    other = SwitchTransformer(load_config(exported[0] / MESHES[0]))
    other.config = load_config(folder).dense_twin()
    with pytest.raises(CheckpointError):
        load_weights(other, folder)
