"""Optimizer steps of sharded and of full parameters on two processes; test_sharded.py runs it.

sharded_driver.py FOLDER
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
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


def work(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for kind in range(3):
        for sharded, whole in zip(steps(kind, True), steps(kind, False), strict=True):
            torch.testing.assert_close(sharded, whole, rtol=1e-5, atol=1e-7)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, (str(Path(sys.argv[1]) / "store"),), nprocs=2)
