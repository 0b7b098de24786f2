"""The device mesh and its collectives."""

import pytest
import torch
import torch.distributed as dist
from tests.parallel.processes import run_in_processes
from torch.distributed.tensor import DTensor, Replicate, Shard

from switchlm.errors import ConfigError
from switchlm.parallel.mesh import (
    ALONE,
    Mesh,
    MeshConfig,
    default_device,
    find_device,
    joined,
    layouts,
)
from switchlm.training.monitor import global_norm


def test_data_takes_the_processes_that_are_left():
    assert MeshConfig(expert=2, tensor=2).shape(8) == (1, 2, 2, 2)
    assert MeshConfig(replicas=2, data=2).shape(4) == (2, 2, 1, 1)
    assert MeshConfig().shape(1) == (1, 1, 1, 1)


@pytest.mark.parametrize("config", [MeshConfig(data=3), MeshConfig(expert=3), MeshConfig(tensor=8)])
def test_a_product_that_is_not_the_number_of_processes_is_refused(config):
    with pytest.raises(ConfigError, match=r"cannot be 4 processes.*torchrun --nproc-per-node"):
        config.shape(4)


@pytest.mark.parametrize("name", ["replicas", "data", "expert", "tensor", "timeout"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name} must be"):
        MeshConfig(**{name: 0})


def test_a_mesh_of_several_needs_several_processes():
    with pytest.raises(ConfigError, match="cannot be 1 processes"), joined(MeshConfig(expert=2)):
        pass
    with joined(MeshConfig()) as mesh:
        assert mesh is ALONE


def built_for_cuda(check_available=False):
    """What PyTorch built for CUDA says on a machine without a GPU."""
    return None if check_available else torch.device("cuda")


def test_pytorch_built_for_cuda_computes_on_the_cpu_of_a_machine_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", built_for_cuda)
    assert default_device() == torch.device("cpu")


def test_one_process_computes_on_apple_s_gpu_and_a_job_of_several_on_cpus(monkeypatch):
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps")
    )
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    assert default_device() == torch.device("mps", 0)
    assert find_device("auto") == torch.device("mps", 0)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    assert default_device() == find_device("cpu") == torch.device("cpu")
    for name in ("mps", "cuda:1"):
        with pytest.raises(ConfigError, match=f"The device is '{name}', but each process of a job"):
            find_device(name)


def test_layouts_are_all_products_once():
    found = [(m.replicas, m.data, m.expert, m.tensor) for m in layouts(8)]
    assert len(found) == len(set(found)) == 20
    assert all(a * b * c * d == 8 for a, b, c, d in found)


def test_four_processes_agree(tmp_path):
    run_in_processes(4, tmp_path, agree)


def agree(rank):
    mesh = Mesh.of(MeshConfig(data=2, tensor=2), "cpu")
    # Tensor neighbours, who are next to one another, have the same share of a batch.
    assert (mesh.data_size, mesh.data_rank, mesh.is_main) == (2, rank // 2, rank == 0)
    assert mesh.all_reduce_sum(torch.tensor(10 + mesh.data_rank)) == 21
    assert mesh.any_rank(rank == 3)
    assert not mesh.any_rank(False)
    # A vector [0 .. 7] sharded over both axes; another whole on each process.
    grid = mesh.sub("data", "tensor")
    part = DTensor.from_local(torch.arange(2.0) + 2 * rank, grid, [Shard(0), Shard(0)])
    copy = DTensor.from_local(torch.ones(3), grid, [Replicate(), Replicate()])
    half = DTensor.from_local(torch.ones(2), grid, [Replicate(), Shard(0)])
    assert [mesh.num_replicas(tensor) for tensor in (part, copy, half, torch.ones(1))] == [
        1,
        4,
        2,
        4,
    ]
    length, sums = global_norm([part], mesh, [rank, 2**24 + 1])
    torch.testing.assert_close(length, torch.arange(8.0).norm())
    assert sums.tolist() == [6, 4 * (2**24 + 1)]
    bad = torch.tensor([float("nan") if rank == 1 else 0.0])
    norm, sums = global_norm([bad], mesh, [1])
    assert norm.isnan()
    assert sums == 4
    bits = [torch.empty(()) for _ in range(4)]
    dist.all_gather(bits, length)
    assert len({float(value) for value in bits}) == 1
