"""Estimate a training step in a layout without running it: peak memory, and what is sent.

planning/profile.py gives the parameter shards of a process and the memory of blocks; here FSDP's
gathering and reducing is added layer by layer, in the order of a step:

    forward   gather a block's weights (for a moment in two copies: as received, and in place);
              free them
    backward  gather again, prefetching the next block; reduce gradients in float32; free both
    root      embedding, head, positions and last norms stay gathered for the whole step
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch

from switchlm.parallel.mesh import AXES, MeshConfig
from switchlm.planning.profile import (
    STACKS,
    ParameterShard,
    Segment,
    num_layers,
    parameter_shapes,
    parameter_shards,
    trace,
    traced_layer,
)
from switchlm.planning.recorder import Bytes, Collective
from switchlm.planning.simulate import rows_per_process
from switchlm.recipes.config import RunConfig, wire_dtype
from switchlm.training.config import TrainingConfig

FLOAT32 = 4
ADAFACTOR_COPIES = 5  # of a parameter, while it is updated out of place


@dataclass(frozen=True, kw_only=True)
class StepEstimate:
    """Estimated memory and traffic of a step of one process.

    rows: of the batch, in each micro-batch.
    peak: bytes in memory at the peak; weights and optimizer are always there.
    traffic: number of calls of each collective.
    activation_bytes: of all activations made, forward and backward.
    weight_bytes: of weights that matrix products read.
    num_updated: parameters that the optimizer updates here.
    """

    rows: int
    peak: Bytes
    traffic: Counter[Collective]
    activation_bytes: int
    weight_bytes: int
    num_updated: int


@dataclass(frozen=True, kw_only=True)
class FsdpGroup:
    """Parameters that are gathered and reduced together; all sizes are in bytes.

    wire: dtype in which they are gathered.
    """

    shards: tuple[ParameterShard, ...]
    wire: torch.dtype

    @property
    def processes(self) -> int:
        """Number of processes that the parameters are sharded over."""
        return self.shards[0].processes

    @property
    def uses_fsdp(self) -> bool:
        """Whether other processes have shards or replicas."""
        return self.processes > 1 or self.shards[0].replicas > 1

    @property
    def shard(self) -> int:
        """This process's shard, in float32."""
        return FLOAT32 * sum(shard.numel for shard in self.shards)

    @property
    def full_gradients(self) -> int:
        """Gradients in float32 before they are reduced."""
        return FLOAT32 * sum(prod(shard.shape) for shard in self.shards)

    @property
    def gathered(self) -> int:
        """All parameters, gathered; 0 without FSDP."""
        return self.wire.itemsize * self.processes * self.shard // FLOAT32 * self.uses_fsdp

    @property
    def all_gather(self) -> int:
        """The buffer that an all-gather writes to."""
        return self.gathered if self.processes > 1 else 0

    @property
    def reduce(self) -> int:
        """The buffer of gradients, in float32, that is reduced."""
        return self.processes * self.shard * self.uses_fsdp


def estimate_step(config: RunConfig, mesh: MeshConfig) -> StepEstimate:
    """Return the estimate for the first process of a mesh, whose `data` is given.

    Raises ConfigError where the layout does not fit the model or the batch.
    """
    assert mesh.data is not None
    rows = rows_per_process(config.data.batch_size, mesh.replicas * mesh.data * mesh.expert)
    wire = wire_dtype(config) or torch.float32
    groups = fsdp_groups(config, mesh)
    dense_wire = wire if mesh.replicas * mesh.data * mesh.expert > 1 else torch.float32
    expert_wire = wire if mesh.replicas * mesh.data > 1 else torch.float32
    traced = trace(
        config.model,
        config.data,
        rows,
        MeshConfig(data=1, expert=mesh.expert, tensor=mesh.tensor),
        (dense_wire, expert_wire),
        config.training.precision,
        config.training.activation_checkpointing,
    )
    segments = {segment.name: segment for segment in traced}
    parts = config.training.accumulate
    activations = sum(segments[name].rise for name in _segments_of_step(config))
    return StepEstimate(
        rows=rows,
        peak=_PeakMemory(config, groups, segments).peak(),
        traffic=_traffic(config, mesh, groups, segments),
        activation_bytes=parts * activations,
        weight_bytes=parts * sum(group.gathered or group.shard for group in groups.values()),
        num_updated=sum(group.shard for group in groups.values()) // FLOAT32,
    )


