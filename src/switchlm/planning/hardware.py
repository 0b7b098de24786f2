"""What GPUs and their network can do, and how long a collective takes there.

Figures of GPUs are those of the makers' data sheets: dense products without sparsity, the SXM
modules; everything may be overridden. The model of a collective is simple on purpose:

    ring of n (all-reduce, all-gather, reduce-scatter)   sent / bandwidth + latency * log2(n)
    all-to-all                                           as above, and a message to every peer

A ring that spans nodes goes through as many network ports of a node as it has members there; of an
all-to-all only what leaves the node goes through the port of each GPU.
"""

import math
from dataclasses import dataclass

from switchlm.errors import ConfigError, nearest
from switchlm.parallel.mesh import AXES, MeshConfig
from switchlm.planning.recorder import Collective


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """memory: bytes.
    tensor_flops: a second, bfloat16.
    flops: a second, float32 without tensor cores.
    memory_bandwidth, link: bytes per second, of its memory and to neighbours in each direction.
    """

    memory: float
    tensor_flops: float
    flops: float
    memory_bandwidth: float
    link: float


GPUS = {
    "a100-80gb": Gpu(
        memory=80e9, tensor_flops=312e12, flops=19.5e12, memory_bandwidth=2.04e12, link=300e9
    ),
    "h100": Gpu(
        memory=80e9, tensor_flops=989e12, flops=67e12, memory_bandwidth=3.35e12, link=450e9
    ),
    "h200": Gpu(
        memory=141e9, tensor_flops=989e12, flops=67e12, memory_bandwidth=4.8e12, link=450e9
    ),
    "b200": Gpu(
        memory=180e9, tensor_flops=2250e12, flops=75e12, memory_bandwidth=7.7e12, link=900e9
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs of one kind in nodes of equal size.

    network: bytes per second between nodes, a GPU and direction.
    latency: seconds a round of a collective; message: seconds a peer of an all-to-all.
    utilisation: the share of a GPU's peak that matrix products reach.
    usable: the share of its memory that tensors may fill; the rest is for the driver, the libraries
        and what the allocator cannot use.
    """

    gpu: Gpu
    nodes: int = 1
    gpus_per_node: int = 8
    network: float = 50e9
    latency: float = 10e-6
    message: float = 0.2e-6
    utilisation: float = 0.5
    usable: float = 0.92

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("network", "latency", "message"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}.")
        for name in ("utilisation", "usable"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie in (0, 1], got {getattr(self, name)}.")

    @property
    def num_gpus(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus_per_node

    @property
    def memory(self) -> float:
        """Bytes that the tensors of a GPU may fill."""
        return self.gpu.memory * self.usable

    def seconds(self, collective: Collective, mesh: MeshConfig) -> float:
        """Return how long a collective takes on this cluster."""
        size = collective.size
        if size == 1:
            return 0.0
        here = self._members_of_a_node(collective, mesh)
        start = self.latency * math.ceil(math.log2(size))
        if collective.kind == "all_to_all":
            outside = collective.sent * (size - here) / max(size - 1, 1)
            inside = collective.sent - outside
            transfer = max(outside / self.network, inside / self.gpu.link)
            return start + self.message * size + transfer
        bandwidth = self.gpu.link if here == size else min(self.gpu.link, self.network * here)
        return start + collective.sent / bandwidth

    def _members_of_a_node(self, collective: Collective, mesh: MeshConfig) -> int:
        """Return how many processes of the group of the first one share its node."""
        sizes = {axis: getattr(mesh, axis) or 1 for axis in AXES}
        members = 1
        stride = 1
        for axis in reversed(AXES):
            if axis in collective.axes:
                fit = max(self.gpus_per_node // stride, 1)
                members *= math.gcd(sizes[axis], fit) if fit < sizes[axis] else sizes[axis]
            stride *= sizes[axis]
        return min(members, collective.size)


def find_gpu(name: str) -> Gpu:
    """Return the GPU of that name; ConfigError names the near miss."""
    if name not in GPUS:
        raise ConfigError(f"There is no GPU {name!r} in the table.{nearest(name, GPUS)}")
    return GPUS[name]
