"""The processes of a run on a grid of four axes, and what they tell one another every step.

    replicas   whole copies; only gradients travel between them
    data       shares of a batch; weights, gradients and optimizer state are sharded
    expert     shares of a batch too, and of the experts; tokens travel by all-to-all
    tensor     one share of a batch; heads, d_ff and the vocabulary are split

The last axis varies fastest, so that tensor neighbours, who talk most, share a host.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from switchlm.errors import ConfigError

AXES = ("replicas", "data", "expert", "tensor")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many processes there are along each axis; their product is the number of processes.

    data: None takes as many as there are processes left. timeout: seconds that a collective waits
    for the others before the run ends and names who is missing.
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


@dataclass(frozen=True)
class Mesh:
    """All processes, and where this one stands among them."""

    device_mesh: DeviceMesh

    @classmethod
    def of(cls, config: MeshConfig, device_type: str) -> "Mesh":
        """Lay the processes of the running job out on the grid."""
        shape = config.shape(dist.get_world_size())
        return cls(init_device_mesh(device_type, shape, mesh_dim_names=AXES))

    def size(self, axis: str) -> int:
        """Return how many processes there are along an axis."""
        return self.device_mesh.size(AXES.index(axis))

    def rank(self, axis: str) -> int:
        """Return the place of this process along an axis."""
        return self.device_mesh.get_local_rank(axis)

    @property
    def num_shares(self) -> int:
        """Into how many shares the rows of a batch are split."""
        return self.size("replicas") * self.size("data") * self.size("expert")

    @property
    def share(self) -> int:
        """Which share of the rows is this process's; tensor neighbours have the same."""
        row = self.rank("replicas") * self.size("data") + self.rank("data")
        return row * self.size("expert") + self.rank("expert")

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for all: it writes and prints."""
        return dist.get_rank() == 0

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over all shares of a batch, the same bits everywhere."""
        values = values.clone()
        dist.all_reduce(values, group=self._shares.get_group())
        return values

    def any(self, flag: bool) -> bool:
        """Whether any process says so; all agree on the answer."""
        flags = torch.tensor([float(flag)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags)

    def wait(self) -> None:
        """Return when all processes have come here."""
        dist.barrier()

    def sub(self, *axes: str) -> DeviceMesh | None:
        """Return the mesh of the axes longer than 1, in order; None if there are none."""
        names = tuple(axis for axis in axes if self.size(axis) > 1)
        return self.device_mesh[names] if names else None

    @cached_property
    def weights(self) -> DeviceMesh | None:
        """The mesh that FSDP shards what is no expert over: `shard`, or (`replicas`, `shard`).

        The expert axis is a data axis to them.
        """
        shard = self.device_mesh["data", "expert"]._flatten("shard")
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
        return self.device_mesh["replicas", "data", "expert"]._flatten("shares")


class Alone:
    """The mesh of a single process that was started by nobody."""

    num_shares = 1
    share = 0
    is_main = True

    def size(self, axis: str) -> int:
        """Return 1."""
        return 1

    def total(self, values: Tensor) -> Tensor:
        """Return the values."""
        return values

    def any(self, flag: bool) -> bool:
        """Return the flag."""
        return flag

    def wait(self) -> None:
        """Return at once."""


ALONE = Alone()
