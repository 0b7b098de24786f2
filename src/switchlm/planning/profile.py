"""What the blocks of a model take in one process, traced once with the real code on fake tensors.

A trace runs the forward and backward pass of a few layers, split over `tensor` and `expert`
processes but gathered over all others, and marks memory wherever a block begins or ends. From it a
plan knows any number of layers. Weights, and what gathers and reduces them, are not in it.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from switchlm import _torch
from switchlm.data.config import DataConfig
from switchlm.model.block import Block
from switchlm.model.config import ModelConfig
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.apply import exact_modules, split_tensors
from switchlm.parallel.expert import shard_experts
from switchlm.parallel.mesh import MeshConfig
from switchlm.planning.recorder import Bytes, Collective, CollectiveRecorder, MemoryRecorder
from switchlm.planning.simulate import balance, blank_batch, fake_job
from switchlm.training.config import Precision
from switchlm.training.step import backward, prepare_for_training

STACKS = ("encoder", "decoder")


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


def traced_layers(config: ModelConfig, stack: str) -> tuple[int, int]:
    """Return how many layers of a stack are traced, and after how many their kinds repeat."""
    decoder = stack == "decoder"
    layers = config.num_decoder_layers if decoder else config.num_encoder_layers
    period = max(config.sparse_step_of(decoder=decoder), 1)
    return min(layers, 2 * period), period


def layer_like(config: ModelConfig, stack: str, layer: int) -> int:
    """Return the traced layer that stands for a layer: the last ones for the last ones."""
    layers = config.num_decoder_layers if stack == "decoder" else config.num_encoder_layers
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
    ranks = mesh.expert * mesh.tensor
    alone = MeshConfig(expert=mesh.expert, tensor=mesh.tensor)
    with fake_job(alone, ranks) as job:
        with torch.device("meta"):
            model = SwitchTransformer(short)
        split_tensors(model, job)
        shard_experts(model, job)
        balance(model)
        _cast(model, *dtypes)
        prepare_for_training(model, precision, checkpointing)
        job.all_reduce_sum(torch.zeros(1))  # makes its group, impossible among fake tensors
        with _torch.FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
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
        exact = {id(p) for module in exact_modules(block) for p in module.parameters()}
        for module in block.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) not in exact:
                    is_expert = name in ("up", "gate", "down", "projection")
                    dtype = experts if is_expert and parameter.dim() == 3 else dense
                    setattr(module, name, nn.Parameter(parameter.detach().to(dtype)))
