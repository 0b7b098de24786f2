"""What a step takes in a layout, worked out instead of run: peak memory, and all that is sent.

The parts that processes hold, and what blocks take, come from planning/profile.py; here FSDP's
gathering and reducing is laid over them, layer by layer, as it goes through a step:

    forward   gather a block's weights, twice for a moment: as they arrive, and in place; free them
    backward  gather again, the next block's ahead; its gradients in float32 on their way; free both
    root      embedding, head, positions and last norms stay gathered from first to last
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
from math import prod

import torch

from switchlm.parallel.mesh import AXES, MeshConfig
from switchlm.planning.profile import (
    STACKS,
    Segment,
    Share,
    layer_like,
    num_layers,
    shapes_of,
    shares,
    trace,
)
from switchlm.planning.recorder import Bytes, Collective
from switchlm.planning.simulate import rows_of_a_share
from switchlm.recipes.config import RunConfig, wire_dtype
from switchlm.training.config import TrainingConfig

FLOAT32 = 4
ADAFACTOR_COPIES = 5  # of a parameter, while it is updated out of place


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a step of one process takes.

    rows: of the batch, in each micro-batch.
    peak: bytes in memory at the fullest moment, of which weights and optimizer are always there.
    traffic: how often each collective is called.
    touched: bytes of activations made, forward and backward.
    moved: bytes of weights that matrix products read.
    updated: parameters that the optimizer updates here.
    """

    rows: int
    peak: Bytes
    traffic: Counter[Collective]
    touched: int
    moved: int
    updated: int


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that are gathered and reduced together; wire: in which dtype."""

    shares: tuple[Share, ...]
    wire: torch.dtype

    @property
    def processes(self) -> int:
        """Over how many processes they are spread."""
        return self.shares[0].processes

    @property
    def managed(self) -> bool:
        """Whether FSDP looks after them: there are other processes with parts or copies."""
        return self.processes > 1 or self.shares[0].copies > 1

    @property
    def held(self) -> int:
        """Bytes of this process's part, in float32."""
        return FLOAT32 * sum(share.held for share in self.shares)

    @property
    def whole(self) -> int:
        """Bytes of gradients in float32 that were not sent yet."""
        return FLOAT32 * sum(prod(share.shape) for share in self.shares)

    @property
    def gathered(self) -> int:
        """Bytes of all of them together as they are gathered."""
        if not self.managed:
            return 0
        return self.wire.itemsize * self.processes * sum(share.held for share in self.shares)

    @property
    def flat(self) -> int:
        """Bytes of the buffer in which they arrive."""
        return self.gathered if self.processes > 1 else 0

    @property
    def reduced(self) -> int:
        """Bytes of their gradients, in float32, on their way."""
        return FLOAT32 * self.processes * sum(share.held for share in self.shares) * self.managed


def footprint(config: RunConfig, mesh: MeshConfig) -> Footprint:
    """Return what a step of the first process takes in that layout; its `data` is given.

    Raises ConfigError where the layout does not fit the model or the batch.
    """
    assert mesh.data is not None
    rows = rows_of_a_share(config.data.batch_size, mesh.replicas * mesh.data * mesh.expert)
    wire = wire_dtype(config) or torch.float32
    groups = groups_of(config, mesh)
    dense_wire = wire if mesh.replicas * mesh.data * mesh.expert > 1 else torch.float32
    expert_wire = wire if mesh.replicas * mesh.data > 1 else torch.float32
    segments = trace(
        config.model,
        config.data,
        rows,
        MeshConfig(data=1, expert=mesh.expert, tensor=mesh.tensor),
        (dense_wire, expert_wire),
        config.training.precision,
        config.training.activation_checkpointing,
    )
    named = {segment.name: segment for segment in segments}
    peak = _Walk(config, groups, named).peak()
    parts = config.training.accumulate
    return Footprint(
        rows=rows,
        peak=peak,
        traffic=_traffic(config, mesh, groups, named),
        touched=parts * sum(named[name].rise * times for name, times in _times(config).items()),
        moved=parts * sum(group.gathered or group.held for group in groups.values()),
        updated=sum(group.held for group in groups.values()) // FLOAT32,
    )


def num_routers(config: RunConfig) -> int:
    """Return how many routers the model has."""
    return sum(name.endswith("router.weight") for name in shapes_of(config.model))


