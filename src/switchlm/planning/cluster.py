"""A cluster: GPUs of one kind in nodes of equal size, and the time that a collective takes on it.

The rates of GPUs are those of the makers' data sheets: dense matmuls with sums in float32; the
first five are SXM modules linked by NVLink, the others cards linked by PCI Express. Everything may
be overridden. The model of a collective is simple on purpose:

    ring of n (all-reduce, all-gather, reduce-scatter)   sent / bandwidth + latency * log2(n)
    all-to-all                                           as above, and a message to every peer

A ring over nodes uses as many network ports of a node as it has members there; of an all-to-all
only what leaves the node uses the port of each GPU.
"""

import math
from dataclasses import dataclass

from switchlm.errors import ConfigError, nearest
from switchlm.parallel.mesh import AXES, MeshConfig
from switchlm.planning.recorder import Collective


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A kind of GPU.

    memory: bytes.
    tensor_flops: FLOPs per second in bfloat16.
    flops: FLOPs per second in float32, without tensor cores.
    memory_bandwidth: bytes per second.
    link: bytes per second to GPUs of the same node, in each direction.
    """

    memory: float
    tensor_flops: float
    flops: float
    memory_bandwidth: float
    link: float


_RATES = {  # memory GB, bfloat16 TFLOP/s, float32 TFLOP/s, memory TB/s, link GB/s
    "a100-40gb": (40, 312, 19.5, 1.555, 300),
    "a100-80gb": (80, 312, 19.5, 2.04, 300),
    "h100": (80, 989, 67, 3.35, 450),
    "h200": (141, 989, 67, 4.8, 450),
    "b200": (180, 2250, 75, 7.7, 900),
    "l4": (24, 121, 30.3, 0.3, 32),
    "l40s": (48, 362, 91.6, 0.864, 32),
    "a10": (24, 125, 31.2, 0.6, 32),
    "rtx-3090": (24, 71, 35.6, 0.936, 32),
    "rtx-4090": (24, 165, 82.6, 1.008, 32),
    "rtx-5090": (32, 209, 104.8, 1.792, 64),
    "rtx-a6000": (48, 155, 38.7, 0.768, 32),
}
GPUS = {
    name: Gpu(
        memory=memory * 1e9,
        tensor_flops=tensor * 1e12,
        flops=flops * 1e12,
        memory_bandwidth=bandwidth * 1e12,
        link=link * 1e9,
    )
    for name, (memory, tensor, flops, bandwidth, link) in _RATES.items()
}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs of one kind in nodes of equal size.

    network: bytes per second between nodes, per GPU and direction.
    latency: seconds per round of a collective.
    message: seconds per peer of an all-to-all.
    utilisation: the share of a GPU's peak that matmuls reach.
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
        here = self._members_per_node(collective, mesh)
        start = self.latency * math.ceil(math.log2(size))
        if collective.kind == "all_to_all":
            outside = collective.sent * (size - here) / max(size - 1, 1)
            inside = collective.sent - outside
            transfer = max(outside / self.network, inside / self.gpu.link)
            return start + self.message * size + transfer
        bandwidth = self.gpu.link if here == size else min(self.gpu.link, self.network * here)
        return start + collective.sent / bandwidth

    def _members_per_node(self, collective: Collective, mesh: MeshConfig) -> int:
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
    """Return the GPU of that name; ConfigError suggests a similar name."""
    if name not in GPUS:
        raise ConfigError(f"There is no GPU {name!r} in the table.{nearest(name, GPUS)}")
    return GPUS[name]