def num_routers(config: RunConfig) -> int:
    """Return how many routers the model has."""
    return sum(name.endswith("router.weight") for name in parameter_shapes(config.model))


def model_state_bytes(config: RunConfig, mesh: MeshConfig) -> int:
    """Return the bytes of weights, gradients and optimizer state of a process."""
    shards = list(parameter_shards(config.model, mesh, separate_exact=False))
    optimizer = sum(optimizer_bytes(shard, config.training) for shard in shards)
    return optimizer + 2 * FLOAT32 * sum(shard.numel for shard in shards)


def fsdp_groups(config: RunConfig, mesh: MeshConfig) -> dict[str, FsdpGroup]:
    """Return the groups of parameters by name."""
    wire = wire_dtype(config)
    found: dict[str, list[ParameterShard]] = defaultdict(list)
    for shard in parameter_shards(config.model, mesh, separate_exact=wire is not None):
        found[shard.group].append(shard)
    return {
        name: FsdpGroup(
            shards=tuple(shards),
            wire=torch.float32 if shards[0].is_exact or wire is None else wire,
        )
        for name, shards in found.items()
    }


def optimizer_bytes(shard: ParameterShard, config: TrainingConfig) -> int:
    """Return the bytes of the optimizer's state of a parameter in this process."""
    if config.optimizer == "adamw":
        return 2 * FLOAT32 * shard.numel + FLOAT32
    # Adafactor: see training/adafactor.py.
    if len(shard.full_shape) < 2 or min(shard.full_shape[-2:]) < 128:
        return FLOAT32 * shard.numel + FLOAT32
    *_, rows, columns = shard.shape
    stacks = shard.shape[0] if len(shard.shape) == 3 else 1
    if shard.is_expert:
        stacks = -(-stacks // shard.processes)
    else:
        rows = -(-rows // shard.processes)
    return FLOAT32 * (stacks * (rows + columns) + 1)


class _PeakMemory:
    """Goes through a step and keeps the highest sum of all memory."""

    def __init__(
        self,
        config: RunConfig,
        groups: dict[str, FsdpGroup],
        segments: dict[str, Segment],
    ) -> None:
        self.config, self.groups, self.segments = config, groups, segments
        self.root = groups["root"]
        shards = [shard for group in groups.values() for shard in group.shards]
        self.weights = FLOAT32 * sum(shard.numel for shard in shards)
        if config.model.router.balance == "bias":
            self.weights += FLOAT32 * config.model.num_experts * num_routers(config)
        self.optimizer = sum(optimizer_bytes(shard, config.training) for shard in shards)
        self.largest = FLOAT32 * max(shard.numel for shard in shards)
        self.unreduced: dict[int, int] = {}
        self.gradients = 0
        self.activations = 0
        self.highest = Bytes()

    def peak(self) -> Bytes:
        """Go through all micro-batches; the last one reduces the gradients."""
        if self.config.training.accumulate > 1:
            self.forward()
            self.backward(reduces=False)
        self.forward()
        self.backward(reduces=True)
        if self.config.training.optimizer == "adafactor":
            self.record(ADAFACTOR_COPIES * self.largest, 0)
        return self.highest

    def forward(self) -> None:
        root = self.root
        self.record(0, root.all_gather + root.gathered)
        self.run_segment("start", root.gathered + root.all_gather)
        received = root.all_gather
        for stack in STACKS:
            for layer in range(num_layers(self.config.model, stack)):
                blocks = self.block_groups(stack, layer)
                self.record(0, root.gathered + received + blocks[0].all_gather)
                received = blocks[-1].all_gather
                gathered = root.gathered + sum(group.gathered for group in blocks)
                traced = traced_layer(self.config.model, stack, layer)
                self.run_segment(f"forward {stack} {traced}", gathered + received)
            self.run_segment(f"after {stack}", root.gathered)

    def backward(self, reduces: bool) -> None:
        root = self.root
        reducing = 0
        for stack in reversed(STACKS):
            for layer in reversed(range(num_layers(self.config.model, stack))):
                blocks = self.block_groups(stack, layer)
                kept = root.gathered + self.prefetched(stack, layer)
                gathered = sum(group.gathered for group in blocks)
                traced = traced_layer(self.config.model, stack, layer)
                segment = self.segments[f"backward {stack} {traced}"]
                self.record(segment.rise, kept + gathered + reducing)
                self.activations += segment.change
                largest = max(blocks, key=lambda group: group.reduce)
                reducing = largest.reduce if reduces else 0
                if self.config.training.accumulate > 1:  # already added to the unreduced ones
                    self.activations -= segment.gradients
                self.record(largest.shard if reduces else 0, kept + reducing)
                if self.config.training.accumulate == 1:
                    self.activations -= segment.gradients
                self.keep_gradients(blocks, reduces)
            buffers = root.gathered + self.prefetched(stack, 0) + reducing
            self.run_segment(f"end of {stack}", buffers)
        if reduces and root.uses_fsdp:
            # Of the activations only the root's gradients remain.
            self.record(root.shard, root.reduce)
        self.activations = 0
        self.keep_gradients([root], reduces)

    def prefetched(self, stack: str, layer: int) -> int:
        """Return the bytes of weights that are gathered during the backward pass of a block."""
        if layer > 0:
            return self.block_groups(stack, layer - 1)[0].all_gather
        last = self.config.model.num_encoder_layers - 1
        return self.block_groups("encoder", last)[0].all_gather if stack == "decoder" else 0

    def keep_gradients(self, groups: list[FsdpGroup], reduces: bool) -> None:
        """Count gradients: full ones until the last micro-batch, then this process's shards."""
        for group in groups:
            before = self.unreduced.pop(id(group), 0)
            after = group.shard
            if not reduces:
                self.unreduced[id(group)] = after = group.full_gradients
            self.gradients += after - before

    def run_segment(self, name: str, buffers: int) -> None:
        segment = self.segments[name]
        self.record(segment.rise, buffers)
        self.activations += segment.change

    def record(self, rise: int, buffers: int) -> None:
        now = Bytes(
            weights=self.weights,
            optimizer=self.optimizer,
            gradients=self.gradients,
            activations=self.activations + rise,
            buffers=buffers,
        )
        if now.total > self.highest.total:
            self.highest = now

    def block_groups(self, stack: str, layer: int) -> list[FsdpGroup]:
        """Return the groups of a block, the block's own first."""
        start = f"{stack}.blocks.{layer}"
        return [
            group
            for name, group in self.groups.items()
            if name == start or name.startswith(f"{start} ")
        ]


def _traffic(
    config: RunConfig, mesh: MeshConfig, groups: dict[str, FsdpGroup], segments: dict[str, Segment]
) -> Counter[Collective]:
    """Return the number of calls of each collective in a step."""
    parts = config.training.accumulate
    traffic: Counter[Collective] = Counter()

    def add(
        kind: str, axes: tuple[str, ...], dtype: torch.dtype, payload: int, times: int = 1
    ) -> None:
        sizes = {axis: getattr(mesh, axis) for axis in axes if getattr(mesh, axis) > 1}
        if sizes:
            one = Collective(
                kind=kind,
                axes="x".join(sizes),
                size=prod(sizes.values()),
                dtype=dtype,
                payload=payload,
            )
            traffic[one] += times

    for name, group in groups.items():
        axes = ("data",) if group.shards[0].is_expert else ("data", "expert")
        add("all_gather", axes, group.wire, group.gathered, parts * (1 if name == "root" else 2))
        add("reduce_scatter", axes, torch.float32, group.reduce)
        add("all_reduce", ("replicas",), torch.float32, group.shard)
    for name in _segments_of_step(config):
        for one in segments[name].collectives:
            if one.axes == "tensor" or one.kind == "all_to_all":
                traffic[one] += parts
    # Sums of the step itself: targets, losses, the norm and two counts (in digits), and loads.
    batch_axes = ("replicas", "data", "expert")
    add("all_reduce", batch_axes, torch.int64, 8)
    add("all_reduce", batch_axes, torch.float32, 12)
    add("all_reduce", AXES, torch.float32, 20)
    if config.model.router.balance == "bias":
        loads = config.model.num_experts * num_routers(config)
        add("all_reduce", batch_axes, torch.int64, 8 * loads)
    return traffic


def _segments_of_step(config: RunConfig) -> Iterator[str]:
    """Yield the names of the traced segments that a step consists of."""
    yield "start"
    for stack in STACKS:
        for layer in range(num_layers(config.model, stack)):
            traced = traced_layer(config.model, stack, layer)
            yield f"forward {stack} {traced}"
            yield f"backward {stack} {traced}"
        yield f"after {stack}"
        yield f"end of {stack}"
