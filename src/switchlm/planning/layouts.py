"""Given a model, a batch and a cluster: every layout that fits, and the estimated time of a step.

This is the paper's open question 3 of section 8, answered without running anything: memory and
traffic are those of the real code (estimate.py), times are estimated from them:

    compute     matrix products at `utilisation` of the peak, or memory traffic if that takes longer
    gathering   weights and gradients; overlaps with compute
    all-to-all, tensor   tokens to experts, sums over the tensor axis; no overlap
    optimizer   bound by memory bandwidth

Memory traffic counts weights three times (forward, and both matmuls backward), activations three
times (written, read, and read again), and 28 bytes per parameter for AdamW, 40 for Adafactor.

The rates of GPUs are those of the makers' data sheets: dense matmuls, SXM modules; everything may
be overridden. The model of a collective is simple on purpose:

    ring of n (all-reduce, all-gather, reduce-scatter)   sent / bandwidth + latency * log2(n)
    all-to-all                                           as above, and a message to every peer

A ring over nodes uses as many network ports of a node as it has members there; of an all-to-all
only what leaves the node uses the port of each GPU.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from switchlm.errors import ConfigError, nearest
from switchlm.model import count
from switchlm.parallel.mesh import AXES, MeshConfig, layouts
from switchlm.planning.estimate import StepEstimate, estimate_step, model_state_bytes
from switchlm.planning.recorder import Collective
from switchlm.planning.simulate import row_lengths, rows_per_process
from switchlm.recipes.config import RunConfig

PASSES = 3
BYTES_PER_PARAMETER = {"adamw": 28, "adafactor": 40}
TOLERANCE = 0.1
DOUBLINGS = tuple(2**power for power in range(3, 12))


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


@dataclass(frozen=True, kw_only=True)
class Times:
    """Estimated seconds of a step by cause; gathering overlaps with compute."""

    compute: float
    gathering: float
    all_to_all: float
    tensor: float
    optimizer: float

    @property
    def step(self) -> float:
        """Seconds of the whole step."""
        busy = max(self.compute, self.gathering)
        return busy + self.all_to_all + self.tensor + self.optimizer

    @property
    def parts(self) -> dict[str, float]:
        """The seconds by cause, named for messages; their sum is `step`."""
        exposed = max(self.gathering - self.compute, 0.0)
        return {
            "compute": self.compute,
            "gathering weights and gradients": exposed,
            "the all-to-all of tokens": self.all_to_all,
            "sums over the tensor axis": self.tensor,
            "the optimizer": self.optimizer,
        }


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One layout that fits.

    estimate: memory and traffic of a step of one process.
    flops: per GPU and step.
    tokens_per_second: of the whole cluster.
    """

    mesh: MeshConfig
    estimate: StepEstimate
    flops: float
    times: Times
    tokens_per_second: float


