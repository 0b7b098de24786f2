"""Collectives of known sizes, on real processes: test_ledger.py starts it under torchrun."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from switchlm.parallel.mesh import Mesh, MeshConfig
from switchlm.planning.recorder import CollectiveRecorder


def main(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
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
    dist.barrier()
    if mesh.is_main:
        lines = [f"{c.kind} {c.axes} {c.size} {c.payload} {c.sent}" for c in recorder.collectives]
        out.write_text("\n".join(lines))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