def standing_bytes(config: RunConfig, mesh: MeshConfig) -> int:
    """Return the bytes of weights, gradients and optimizer of a process: what no batch changes."""
    every = list(shares(config.model, mesh, exact_apart=False))
    state = sum(optimizer_bytes(share, config.training) for share in every)
    return state + 2 * FLOAT32 * sum(share.held for share in every)


def groups_of(config: RunConfig, mesh: MeshConfig) -> dict[str, Group]:
    """Return the groups of parameters by name."""
    wire = wire_dtype(config)
    found: dict[str, list[Share]] = defaultdict(list)
    for share in shares(config.model, mesh, exact_apart=wire is not None):
        found[share.group].append(share)
    return {
        name: Group(
            shares=tuple(members),
            wire=torch.float32 if members[0].is_exact or wire is None else wire,
        )
        for name, members in found.items()
    }


def optimizer_bytes(share: Share, config: TrainingConfig) -> int:
    """Return the bytes of the optimizer's state of a parameter in this process."""
    if config.optimizer == "adamw":
        return 2 * FLOAT32 * share.held + FLOAT32
    # Adafactor: see training/adafactor.py.
    if len(share.whole) < 2 or min(share.whole[-2:]) < 128:
        return FLOAT32 * share.held + FLOAT32
    *_, rows, columns = share.shape
    stacks = share.shape[0] if len(share.shape) == 3 else 1
    if share.is_expert:
        stacks = -(-stacks // share.processes)
    else:
        rows = -(-rows // share.processes)
    return FLOAT32 * (stacks * (rows + columns) + 1)


class _Walk:
    """Goes through a step and looks for its fullest moment."""

    def __init__(
        self,
        config: RunConfig,
        groups: dict[str, Group],
        segments: dict[str, Segment],
    ) -> None:
        self.config, self.groups, self.segments = config, groups, segments
        every = [share for group in groups.values() for share in group.shares]
        self.weights = FLOAT32 * sum(share.held for share in every)
        if config.model.router.balance == "bias":
            self.weights += FLOAT32 * config.model.num_experts * num_routers(config)
        self.optimizer = sum(optimizer_bytes(share, config.training) for share in every)
        self.waiting: dict[int, int] = {}
        self.gradients = 0
        self.activations = 0
        self.best = Bytes()

    def peak(self) -> Bytes:
        """Go through all micro-batches, of which the last sends its gradients."""
        parts = self.config.training.accumulate
        if parts > 1:
            self.forward()
            self.backward(sends=False)
        self.forward()
        self.backward(sends=True)
        if self.config.training.optimizer == "adafactor":
            largest = max(share.held for group in self.groups.values() for share in group.shares)
            self.note(ADAFACTOR_COPIES * FLOAT32 * largest, 0)
        return self.best

    def forward(self) -> None:
        root = self.groups["root"]
        self.note(0, root.flat + root.gathered)
        self.step("start", root.gathered + root.flat)
        flat = root.flat
        for stack in STACKS:
            for layer in range(num_layers(self.config.model, stack)):
                blocks = self.of(stack, layer)
                self.note(0, root.gathered + flat + blocks[0].flat)
                flat = blocks[-1].flat
                inside = sum(group.gathered for group in blocks)
                like = layer_like(self.config.model, stack, layer)
                self.step(f"forward {stack} {like}", root.gathered + inside + flat)
            self.step(f"after {stack}", root.gathered)

    def backward(self, sends: bool) -> None:
        root = self.groups["root"]
        sending = 0
        for stack in reversed(STACKS):
            for layer in reversed(range(num_layers(self.config.model, stack))):
                blocks = self.of(stack, layer)
                ahead = self.ahead(stack, layer)
                inside = sum(group.gathered for group in blocks)
                like = layer_like(self.config.model, stack, layer)
                segment = self.segments[f"backward {stack} {like}"]
                self.note(segment.rise, root.gathered + inside + ahead + sending)
                self.activations += segment.change
                largest = max(blocks, key=lambda group: group.reduced)
                sending = largest.reduced if sends else 0
                if self.config.training.accumulate > 1:  # added to those that wait, before
                    self.activations -= segment.gradients
                self.note(largest.held if sends else 0, root.gathered + ahead + sending)
                if self.config.training.accumulate == 1:
                    self.activations -= segment.gradients
                self.settle(blocks, sends)
            self.step(f"end of {stack}", root.gathered + self.ahead(stack, 0) + sending)
        if sends and root.managed:
            # What is left of the activations are the root's gradients.
            self.note(root.held, root.reduced)
        self.activations = 0
        self.settle([root], sends)

    def ahead(self, stack: str, layer: int) -> int:
        """Return the bytes of the weights that are gathered while that block runs backwards."""
        if layer > 0:
            return self.of(stack, layer - 1)[0].flat
        last = self.config.model.num_encoder_layers - 1
        return self.of("encoder", last)[0].flat if stack == "decoder" else 0

    def settle(self, groups: list[Group], sends: bool) -> None:
        """Leave gradients where they stay: whole ones wait for the last micro-batch."""
        for group in groups:
            before = self.waiting.pop(id(group), 0)
            after = group.held
            if not sends:
                self.waiting[id(group)] = after = group.whole
            self.gradients += after - before

    def step(self, name: str, buffers: int) -> None:
        segment = self.segments[name]
        self.note(segment.rise, buffers)
        self.activations += segment.change

    def note(self, rise: int, buffers: int) -> None:
        here = Bytes(
            weights=self.weights,
            optimizer=self.optimizer,
            gradients=self.gradients,
            activations=self.activations + rise,
            buffers=buffers,
        )
        if here.total > self.best.total:
            self.best = here

    def of(self, stack: str, layer: int) -> list[Group]:
        """Return the groups of a block, the block's own first."""
        start = f"{stack}.blocks.{layer}"
        return [
            group
            for name, group in self.groups.items()
            if name == start or name.startswith(f"{start} ")
        ]


def _traffic(
    config: RunConfig, mesh: MeshConfig, groups: dict[str, Group], segments: dict[str, Segment]
) -> Counter[Collective]:
    """Return all collectives of a step and how often each is called."""
    parts = config.training.accumulate
    traffic: Counter[Collective] = Counter()
    axes: tuple[str, ...]
    for name, group in groups.items():
        axes = ("data",) if group.shares[0].is_expert else ("data", "expert")
        if group.processes > 1:
            times = parts * (1 if name == "root" else 2)
            traffic[_collective("all_gather", mesh, axes, group.wire, group.gathered)] += times
            traffic[_collective("reduce_scatter", mesh, axes, torch.float32, group.reduced)] += 1
        if mesh.replicas > 1:
            traffic[_collective("all_reduce", mesh, ("replicas",), torch.float32, group.held)] += 1
    for name, times in _times(config).items():
        for one in segments[name].collectives:
            if one.axes == "tensor" or one.kind == "all_to_all":
                traffic[one] += times * parts
    # What the step itself sums: targets, losses, the gradients' norm and two counts, and loads.
    everyone = ("replicas", "data", "expert")
    sums = [(everyone, torch.int64, 8), (everyone, torch.float32, 12), (AXES, torch.float64, 24)]
    if config.model.router.balance == "bias":
        loads = config.model.num_experts * num_routers(config)
        sums.append((everyone, torch.int64, 8 * loads))
    for axes, dtype, payload in sums:
        one = _collective("all_reduce", mesh, axes, dtype, payload)
        if one.size > 1:
            traffic[one] += 1
    return traffic


def _collective(
    kind: str, mesh: MeshConfig, axes: tuple[str, ...], dtype: torch.dtype, payload: int
) -> Collective:
    sizes = {axis: getattr(mesh, axis) for axis in axes if getattr(mesh, axis) > 1}
    size = prod(sizes.values())
    return Collective(kind=kind, axes="x".join(sizes), size=size, dtype=dtype, payload=payload)


def _times(config: RunConfig) -> Counter[str]:
    """Return how often each of the traced segments comes in a step, by name."""
    times = Counter(["start"])
    for stack in STACKS:
        for layer in range(num_layers(config.model, stack)):
            like = layer_like(config.model, stack, layer)
            times[f"forward {stack} {like}"] += 1
            times[f"backward {stack} {like}"] += 1
        times[f"after {stack}"] += 1
        times[f"end of {stack}"] += 1
    return times
