"""Given a model, a batch and a cluster: every layout that fits, how long a step takes, and why.

It answers what the paper leaves open (section 8, question 3), as far as one can without running:
memory and traffic are those of the real code (estimate.py), times are estimates from them:

    compute     matrix products at `utilisation` of the peak, or memory traffic if that takes longer
    gathering   weights and gradients; hidden behind compute as far as that lasts
    all-to-all, tensor   tokens to experts, sums over the tensor axis; nothing hides them
    optimizer   bound by memory

Memory traffic counts weights three times (forward, and both products backward), activations three
times (written, read, and read again), and 28 bytes per parameter for AdamW, 40 for Adafactor.

Quality rises with every doubling of the experts at equal FLOPs per token (section 3.1), so the best
model for a cluster is the one with the most experts whose step is hardly longer than the shortest.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from switchlm.errors import ConfigError
from switchlm.model import count
from switchlm.parallel.mesh import MeshConfig, layouts
from switchlm.planning.estimate import Footprint, footprint, standing_bytes
from switchlm.planning.hardware import Cluster
from switchlm.planning.recorder import Bytes, Collective
from switchlm.planning.simulate import row_lengths, rows_of_a_share
from switchlm.recipes.config import RunConfig

PASSES = 3
BYTES_A_PARAMETER = {"adamw": 28, "adafactor": 40}


@dataclass(frozen=True, kw_only=True)
class Times:
    """Estimated seconds of a step by what takes them; gathering is hidden behind compute."""

    compute: float
    gathering: float
    all_to_all: float
    tensor: float
    optimizer: float

    @property
    def step(self) -> float:
        """All of the step."""
        busy = max(self.compute, self.gathering)
        return busy + self.all_to_all + self.tensor + self.optimizer

    @property
    def parts(self) -> dict[str, float]:
        """What the step consists of, in words; they sum up to it."""
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

    flops: a GPU and step.
    tokens_per_second: of the whole cluster.
    """

    mesh: MeshConfig
    rows: int
    peak: Bytes
    traffic: Counter[Collective]
    flops: float
    times: Times
    tokens_per_second: float


@dataclass(frozen=True, kw_only=True)
class Misfit:
    """A layout that needs more memory than there is: `missing` bytes more a GPU."""

    mesh: MeshConfig
    missing: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """layouts: those that fit, the fastest first.
    misfits: those that do not, the nearest first.

    impossible: how many meshes the model or the batch cannot be split over.
    reason: a sentence.
    """

    layouts: tuple[Layout, ...]
    misfits: tuple[Misfit, ...]
    impossible: int
    reason: str


def plan(config: RunConfig, cluster: Cluster, meshes: Iterable[MeshConfig] | None = None) -> Plan:
    """Judge every mesh of all GPUs, or those given, for data.batch_size rows.

    `config.mesh` is not read.
    """
    found: list[Layout] = []
    misfits: list[Misfit] = []
    impossible = 0
    for mesh in candidates(cluster) if meshes is None else meshes:
        try:
            rows_of_a_share(config.data.batch_size, mesh.replicas * (mesh.data or 1) * mesh.expert)
            standing = standing_bytes(config, mesh)
            if standing > cluster.memory:
                misfits.append(Misfit(mesh=mesh, missing=standing - cluster.memory))
                continue
            took = footprint(config, mesh)
        except ConfigError:
            impossible += 1
            continue
        if took.peak.total > cluster.memory:
            misfits.append(Misfit(mesh=mesh, missing=took.peak.total - cluster.memory))
        else:
            found.append(judge(config, cluster, mesh, took))
    found.sort(key=lambda layout: (layout.times.step, layout.peak.total))
    misfits.sort(key=lambda misfit: misfit.missing)
    return Plan(
        layouts=tuple(found),
        misfits=tuple(misfits),
        impossible=impossible,
        reason=reason(config, cluster, found, misfits),
    )


def candidates(cluster: Cluster) -> Iterator[MeshConfig]:
    """Yield every mesh of all GPUs whose tensor axis stays within a node."""
    for mesh in layouts(cluster.num_gpus):
        if cluster.gpus_per_node % mesh.tensor == 0:
            yield mesh


