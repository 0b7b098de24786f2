"""What one process holds of every parameter, and what the blocks of a model take in it.

Which part of a parameter it holds are the rules of `apply`, as numbers; a test holds them against
`apply` itself. Sizes are those of the fullest process, the first.

What blocks take is traced once with the real code on fake tensors: the forward and backward pass of
a few layers, split over `tensor` and `expert` processes but gathered over all others. Memory is
marked wherever a block begins or ends. From that a plan knows any number of layers. Weights, and
what gathers and reduces them, are not in it.
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
from switchlm.model.transformer import Block, SwitchTransformer
from switchlm.parallel.apply import float32_modules, split_tensors
from switchlm.parallel.expert import shard_experts
from switchlm.parallel.mesh import Mesh, MeshConfig
from switchlm.planning.recorder import Bytes, Collective, CollectiveRecorder, MemoryRecorder
from switchlm.planning.simulate import blank_batch, fake_model
from switchlm.training.config import Precision
from switchlm.training.step import backward, prepare_for_training

STACKS = ("encoder", "decoder")
# The dim of a parameter that the tensor axis splits, by the end of its name; others are whole.
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
class Share:
    """A parameter as a process holds it.

    group: what is gathered together: `root`, `encoder.blocks.3`, `... exact` (routers and norms of
        a block), `... experts` (of each Switch layer).
    shape: without the tensor and expert axes' other parts, before the rest is spread.
    processes: over how many the rest is spread (1: it is whole here).
    copies: how many replicas sum its gradient.
    held: elements here, as many as in any process; the last ones hold less and are filled up when
        they send.
    """

    name: str
    group: str
    whole: tuple[int, ...]
    shape: tuple[int, ...]
    processes: int
    copies: int
    held: int

    @property
    def is_expert(self) -> bool:
        """Whether it belongs to experts."""
        return self.group.endswith("experts")

    @property
    def is_exact(self) -> bool:
        """Whether it is gathered in float32 whatever the others are."""
        return self.group == "root" or self.group.endswith("exact")


@cache
def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters by name."""
    with torch.device("meta"):
        model = SwitchTransformer(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def shares(config: ModelConfig, mesh: MeshConfig, *, exact_apart: bool) -> Iterator[Share]:
    """Yield what the first process of a mesh holds of each parameter.

    mesh: with its `data` given.
    exact_apart: whether routers and norms are gathered by themselves, because the others are
        gathered in another dtype.

    Raises ConfigError where an axis does not divide what it splits.
    """
    assert mesh.data is not None
    _part("model.num_heads", config.num_heads, mesh.tensor, "tensor")
    for name, whole in shapes_of(config).items():
        group = _group(name, exact_apart)
        expert = group.endswith("experts")
        shape = list(whole)
        if expert:
            shape[0] = _part(name, whole[0], mesh.expert, "expert")
        for end, dim in TENSOR_DIMS.items():
            if name.endswith(end):
                shape[dim] = _part(name, whole[dim], mesh.tensor, "tensor")
        processes = mesh.data if expert else mesh.data * mesh.expert
        dim = 0
        if expert and shape[0] % processes and shape[1] % processes == 0:
            dim = 1
        rows = -(-shape[dim] // processes)
        yield Share(
            name=name,
            group=group,
            whole=whole,
            shape=tuple(shape),
            processes=processes,
            copies=mesh.replicas,
            held=rows * (prod(shape) // shape[dim]),
        )


def _part(name: str, size: int, parts: int, axis: str) -> int:
    if size % parts:
        raise ConfigError(f"{name}: {size} cannot be split evenly over mesh.{axis} {parts}.")
    return size // parts


def _group(name: str, exact_apart: bool) -> str:
    if ".blocks." not in name:
        return "root"
    parts = name.split(".")
    block = ".".join(parts[:3])
    if ".experts." in name:
        return f"{block} {parts[3]} {parts[-3]} experts"
    is_exact = ".router." in name or parts[-2].endswith("norm")
    return f"{block} exact" if is_exact and exact_apart else block


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Between two marks.

    name: `forward encoder 3`, `backward decoder 0`, `loss`, `embedding`, ...

    rise, change: bytes in memory above the level at its start, at most, and at its end.
    gradients: what of the change are gradients of weights.
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
    """Return how many layers of a stack are traced, and after how many their kinds repeat."""
    period = max(config.sparse_step_of(decoder=stack == "decoder"), 1)
    return min(num_layers(config, stack), 2 * period), period


def layer_like(config: ModelConfig, stack: str, layer: int) -> int:
    """Return the traced layer that stands for a layer: the last ones for the last ones."""
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

    rows: of the batch here.
    mesh: its expert and tensor sizes count.
    dtypes: of the dense weights of blocks and of experts, as they are gathered.
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
            marks = _Marks(model, memory, recorder)
            backward(model, [batch], precision, job)
            marks.mark("end")
        return tuple(marks.segments())


class _Marks:
    """Marks memory where blocks begin and end, forward and backward."""

    def __init__(
        self, model: SwitchTransformer, memory: MemoryRecorder, recorder: CollectiveRecorder
    ) -> None:
        self.memory, self.recorder = memory, recorder
        self.found: list[tuple[str, Bytes, int, int]] = []
        self._seen: set[str] = set()
        for name in STACKS:
            stack = getattr(model, name)
            for layer, block in enumerate(stack.blocks):
                last = layer == len(stack.blocks) - 1
                self._watch(block, name, layer, last)
        self.mark("start")

    def mark(self, name: str) -> None:
        """Say what begins here."""
        highest = self.memory.mark()
        self.found.append((name, self.memory.now, highest, len(self.recorder.collectives)))

    def segments(self) -> Iterator[Segment]:
        """Yield what lies between the marks."""
        for here, there in zip(self.found, self.found[1:], strict=False):
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

    def _watch(self, block: nn.Module, stack: str, layer: int, last: bool) -> None:
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
    """Give the weights of blocks the dtypes that they are gathered in."""
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        exact = {id(p) for module in float32_modules(block) for p in module.parameters()}
        for module in block.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) not in exact:
                    is_expert = name in ("up", "gate", "down", "projection")
                    dtype = experts if is_expert and parameter.dim() == 3 else dense
                    setattr(module, name, nn.Parameter(parameter.detach().to(dtype)))
