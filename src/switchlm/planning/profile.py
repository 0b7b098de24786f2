"""The shard of each parameter in the first process of a mesh, and the memory of a model's blocks.

Shards follow the rules of `parallel.apply`; a test compares them with `apply` itself. The first
process has the largest ones.

The memory of blocks is traced once with the real code on fake tensors: the forward and backward
pass of a few layers, split over `tensor` and `expert` processes, gathered over all others. Memory
is recorded wherever a block begins or ends, which gives a plan of any number of layers. Weights and
the buffers that gather and reduce them are not included.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from switchlm.data.config import DataConfig
from switchlm.errors import ConfigError
from switchlm.model.config import ModelConfig
from switchlm.model.precision import Precision
from switchlm.model.transformer import Block, SwitchTransformer
from switchlm.parallel.apply import float32_modules, split_tensors
from switchlm.parallel.expert import shard_experts
from switchlm.parallel.mesh import Mesh, MeshConfig
from switchlm.planning.recorder import Bytes, Collective, CollectiveRecorder, MemoryRecorder
from switchlm.planning.simulate import blank_batch, fake_model
from switchlm.training.step import backward, prepare_for_training

STACKS = ("encoder", "decoder")
# The dim of a parameter that the tensor axis splits, by the end of its name; others are not split.
TENSOR_DIMS = {
    "query.weight": 0,
    "key.weight": 0,
    "value.weight": 0,
    "output.weight": 1,
    "feedforward.up.weight": 0,
    "feedforward.gate.weight": 0,
    "feedforward.down.weight": 1,
    "relative_bias.weight": 1,
    "embedding.weight": 0,
    "head.weight": 0,
    "experts.up": 2,
    "experts.gate": 2,
    "experts.down": 1,
}


@dataclass(frozen=True, kw_only=True)
class ParameterShard:
    """The shard of a parameter in one process.

    group: parameters that are gathered together: `root`, `encoder.blocks.3`, `... exact` (routers
        and norms of a block), `... experts` (of each Switch layer).
    full_shape: of the parameter.
    shape: after the split over the tensor and expert axes.
    processes: number of processes that FSDP shards it over.
    replicas: number of replicas that sum its gradient.
    numel: elements of the largest shard; smaller ones are padded when they are sent.
    """

    name: str
    group: str
    full_shape: tuple[int, ...]
    shape: tuple[int, ...]
    processes: int
    replicas: int
    numel: int

    @property
    def is_expert(self) -> bool:
        """Whether it belongs to experts."""
        return self.group.endswith("experts")

    @property
    def is_exact(self) -> bool:
        """Whether it is always gathered in float32."""
        return self.group == "root" or self.group.endswith("exact")


@cache
def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters by name."""
    with torch.device("meta"):
        model = SwitchTransformer(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def parameter_shards(
    config: ModelConfig, mesh: MeshConfig, *, separate_exact: bool
) -> Iterator[ParameterShard]:
    """Yield the shard of each parameter in the first process of a mesh.

    mesh: its `data` must be given.
    separate_exact: whether routers and norms are a group of their own, because the others are
        gathered in another dtype.

    Raises ConfigError where an axis does not divide what it splits.
    """
    assert mesh.data is not None
    _divide("model.num_heads", config.num_heads, mesh.tensor, "tensor")
    for name, full_shape in parameter_shapes(config).items():
        group = _group_name(name, separate_exact)
        expert = group.endswith("experts")
        shape = list(full_shape)
        if expert:
            shape[0] = _divide(name, full_shape[0], mesh.expert, "expert")
        for end, dim in TENSOR_DIMS.items():
            if name.endswith(end):
                shape[dim] = _divide(name, full_shape[dim], mesh.tensor, "tensor")
        processes = mesh.data if expert else mesh.data * mesh.expert
        dim = 0
        if expert and shape[0] % processes and shape[1] % processes == 0:
            dim = 1
        rows = -(-shape[dim] // processes)
        yield ParameterShard(
            name=name,
            group=group,
            full_shape=full_shape,
            shape=tuple(shape),
            processes=processes,
            replicas=mesh.replicas,
            numel=rows * (prod(shape) // shape[dim]),
        )


def _divide(name: str, size: int, parts: int, axis: str) -> int:
    if size % parts:
        raise ConfigError(f"{name}: {size} cannot be split evenly over mesh.{axis} {parts}.")
    return size // parts


def _group_name(name: str, separate_exact: bool) -> str:
    if ".blocks." not in name:
        return "root"
    parts = name.split(".")
    block = ".".join(parts[:3])
    if ".experts." in name:
        return f"{block} {parts[3]} {parts[-3]} experts"
    is_exact = ".router." in name or parts[-2].endswith("norm")
    return f"{block} exact" if is_exact and separate_exact else block


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of a forward and backward pass, between two recorded points.

    name: such as `forward encoder 3`, `backward decoder 0`, `after encoder`.
    rise: bytes at its peak, above those at its start.
    change: bytes at its end, above those at its start.
    gradients: the part of the change that is gradients of weights.
    """

    name: str
    rise: int
    change: int
    gradients: int
    collectives: tuple[Collective, ...]


def num_layers(config: ModelConfig, stack: str) -> int:
    """Return how many layers a stack has."""
    return config.num_decoder_layers if stack == "decoder" else config.num_encoder_layers


def traced_layers(config: ModelConfig, stack: str) -> tuple[int, int]:
    """Return how many layers of a stack are traced, and the period of sparse and dense layers."""
    period = max(config.sparse_step_of(decoder=stack == "decoder"), 1)
    return min(num_layers(config, stack), 2 * period), period


def traced_layer(config: ModelConfig, stack: str, layer: int) -> int:
    """Return the traced layer that represents a layer; the last layers represent the last ones."""
    layers = num_layers(config, stack)
    traced, period = traced_layers(config, stack)
    if layers == traced:
        return layer
    from_end = layers - layer
    phase = [config.is_sparse(i, decoder=stack == "decoder") for i in range(traced)]
    sparse = config.is_sparse(layer, decoder=stack == "decoder")
    tail = range(max(traced - period, 0), traced)
    if from_end <= period and phase[traced - from_end] == sparse:
        return traced - from_end
    return next(i for i in (*range(period), *tail) if phase[i] == sparse)


@cache
def trace(
    config: ModelConfig,
    data: DataConfig,
    rows: int,
    mesh: MeshConfig,
    dtypes: tuple[torch.dtype, torch.dtype],
    precision: Precision,
    checkpointing: bool,
) -> tuple[Segment, ...]:
    """Return the segments of a forward and backward pass of the traced layers.

    rows: of the batch in this process.
    mesh: only its expert and tensor sizes are used.
    dtypes: in which the dense weights of blocks, and experts, are gathered.
    """
    short = dataclasses.replace(
        config,
        num_encoder_layers=traced_layers(config, "encoder")[0],
        num_decoder_layers=traced_layers(config, "decoder")[0],
    )
    alone = MeshConfig(expert=mesh.expert, tensor=mesh.tensor)

    def shard(model: SwitchTransformer, job: Mesh) -> None:
        split_tensors(model, job)
        shard_experts(model, job)
        _cast(model, *dtypes)
        prepare_for_training(model, precision, checkpointing)

    with fake_model(short, alone, mesh.expert * mesh.tensor, shard) as (model, job):
        batch = blank_batch(data, rows)
        with MemoryRecorder(model) as memory, CollectiveRecorder(job) as recorder:
            recorded = _SegmentRecorder(model, memory, recorder)
            backward(model, [batch], job)
            recorded.mark("end")
        return tuple(recorded.segments())


class _SegmentRecorder:
    """Records memory and collectives where blocks begin and end, forward and backward."""

    def __init__(
        self, model: SwitchTransformer, memory: MemoryRecorder, recorder: CollectiveRecorder
    ) -> None:
        self.memory, self.recorder = memory, recorder
        self.marks: list[tuple[str, Bytes, int, int]] = []
        self._seen: set[str] = set()
        for name in STACKS:
            stack = getattr(model, name)
            for layer, block in enumerate(stack.blocks):
                last = layer == len(stack.blocks) - 1
                self._add_hooks(block, name, layer, last)
        self.mark("start")

    def mark(self, name: str) -> None:
        """Record the start of a segment."""
        highest = self.memory.mark()
        self.marks.append((name, self.memory.now, highest, len(self.recorder.collectives)))

    def segments(self) -> Iterator[Segment]:
        """Yield the segments between the recorded points."""
        for here, there in zip(self.marks, self.marks[1:], strict=False):
            name, start, _, first = here
            _, end, highest, last = there
            yield Segment(
                name=name,
                rise=highest - start.total,
                change=end.total - start.total,
                gradients=end.gradients - start.gradients,
                collectives=tuple(self.recorder.collectives[first:last]),
            )

    def _once(self, name: str) -> None:
        # Recomputation runs a block's forward hooks again.
        if name not in self._seen:
            self._seen.add(name)
            self.mark(name)

    def _add_hooks(self, block: nn.Module, stack: str, layer: int, last: bool) -> None:
        def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._once(f"forward {stack} {layer}")
            if layer == 0:
                on_gradient(inputs[0], f"end of {stack}")

        def after(module: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> None:
            if last:
                self._once(f"after {stack}")
            on_gradient(outputs[0], f"backward {stack} {layer}")

        def on_gradient(tensor: Tensor, name: str) -> None:
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: self._once(name))

        block.register_forward_pre_hook(before)
        block.register_forward_hook(after)


def _cast(model: nn.Module, dense: torch.dtype, experts: torch.dtype) -> None:
    """Cast the weights of blocks to the dtypes that they are gathered in."""
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        exact = {id(p) for module in float32_modules(block) for p in module.parameters()}
        for module in block.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) not in exact:
                    is_expert = name in ("up", "gate", "down", "projection")
                    dtype = experts if is_expert and parameter.dim() == 3 else dense
                    setattr(module, name, nn.Parameter(parameter.detach().to(dtype)))