def judge(config: RunConfig, cluster: Cluster, mesh: MeshConfig, took: Footprint) -> Layout:
    """Estimate the time of a step of a layout that fits."""
    training = config.training
    inputs, targets, _ = row_lengths(config.data)
    tokens = took.rows * (inputs + targets) * training.accumulate
    again = 1 if training.activation_checkpointing else 0
    forward = tokens * count.flops_per_token(config.model, inputs, targets) / mesh.tensor
    flops = forward * (3 + again)
    gpu = cluster.gpu
    speed = gpu.flops if training.precision == "float32" else gpu.tensor_flops
    touched = PASSES * took.touched + (PASSES + again) * took.moved
    kinds: defaultdict[str, float] = defaultdict(float)
    for one, calls in took.traffic.items():
        kind = "tensor" if one.axes == "tensor" else one.kind
        kinds[kind] += calls * cluster.seconds(one, mesh)
    times = Times(
        compute=max(flops / (speed * cluster.utilisation), touched / gpu.memory_bandwidth),
        gathering=kinds["all_gather"] + kinds["reduce_scatter"] + kinds["all_reduce"],
        all_to_all=kinds["all_to_all"],
        tensor=kinds["tensor"],
        optimizer=took.updated * BYTES_A_PARAMETER[training.optimizer] / gpu.memory_bandwidth,
    )
    shares = mesh.replicas * (mesh.data or 1) * mesh.expert
    return Layout(
        mesh=mesh,
        rows=took.rows,
        peak=took.peak,
        traffic=took.traffic,
        flops=flops,
        times=times,
        tokens_per_second=tokens * shares / times.step,
    )


def words(mesh: MeshConfig) -> str:
    """Return a mesh in words, axes of length 1 left out."""
    sizes = {name: getattr(mesh, name) for name in ("replicas", "data", "expert", "tensor")}
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one GPU"


def reason(config: RunConfig, cluster: Cluster, found: list[Layout], misfits: list[Misfit]) -> str:
    """Say what bounds the best layout and what the next one loses, or what is short."""
    if not found:
        return _shortage(config, cluster, misfits)
    best = found[0]
    parts = best.times.parts
    bound = max(parts, key=lambda name: parts[name])
    text = (
        f"{words(best.mesh)} is bound by {bound}: {parts[bound] / best.times.step:.0%} of a step "
        f"of {best.times.step:.3g} s"
    )
    others = [other for other in found[1:] if other.times.step > best.times.step * 1.001]
    if not others:
        return f"{text}; no other layout is slower."
    lost = others[0].times.parts
    worst = max(parts, key=lambda name: lost[name] - parts[name])
    return (
        f"{text}; the next, {words(others[0].mesh)}, takes "
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
    nearest = misfits[0]
    text = (
        f"Nothing fits: {words(nearest.mesh)} comes nearest, and lacks "
        f"{nearest.missing / 1e9:.3g} GB of {cluster.memory / 1e9:.3g} GB per GPU."
    )
    advice = ["more GPUs"]
    if not config.training.activation_checkpointing:
        advice.append("training.activation_checkpointing=true")
    if config.training.optimizer == "adamw":
        advice.append("training.optimizer=adafactor")
    if config.training.precision == "float32":
        advice.append("training.precision=selective")
    return f"{text} Less memory takes: {', '.join(advice)}, or a smaller data.batch_size."


DOUBLINGS = tuple(2**power for power in range(3, 12))


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A number of experts.

    best: its fastest layout, None if nothing fits; then `reason` says why.

    chosen: whether it is the one to take.
    """

    num_experts: int
    parameters: int
    best: Layout | None
    reason: str
    chosen: bool = False


def design(
    config: RunConfig,
    cluster: Cluster,
    *,
    experts: Sequence[int] = DOUBLINGS,
    tolerance: float = 0.1,
) -> list[Choice]:
    """Plan the shape of `config.model` with each number of experts, and choose one.

    tolerance: how much longer than the shortest step of all the chosen one's may be.
    """
    choices = list(_choices(config, cluster, experts))
    steps = [choice.best.times.step for choice in choices if choice.best is not None]
    if not steps:
        return choices
    fast = [
        choice
        for choice in choices
        if choice.best is not None and choice.best.times.step <= min(steps) * (1 + tolerance)
    ]
    most = max(fast, key=lambda choice: choice.num_experts)
    return [dataclasses.replace(choice, chosen=choice is most) for choice in choices]


def _choices(config: RunConfig, cluster: Cluster, experts: Sequence[int]) -> Iterator[Choice]:
    for number in experts:
        model = dataclasses.replace(config.model, num_experts=number)
        found = plan(dataclasses.replace(config, model=model), cluster)
        yield Choice(
            num_experts=number,
            parameters=count.parameters(model),
            best=found.layouts[0] if found.layouts else None,
            reason=found.reason,
        )
