"""Tensor parallelism (the paper's model parallelism, section 5.3): heads, d_ff and the vocabulary.

One all-reduce of [B, S, D] a sublayer and direction, as in Megatron (Shoeybi et al. 2019), by
PyTorch's own DTensor: the first matrices of a sublayer are split by columns, the last by rows.
"""

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)

from switchlm.errors import ConfigError
from switchlm.model.attention import Attention, RelativeBias
from switchlm.model.config import ModelConfig
from switchlm.model.layers import FeedForward
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.expert import shard
from switchlm.parallel.mesh import Mesh


def split_tensors(model: SwitchTransformer, mesh: Mesh) -> None:
    """Split attention, dense feed-forward networks, embedding and head over the tensor axis."""
    tensor = mesh.sub("tensor")
    if tensor is None:
        return
    _check(model.config, tensor.size())
    for module in list(model.modules()):
        if isinstance(module, Attention):
            _split_attention(module, tensor)
        elif isinstance(module, FeedForward):
            _split_feedforward(module, tensor)
        elif isinstance(module, RelativeBias):
            module.weight = shard(module.weight, tensor, [Shard(1)])
    vocabulary: dict[str, ParallelStyle] = {"embedding": RowwiseParallel(input_layouts=Replicate())}
    parallelize_module(model, tensor, vocabulary)
    if model.head is not None:
        model.head.weight = shard(model.head.weight, tensor, [Shard(0)])

    def project(x_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        """Return logits as a DTensor, each process holding those of its part of the vocabulary."""
        whole = DTensor.from_local(x_BTD, tensor, [Replicate()], run_check=False)
        return nn.functional.linear(whole, weight_VD)

    model.project = project


def losses_of(mesh: Mesh) -> AbstractContextManager:
    """Return the context in which the loss of logits split over the vocabulary is computed."""
    return loss_parallel() if mesh.size("tensor") > 1 else nullcontext()


def gathered(logits: Tensor) -> Tensor:
    """Return whole logits where they are split over the vocabulary; any other tensor as it is.

    For losses that `losses_of` does not know; takes the memory that splitting saves.
    """
    return logits.full_tensor() if isinstance(logits, DTensor) else logits


def _split_attention(module: Attention, tensor: DeviceMesh) -> None:
    # The input is shared out once for all three projections, so that one all-reduce sums its
    # gradient; the encoder's output, given by keyword to cross-attention, likewise.
    plan: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in ("query", "key", "value")}
    parallelize_module(module, tensor, {**plan, "output": RowwiseParallel()})
    inputs = PrepareModuleInput(
        input_layouts=(Replicate(), None),
        desired_input_layouts=(Replicate(), None),
        input_kwarg_layouts={"memory": Replicate()},
        desired_input_kwarg_layouts={"memory": Replicate()},
    )
    parallelize_module(module, tensor, inputs)


def _split_feedforward(module: FeedForward, tensor: DeviceMesh) -> None:
    plan: dict[str, ParallelStyle] = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if module.gate is not None:
        plan["gate"] = ColwiseParallel()
    parallelize_module(module, tensor, plan)
    inputs = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate())
    parallelize_module(module, tensor, inputs)


def _check(config: ModelConfig, size: int) -> None:
    for name in ("num_heads", "d_ff", "vocabulary_size"):
        value = getattr(config, name)
        if value % size:
            raise ConfigError(
                f"model.{name} {value} cannot be split evenly over mesh.tensor {size}; choose a "
                "mesh.tensor that divides it."
            )