@dataclass(frozen=True, kw_only=True)
class Misfit:
    """A layout that does not fit: each GPU lacks `missing` bytes of memory."""

    mesh: MeshConfig
    missing: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The layouts of a model on a cluster.

    layouts: those that fit, the fastest first.
    misfits: those that do not fit, the one that lacks least memory first.
    impossible: number of meshes that the model or the batch cannot be split over.
    reason: what bounds the best layout, or why none fits.
    """

    layouts: tuple[Layout, ...]
    misfits: tuple[Misfit, ...]
    impossible: int
    reason: str


def plan(config: RunConfig, cluster: Cluster, meshes: Iterable[MeshConfig] | None = None) -> Plan:
    """Estimate every mesh of all GPUs, or those given, for data.batch_size rows.

    `config.mesh` is ignored.
    """
    found: list[Layout] = []
    misfits: list[Misfit] = []
    impossible = 0
    for mesh in candidates(cluster) if meshes is None else meshes:
        try:
            rows_per_process(config.data.batch_size, mesh.replicas * (mesh.data or 1) * mesh.expert)
            needed = model_state_bytes(config, mesh)
            if needed <= cluster.memory:
                estimate = estimate_step(config, mesh)
                needed = estimate.peak.total
        except ConfigError:
            impossible += 1
            continue
        if needed > cluster.memory:
            misfits.append(Misfit(mesh=mesh, missing=needed - cluster.memory))
        else:
            found.append(estimate_layout(config, cluster, mesh, estimate))
    found.sort(key=lambda layout: (layout.times.step, layout.estimate.peak.total))
    misfits.sort(key=lambda misfit: misfit.missing)
    return Plan(
        layouts=tuple(found),
        misfits=tuple(misfits),
        impossible=impossible,
        reason=explain(config, cluster, found, misfits),
    )


def candidates(cluster: Cluster) -> Iterator[MeshConfig]:
    """Return every mesh of all GPUs whose tensor axis stays within a node."""
    meshes = layouts(cluster.num_gpus)
    return (mesh for mesh in meshes if cluster.gpus_per_node % mesh.tensor == 0)


def estimate_layout(
    config: RunConfig, cluster: Cluster, mesh: MeshConfig, estimate: StepEstimate
) -> Layout:
    """Estimate the time of a step of a layout that fits."""
    training = config.training
    inputs, targets, _ = row_lengths(config.data)
    tokens = estimate.rows * (inputs + targets) * training.accumulate
    again = 1 if training.activation_checkpointing else 0
    forward = tokens * count.flops_per_token(config.model, inputs, targets) / mesh.tensor
    flops = forward * (3 + again)
    gpu = cluster.gpu
    speed = gpu.flops if training.precision == "float32" else gpu.tensor_flops
    touched = PASSES * estimate.activation_bytes + (PASSES + again) * estimate.weight_bytes
    kinds: defaultdict[str, float] = defaultdict(float)
    for one, calls in estimate.traffic.items():
        kind = "tensor" if one.axes == "tensor" else one.kind
        kinds[kind] += calls * cluster.seconds(one, mesh)
    times = Times(
        compute=max(flops / (speed * cluster.utilisation), touched / gpu.memory_bandwidth),
        gathering=kinds["all_gather"] + kinds["reduce_scatter"] + kinds["all_reduce"],
        all_to_all=kinds["all_to_all"],
        tensor=kinds["tensor"],
        optimizer=estimate.num_updated
        * BYTES_PER_PARAMETER[training.optimizer]
        / gpu.memory_bandwidth,
    )
    shares = mesh.replicas * (mesh.data or 1) * mesh.expert
    return Layout(
        mesh=mesh,
        estimate=estimate,
        flops=flops,
        times=times,
        tokens_per_second=tokens * shares / times.step,
    )


def describe_mesh(mesh: MeshConfig) -> str:
    """Return a mesh as text, without axes of size 1."""
    sizes = {axis: getattr(mesh, axis) for axis in AXES}
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one GPU"


def explain(config: RunConfig, cluster: Cluster, found: list[Layout], misfits: list[Misfit]) -> str:
    """Return what bounds the best layout and why the next one is slower, or why none fits."""
    if not found:
        return _shortage(config, cluster, misfits)
    best = found[0]
    parts = best.times.parts
    bound = max(parts, key=lambda name: parts[name])
    text = (
        f"{describe_mesh(best.mesh)} is bound by {bound}: {parts[bound] / best.times.step:.0%} of "
        f"a step of {best.times.step:.3g} s"
    )
    others = [other for other in found[1:] if other.times.step > best.times.step * 1.001]
    if not others:
        return f"{text}; no other layout is slower."
    lost = others[0].times.parts
    worst = max(parts, key=lambda name: lost[name] - parts[name])
    return (
        f"{text}; the next, {describe_mesh(others[0].mesh)}, takes "
        f"{others[0].times.step / best.times.step - 1:.1%} longer, by "
        f"{1e3 * (lost[worst] - parts[worst]):.3g} ms more of {worst}."
    )


def _shortage(config: RunConfig, cluster: Cluster, misfits: list[Misfit]) -> str:
    if not misfits:
        return (
            f"No mesh of {cluster.num_gpus} GPUs fits the model and data.batch_size "
            f"{config.data.batch_size}: experts, heads and rows must be shared out evenly. Choose "
            "a batch that is a multiple of the number of GPUs."
        )
    closest = misfits[0]
    text = (
        f"Nothing fits: {describe_mesh(closest.mesh)} comes nearest, and lacks "
        f"{closest.missing / 1e9:.3g} GB of {cluster.memory / 1e9:.3g} GB per GPU."
    )
    advice = ["more GPUs"]
    if not config.training.activation_checkpointing:
        advice.append("training.activation_checkpointing=true")
    if config.training.optimizer == "adamw":
        advice.append("training.optimizer=adafactor")
    if config.training.precision == "float32":
        advice.append("training.precision=selective")
    return f"{text} Less memory takes: {', '.join(advice)}, or a smaller data.batch_size."


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A number of experts.

    best: its fastest layout, None if none fits.
    reason: as in Plan.
    chosen: whether `design` recommends it.
    """

    num_experts: int
    parameters: int
    best: Layout | None
    reason: str
    chosen: bool = False


def design(
    config: RunConfig, cluster: Cluster, *, experts: Sequence[int] = DOUBLINGS
) -> list[Choice]:
    """Plan the shape of `config.model` with each number of experts, and choose one.

    Quality rises with every doubling at equal FLOPs per token (section 3.1), so it is the largest
    number whose step takes at most `TOLERANCE` longer than the shortest of all.
    """
    choices = []
    for number in experts:
        model = dataclasses.replace(config.model, num_experts=number)
        found = plan(dataclasses.replace(config, model=model), cluster)
        choice = Choice(
            num_experts=number,
            parameters=count.parameters(model),
            best=found.layouts[0] if found.layouts else None,
            reason=found.reason,
        )
        choices.append(choice)
    steps = [choice.best.times.step for choice in choices if choice.best is not None]
    if not steps:
        return choices
    fast = [
        choice
        for choice in choices
        if choice.best is not None and choice.best.times.step <= min(steps) * (1 + TOLERANCE)
    ]
    most = max(fast, key=lambda choice: choice.num_experts)
    return [dataclasses.replace(choice, chosen=choice is most) for choice in choices]
