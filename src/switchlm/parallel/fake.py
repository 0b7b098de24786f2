"""A job of any number of processes in this one: collectives return at once, and move nothing."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from switchlm.errors import ConfigError
from switchlm.parallel.mesh import Mesh, MeshConfig

LARGEST = 2**16  # processes; a group of them lists all its members


@contextmanager
def fake_job(config: MeshConfig, num_processes: int) -> Iterator[Mesh]:
    """Be process 0 of a job of `num_processes` that does not exist, and yield its mesh.

    Raises ConfigError if the mesh does not fit them, or if a real job is running here.
    """
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ConfigError("This process is part of a real job; simulate in a process of its own.")
    if not 1 <= num_processes <= LARGEST:
        raise ConfigError(f"ranks must lie in 1..{LARGEST}, got {num_processes}.")
    config.shape(num_processes)
    dist.init_process_group("fake", rank=0, world_size=num_processes, store=FakeStore())
    try:
        yield Mesh.of(config, "cpu")
    finally:
        dist.destroy_process_group()
        # What DTensor remembers of operators holds the groups of this job; an equal mesh of the
        # next job would be taken for it.
        _clear_sharding_prop_cache()
