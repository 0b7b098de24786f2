"""Given a model, a batch and a cluster: every layout that fits, and the estimated time of a step.

This is the paper's open question 3 of section 8, answered without running anything: memory and
traffic are those of the real code (estimate.py), times are estimated from them:

    compute     matrix products at `utilisation` of the peak, or memory traffic if that takes longer
    gathering   weights and gradients; overlaps with compute
    all-to-all, tensor   tokens to experts, sums over the tensor axis; no overlap
    optimizer   bound by memory bandwidth

Memory traffic counts weights three times (forward, and both matmuls backward), activations three
times (written, read, and read again), and 28 bytes per parameter for AdamW, 40 for Adafactor.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from switchlm.errors import ConfigError
from switchlm.model import count
from switchlm.parallel.mesh import AXES, MeshConfig, layouts
from switchlm.planning.cluster import Cluster
from switchlm.planning.estimate import StepEstimate, estimate_step, model_state_bytes
from switchlm.planning.simulate import row_lengths, rows_per_process
from switchlm.recipes.config import RunConfig

PASSES = 3
BYTES_PER_PARAMETER = {"adamw": 28, "adafactor": 40}
TOLERANCE = 0.1
DOUBLINGS = tuple(2**power for power in range(3, 12))


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
    """A layout that does not fit: each GPU lacks `missing` bytes of memory, or more.

    state_fits: whether parameters, gradients and optimizer state would fit without a batch; if not,
        `missing` is of them alone.
    """

    mesh: MeshConfig
    missing: float
    state_fits: bool = True


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The layouts of a model on a cluster.

    layouts: those that fit, the fastest first.
    misfits: those that do not fit: first those whose state does, by the memory that they lack.
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
            estimate = estimate_memory(config, cluster, mesh)
        except ConfigError:
            impossible += 1
            continue
        if isinstance(estimate, Misfit):
            misfits.append(estimate)
        else:
            found.append(estimate_layout(config, cluster, mesh, estimate))
    found.sort(key=lambda layout: (layout.times.step, layout.estimate.peak.total))
    misfits.sort(key=lambda misfit: (not misfit.state_fits, misfit.missing))
    return Plan(
        layouts=tuple(found),
        misfits=tuple(misfits),
        impossible=impossible,
        reason=explain(config, cluster, found, misfits),
    )


def estimate_memory(config: RunConfig, cluster: Cluster, mesh: MeshConfig) -> StepEstimate | Misfit:
    """Return the estimate of a step in a layout, or by how much its memory is exceeded.

    Raises ConfigError if the model or the batch cannot be split over the mesh.
    """
    rows_per_process(config.data.batch_size, mesh.replicas * (mesh.data or 1) * mesh.expert)
    state = model_state_bytes(config, mesh)
    if state > cluster.memory:
        return Misfit(mesh=mesh, missing=state - cluster.memory, state_fits=False)
    estimate = estimate_step(config, mesh)
    if estimate.peak.total > cluster.memory:
        return Misfit(mesh=mesh, missing=estimate.peak.total - cluster.memory)
    return estimate


def largest_batch(config: RunConfig, cluster: Cluster, misfits: Sequence[Misfit]) -> int | None:
    """Return the most rows that fit in one of the layouts; None if a row per process does not.

    data.batch_size is halved until a step fits.
    """
    meshes = [misfit.mesh for misfit in misfits if misfit.state_fits]
    rows = config.data.batch_size
    while meshes and rows > 1:
        rows //= 2
        data = dataclasses.replace(config.data, batch_size=rows)
        smaller = dataclasses.replace(config, data=data)
        possible = []
        for mesh in meshes:
            try:
                estimate = estimate_memory(smaller, cluster, mesh)
            except ConfigError:
                continue
            if isinstance(estimate, StepEstimate):
                return rows
            possible.append(mesh)
        meshes = possible
    return None


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
    rows = largest_batch(config, cluster, misfits)
    if rows is not None:
        tokens = rows * config.data.input_length
        text += f" A batch of {rows:,} rows (--batch-tokens {tokens}) fits."
    elif any(misfit.state_fits for misfit in misfits):
        text += " Even one row per process does not fit."
    else:
        text += " Weights and optimizer alone do not fit, whatever the batch."
    advice = ["more GPUs"]
    if not config.training.activation_checkpointing:
        advice.append("training.activation_checkpointing=true")
    if config.training.optimizer == "adamw":
        advice.append("training.optimizer=adafactor")
    if config.training.precision == "float32":
        advice.append("training.precision=selective")
    return f"{text} Memory is saved by {', '.join(advice)}."


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
