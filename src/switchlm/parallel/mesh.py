"""The processes of a run on a grid of four axes, and the collectives of every step.

    replicas   whole copies; only gradients are summed over them
    data       shares of a batch; weights, gradients and optimizer state are sharded
    expert     shares of a batch too, and of the experts; tokens are sent by all-to-all
    tensor     one share of a batch; heads, d_ff and the vocabulary are split

The last axis varies fastest, so that tensor neighbours, who talk most, share a host.
"""

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from switchlm import _torch
from switchlm.errors import ConfigError
from switchlm.parallel.heartbeat import Heartbeat
from switchlm.parallel.launch import launched, process_group

AXES = ("replicas", "data", "expert", "tensor")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many processes there are along each axis; their product is the number of processes.

    replicas: copies of everything; only gradients are summed over them.
    data: shares of the batch that shard weights, gradients and optimizer state; None takes as many
        as there are processes left.
    expert: shares of the batch that own a part of the experts each.
    tensor: parts of heads, d_ff and vocabulary.
    timeout: seconds that a collective waits for the others before the run ends and names who is
        missing.
    """

    replicas: int = 1
    data: int | None = None
    expert: int = 1
    tensor: int = 1
    timeout: float = 600.0

    def __post_init__(self) -> None:
        for name in AXES:
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ConfigError(f"mesh.{name} must be at least 1, got {size}.")
        if self.timeout <= 0:
            raise ConfigError(f"mesh.timeout must be positive seconds, got {self.timeout}.")

    def shape(self, num_processes: int) -> tuple[int, int, int, int]:
        """Return the sizes of all axes; raises ConfigError if they do not make up the number."""
        others = self.replicas * self.expert * self.tensor
        data = self.data or max(num_processes // others, 1)
        if data * others != num_processes:
            raise ConfigError(
                f"mesh.replicas {self.replicas} x data {self.data or 'any'} x expert {self.expert} "
                f"x tensor {self.tensor} cannot be {num_processes} processes. Start the product of "
                "them (torchrun --nproc-per-node), or change the mesh."
            )
        return self.replicas, data, self.expert, self.tensor


def layouts(num_processes: int) -> Iterator[MeshConfig]:
    """Yield every mesh of so many processes."""
    divisors = [size for size in range(1, num_processes + 1) if num_processes % size == 0]
    for replicas, data, expert in itertools.product(divisors, repeat=3):
        tensor, rest = divmod(num_processes, replicas * data * expert)
        if not rest:
            yield MeshConfig(replicas=replicas, data=data, expert=expert, tensor=tensor)


@dataclass(frozen=True)
class Mesh:
    """All processes, and where this one stands among them.

    heartbeat: which ranks live; None where nobody looks.
    storage: a group of all processes for checkpoints, which are written while training goes on.
    """

    device_mesh: DeviceMesh
    heartbeat: Heartbeat | None = None
    storage: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, config: MeshConfig, device_type: str, heartbeat: Heartbeat | None = None) -> "Mesh":
        """Lay the processes of the running job out on the grid."""
        shape = config.shape(dist.get_world_size())
        grid = init_device_mesh(device_type, shape, mesh_dim_names=AXES)
        fake = dist.get_backend() == "fake"
        patience = timedelta(seconds=config.timeout)
        storage = None if fake else dist.new_group(backend="gloo", timeout=patience)
        return cls(grid, heartbeat, storage)

    def size(self, axis: str) -> int:
        """Return how many processes there are along an axis."""
        return self.device_mesh.size(AXES.index(axis))

    def rank(self, axis: str) -> int:
        """Return the place of this process along an axis."""
        return self.device_mesh.get_local_rank(axis)

    @property
    def data_size(self) -> int:
        """Into how many shares the rows of a batch are split."""
        return self.size("replicas") * self.size("data") * self.size("expert")

    @property
    def data_rank(self) -> int:
        """Which share of the rows is this process's; tensor neighbours have the same."""
        row = self.rank("replicas") * self.size("data") + self.rank("data")
        return row * self.size("expert") + self.rank("expert")

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for all: it writes and prints."""
        return dist.get_rank() == 0

    @property
    def global_rank(self) -> int:
        """Return the number of this process among all."""
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        """Return how many processes there are."""
        return dist.get_world_size()

    @property
    def restarted(self) -> bool:
        """Whether the job failed before and was started anew."""
        return self.heartbeat is not None and self.heartbeat.restarted

    def gather(self, value: T) -> list[T]:
        """Return what every process gives, by its number; plain Python values."""
        found: list[T] = [value] * self.world_size
        dist.all_gather_object(found, value)
        return found

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over all shares of a batch, the same bits everywhere."""
        if self.data_size == 1:
            return values
        values = values.clone()
        dist.all_reduce(values, group=self._shares.get_group())
        return values

    def global_norm(self, part: Tensor) -> Tensor:
        """Return the Euclidean length of a vector from the lengths of its parts on all processes.

        The same bits everywhere; a part that is not finite makes the whole so.
        """
        square = part.square()
        dist.all_reduce(square)
        return square.sqrt()

    def num_replicas(self, tensor: Tensor) -> int:
        """Return how many processes hold what this one holds of a tensor."""
        shards = 1
        if isinstance(tensor, DTensor):
            for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
                shards *= 1 if placement.is_replicate() else size
        return self.device_mesh.size() // shards

    def any_rank(self, flag: bool) -> bool:
        """Whether any process says so; all agree on the answer."""
        flags = torch.tensor([float(flag)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags)

    def barrier(self) -> None:
        """Return when all processes have come here."""
        dist.barrier()

    def beat(self, step: int) -> None:
        """Leave word that this process has come to `step`."""
        if self.heartbeat is not None:
            self.heartbeat.beat(step)

    def local_rank_zero_first(self, what: str) -> AbstractContextManager[None]:
        """Run the block in one process of each host first, then in the others."""
        return (
            nullcontext() if self.heartbeat is None else self.heartbeat.local_rank_zero_first(what)
        )

    def sub(self, *axes: str) -> DeviceMesh | None:
        """Return the mesh of the axes longer than 1, in order; None if there are none."""
        names = tuple(axis for axis in axes if self.size(axis) > 1)
        return self.device_mesh[names] if names else None

    @cached_property
    def weights(self) -> DeviceMesh | None:
        """The mesh that FSDP shards what is no expert over: `shard`, or (`replicas`, `shard`).

        The expert axis is a data axis to them.
        """
        shard = _torch.flatten(self.device_mesh["data", "expert"], "shard")
        if self.size("replicas") > 1:
            return self.device_mesh["replicas", "shard"]
        return shard if shard.size() > 1 else None

    @cached_property
    def experts(self) -> DeviceMesh | None:
        """The mesh that FSDP shards experts over: `data`, or (`replicas`, `data`)."""
        if self.size("replicas") > 1:
            return self.device_mesh["replicas", "data"]
        return self.sub("data")

    @cached_property
    def _shares(self) -> DeviceMesh:
        return _torch.flatten(self.device_mesh["replicas", "data", "expert"], "shares")


class Alone:
    """The mesh of a single process that was started by nobody."""

    data_size = world_size = 1
    data_rank = global_rank = 0
    is_main = True
    storage = None
    restarted = False

    def size(self, axis: str) -> int:
        """Return 1."""
        return 1

    def gather(self, value: T) -> list[T]:
        """Return the value alone."""
        return [value]

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Return the values."""
        return values

    def global_norm(self, part: Tensor) -> Tensor:
        """Return the length: the part is the whole."""
        return part

    def num_replicas(self, tensor: Tensor) -> int:
        """Return 1."""
        return 1

    def any_rank(self, flag: bool) -> bool:
        """Return the flag."""
        return flag

    def barrier(self) -> None:
        """Return at once."""

    def beat(self, step: int) -> None:
        """Do nothing: nobody waits for word."""

    def local_rank_zero_first(self, what: str) -> AbstractContextManager[None]:
        """Run the block."""
        return nullcontext()


ALONE = Alone()
AnyMesh = Mesh | Alone


@contextmanager
def joined(config: MeshConfig) -> Iterator[AnyMesh]:
    """Join the job that this process was started for, for the length of the block.

    Raises ConfigError if the mesh does not fit the number of processes, LaunchError if they do not
    find one another, and LostRankError if one is lost.
    """
    launch = launched()
    if launch is None:
        config.shape(1)
        yield ALONE
        return
    with process_group(launch, config.timeout) as heartbeat:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
        yield Mesh.of(config, device_type, heartbeat)
