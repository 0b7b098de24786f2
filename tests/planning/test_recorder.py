"""The recorder against collectives whose sizes are known, on four real processes."""

from pathlib import Path

import torch
import torch.distributed as dist
from tests.parallel.processes import run_in_processes
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from switchlm.parallel.mesh import Mesh, MeshConfig
from switchlm.planning.recorder import CollectiveRecorder


def record(rank: int, out: Path) -> None:
    mesh = Mesh.of(MeshConfig(data=2, expert=2), "cpu")
    expert = mesh.sub("expert")
    assert expert is not None
    with CollectiveRecorder(mesh) as recorder:
        dist.all_reduce(torch.ones(3))
        dist.all_to_all_single(torch.ones(4), torch.ones(4), group=expert.get_group())
        x = torch.ones(6, 2, requires_grad=True)
        all_to_all_single_autograd(x, [3, 3], [3, 3], expert.get_group()).sum().backward()
        part = DTensor.from_local(torch.ones(5), expert, [Shard(0)])
        part.redistribute(placements=[Replicate()])
        layer = torch.nn.Linear(8, 4, bias=False)
        fully_shard(layer, mesh=mesh.sub("data"))
        layer(torch.ones(1, 8)).sum().backward()
    if mesh.is_main:
        lines = [f"{c.kind} {c.axes} {c.size} {c.payload} {c.sent}" for c in recorder.collectives]
        out.write_text("\n".join(lines))


def test_every_collective_is_recorded_once_with_its_axes_and_its_size(tmp_path: Path) -> None:
    run_in_processes(4, tmp_path, record, tmp_path / "lines")
    assert (tmp_path / "lines").read_text().splitlines() == [
        "all_reduce dataxexpert 4 12 18.0",
        "all_to_all expert 2 16 8.0",
        "all_to_all expert 2 48 24.0",
        "all_to_all expert 2 48 24.0",  # the gradient is sent back
        "all_gather expert 2 40 20.0",
        "all_gather data 2 128 64.0",
        "reduce_scatter data 2 128 64.0",
    ]
