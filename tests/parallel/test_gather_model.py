"""A gathered model is the model of one process, bit for bit."""

import pytest
import torch
from tests.parallel.processes import run_in_processes
from torch.distributed.tensor import DTensor

from switchlm.parallel.apply import gather_model
from switchlm.parallel.mesh import Mesh, MeshConfig
from switchlm.recipes.config import run_config
from switchlm.recipes.pretrain import build_model


@pytest.mark.parametrize("number", [2, 4])
def test_it_is_the_model_of_one_process(tmp_path, number):
    run_in_processes(number, tmp_path, put_together, number)


def put_together(rank: int, number: int) -> None:
    config = run_config(preset="nano")
    expected = build_model(config).state_dict()
    meshes = [{axis: number} for axis in ("replicas", "data", "expert")]
    meshes.append({"data": number // 2, "tensor": 2})
    for axes in meshes:
        model = build_model(config, Mesh.of(MeshConfig(**axes), "cpu"))
        assert any(isinstance(part, DTensor) for part in model.parameters())
        copy = gather_model(model)
        assert not copy.training
        assert copy.state_dict().keys() == expected.keys()
        for name, tensor in copy.state_dict().items():
            assert type(tensor) is torch.Tensor
            assert torch.equal(tensor, expected[name]), (axes, name)


def test_a_model_of_one_process_is_given_back():
    model = build_model(run_config(preset="nano"))
    assert gather_model(model) is model
