"""The device mesh of a run with four axes, and the collectives of every step.

    replicas   full copies; only gradients are summed over them
    data       shares of a batch; weights, gradients and optimizer state are sharded
    expert     shares of a batch too, and of the experts; tokens are sent by all-to-all
    tensor     one share of a batch; heads, d_ff and the vocabulary are split

The last axis varies fastest, so that tensor parallel ranks, which communicate most, share a host.
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
    """The size of each axis; their product is the number of processes.

    replicas: copies of everything; only gradients are summed over them.
    data: shares of the batch that shard weights, gradients and optimizer state; None takes all
        remaining processes.
    expert: shares of the batch that have a part of the experts each.
    tensor: parts of heads, d_ff and vocabulary.
    timeout: seconds that a collective waits before the run ends with the names of lost ranks.
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
        """Return the sizes of all axes; ConfigError if their product is not `num_processes`."""
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
    """Yield every mesh of `num_processes`."""
    divisors = [size for size in range(1, num_processes + 1) if num_processes % size == 0]
    for replicas, data, expert in itertools.product(divisors, repeat=3):
        tensor, rest = divmod(num_processes, replicas * data * expert)
        if not rest:
            yield MeshConfig(replicas=replicas, data=data, expert=expert, tensor=tensor)


@dataclass(frozen=True)
class Mesh:
    """The processes of a job, and the ranks of this one; `ALONE` for a single process.

    device_mesh: the grid; None for a single process, for which every collective returns its input.
    heartbeat: of this rank; None without heartbeats.
    storage: a gloo group of all processes for checkpoints, which are written during training.
    """

    device_mesh: DeviceMesh | None = None
    heartbeat: Heartbeat | None = None
    storage: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, config: MeshConfig, device_type: str, heartbeat: Heartbeat | None = None) -> "Mesh":
        """Return the mesh of the initialised process group."""
        shape = config.shape(dist.get_world_size())
        grid = init_device_mesh(device_type, shape, mesh_dim_names=AXES)
        fake = dist.get_backend() == "fake"
        timeout = timedelta(seconds=config.timeout)
        storage = None if fake else dist.new_group(backend="gloo", timeout=timeout)
        return cls(grid, heartbeat, storage)

    @property
    def is_distributed(self) -> bool:
        """Whether there is a process group, even if of one process."""
        return self.device_mesh is not None

    @property
    def global_rank(self) -> int:
        return dist.get_rank() if self.is_distributed else 0

    @property
    def world_size(self) -> int:
        return dist.get_world_size() if self.is_distributed else 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints (rank 0)."""
        return self.global_rank == 0

    @property
    def restarted(self) -> bool:
        """Whether the job failed before and was restarted."""
        return self.heartbeat is not None and self.heartbeat.restarted

    def size(self, axis: str) -> int:
        """Return the number of processes along an axis."""
        return 1 if self.device_mesh is None else self.device_mesh.size(AXES.index(axis))

    def rank(self, axis: str) -> int:
        """Return the index of this process along an axis."""
        return 0 if self.device_mesh is None else self.device_mesh.get_local_rank(axis)

    @property
    def data_size(self) -> int:
        """The number of shares of a batch."""
        return self.size("replicas") * self.size("data") * self.size("expert")

    @property
    def data_rank(self) -> int:
        """The index of this process's share of a batch; tensor parallel ranks have the same."""
        row = self.rank("replicas") * self.size("data") + self.rank("data")
        return row * self.size("expert") + self.rank("expert")

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank; picklable Python values."""
        found: list[T] = [value] * self.world_size
        if self.is_distributed:
            dist.all_gather_object(found, value)
        return found

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over all shares of a batch, the same bits everywhere."""
        if self.data_size == 1:
            return values
        values = values.clone()
        dist.all_reduce(values, group=self._shares.get_group())
        return values

    def all_ranks_sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over all processes, the same bits everywhere."""
        if self.is_distributed:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def num_replicas(self, tensor: Tensor) -> int:
        """Return the number of processes with the same part of a tensor."""
        shards = 1
        if isinstance(tensor, DTensor):
            for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
                shards *= 1 if placement.is_replicate() else size
        return self.world_size // shards

    def any_rank(self, flag: bool) -> bool:
        """Return whether `flag` is true on any process."""
        if not self.is_distributed:
            return flag
        flags = torch.tensor([float(flag)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags)

    def barrier(self) -> None:
        if self.is_distributed:
            dist.barrier()

    def beat(self, step: int) -> None:
        """Record a heartbeat: this process has finished `step` steps."""
        if self.heartbeat is not None:
            self.heartbeat.beat(step)

    def local_rank_zero_first(self, what: str) -> AbstractContextManager[None]:
        """Run the block in one process of each host first, then in the others."""
        if self.heartbeat is None:
            return nullcontext()
        return self.heartbeat.local_rank_zero_first(what)

    def sub(self, *axes: str) -> DeviceMesh | None:
        """Return the mesh of the axes longer than 1, in order; None if there are none."""
        names = tuple(axis for axis in axes if self.size(axis) > 1)
        return self._grid[names] if names else None

    @cached_property
    def weights(self) -> DeviceMesh | None:
        """The mesh over which FSDP shards all but experts: `shard`, or (`replicas`, `shard`).

        `shard` is data x expert, since the expert axis splits the batch too.
        """
        shard = _torch.flatten(self._grid["data", "expert"], "shard")
        if self.size("replicas") > 1:
            return self._grid["replicas", "shard"]
        return shard if shard.size() > 1 else None

    @cached_property
    def experts(self) -> DeviceMesh | None:
        """The mesh over which FSDP shards experts: `data`, or (`replicas`, `data`)."""
        if self.size("replicas") > 1:
            return self._grid["replicas", "data"]
        return self.sub("data")

    @cached_property
    def _shares(self) -> DeviceMesh:
        return _torch.flatten(self._grid["replicas", "data", "expert"], "shares")

    @property
    def _grid(self) -> DeviceMesh:
        assert self.device_mesh is not None, "a single process has no grid"
        return self.device_mesh


ALONE = Mesh()


def default_device() -> torch.device:
    """Return the accelerator of this process if there is one, else the CPU.

    The processes of a job are on NVIDIA's or AMD's GPUs, or all on CPUs.
    """
    # Without check_available, PyTorch built for CUDA returns CUDA on a machine without a GPU.
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None or (kind.type != "cuda" and dist.is_initialized()):
        return torch.device("cpu")
    return torch.device(kind.type, torch.accelerator.current_device_index())


def find_device(name: str) -> torch.device:
    """Return the device of that name; `auto` is `default_device`.

    Raises ConfigError if this process cannot compute there. The processes of a job take the GPU of
    their rank, so that they can be told `cuda` or `cpu` alone.
    """
    if name == "auto":
        return default_device()
    if dist.is_initialized() and name not in ("cpu", "cuda"):
        raise ConfigError(
            f"The device is {name!r}, but each process of a job computes on a GPU of its own, or "
            "all on CPUs: write cuda or cpu, or leave it out."
        )
    try:
        if torch.empty(1, device=name).is_meta:
            raise RuntimeError("tensors have no values there")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"Cannot compute on the device {name!r}: {reason}") from None
    return default_device() if name == "cuda" else torch.device(name)


@contextmanager
def joined(config: MeshConfig, device: str = "auto") -> Iterator[Mesh]:
    """Initialise the process group of the job for the block, and yield its mesh.

    device: of the run, see `find_device`.

    Raises ConfigError if the mesh does not match the number of processes, LaunchError if not all
    processes start, and LostRankError if one is lost.
    """
    launch = launched()
    if launch is None:
        config.shape(1)
        find_device(device)  # an error before anything takes time
        yield ALONE
        return
    with process_group(launch, config.timeout, on_cpu=device == "cpu") as heartbeat:
        yield Mesh.of(config, find_device(device).type, heartbeat)
