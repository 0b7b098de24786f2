"""Optimizer steps of sharded parameters equal those of full ones."""

import torch
from tests.parallel.processes import run_in_processes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer

from switchlm.training.adafactor import Adafactor

SHAPES = [((130, 140), 0), ((130, 140), 1), ((4, 128, 130), 0), ((9,), 0)]


def optimizers(params: list[nn.Parameter]) -> list[Optimizer]:
    return [
        Adafactor(params, lr=0.05, weight_decay=0.1),
        Adafactor(params, lr=0.05, per_expert_rms=True),
        torch.optim.AdamW(params, lr=0.05, fused=True),
    ]


def steps(kind: int, place: bool) -> list[Tensor]:
    """Take four steps, the third one bad; return the parameters, gathered, and their state."""
    mesh = init_device_mesh("cpu", (2,))
    noise = torch.Generator().manual_seed(0)

    def made(shape: tuple[int, ...], dim: int) -> Tensor:
        whole = torch.randn(shape, generator=noise)
        return distribute_tensor(whole, mesh, [Shard(dim)]) if place else whole

    params = [nn.Parameter(made(*spec)) for spec in SHAPES]
    optimizer = optimizers(params)[kind]
    for step in range(4):
        for parameter, spec in zip(params, SHAPES, strict=True):
            parameter.grad = made(*spec)
        optimizer.found_inf = torch.tensor(float(step == 2))
        optimizer.grad_scale = torch.tensor(2.0)
        optimizer.step()
    states = [value for parameter in params for value in optimizer.state[parameter].values()]
    tensors = [parameter.detach() for parameter in params] + states
    assert not any(
        spot.is_partial()
        for tensor in tensors
        if isinstance(tensor, DTensor)
        for spot in tensor.placements
    ), "statistics must be settled, or checkpoints hold sums of parts"
    return [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]


def compare(rank: int) -> None:
    for kind in range(3):
        for sharded, full in zip(steps(kind, True), steps(kind, False), strict=True):
            torch.testing.assert_close(sharded, full, rtol=1e-5, atol=1e-7)


def test_sharded_updates_equal_full_ones(tmp_path):
    """Two processes; rows, columns, experts and vectors sharded; one step of four skipped."""
    run_in_processes(2, tmp_path, compare)
