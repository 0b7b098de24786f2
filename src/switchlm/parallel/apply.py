"""`apply`: the one call that shards a model over processes, and `gather_model`, its inverse.

Tensor parallelism first, expert parallelism next, then FSDP2, one block at a time: experts over
(replicas, data), everything else over (replicas, data x expert). An axis of length 1 does nothing.

Tensor parallelism (the paper's model parallelism, section 5.3) splits heads, d_ff and the
vocabulary as Megatron does (Shoeybi et al. 2019), with PyTorch's DTensor: the first matrices of a
sublayer are split by columns, the last by rows, with one all-reduce of [B, S, D] per sublayer and
direction.
"""

import functools
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)

from switchlm import _torch
from switchlm.errors import ConfigError
from switchlm.model.attention import Attention, RelativeBias
from switchlm.model.config import ModelConfig
from switchlm.model.initialise import Initialiser
from switchlm.model.layers import FeedForward, local
from switchlm.model.router import Router
from switchlm.model.switch import switch_layers
from switchlm.model.transformer import Block, SwitchTransformer
from switchlm.parallel.expert import shard, shard_experts
from switchlm.parallel.mesh import Mesh


def apply(model: SwitchTransformer, mesh: Mesh, *, wire_dtype: torch.dtype | None = None) -> None:
    """Shard `model` over `mesh` in place; build it on the meta device, then `materialise` it.

    wire_dtype: dtype in which weights are gathered (None: their own). Routers, norms, positions and
        the embedding compute and are gathered in their own dtype (section 2.4), and gradients are
        summed in float32.

    Gradients are sums over all processes, so divide the loss by the number of targets of all
    processes. Raises ConfigError if an axis does not divide the dim that it splits.
    """
    _silence_warnings()
    split_tensors(model, mesh)
    shard_experts(model, mesh)
    policy = MixedPrecisionPolicy(
        param_dtype=wire_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    weights, experts = mesh.weights, mesh.experts
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        for layer in switch_layers(block).values():
            if experts is not None:
                fully_shard(
                    cast(nn.Module, layer.experts),
                    mesh=experts,
                    mp_policy=policy,
                    shard_placement_fn=functools.partial(_shard_placement, experts.size(-1)),
                )
        if weights is not None:
            if wire_dtype is not None:
                fully_shard(float32_modules(block), mesh=weights)
            fully_shard(block, mesh=weights, mp_policy=policy, ignored_params=_experts(block))
    if weights is not None:
        fully_shard(model, mesh=weights, ignored_params=_experts(model))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def set_gradient_sync(model: nn.Module, enabled: bool) -> None:
    """Set whether backward passes reduce gradients over processes, or accumulate them locally."""
    if isinstance(model, FSDPModule):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(enabled, recurse=False)


def align_gradients(model: nn.Module) -> None:
    """Place each gradient like its parameter; DTensor may return that of an embedding replicated.

    Fused optimizers rescale gradients in place, which a redistributed copy would hide.
    """
    for parameter in model.parameters():
        gradient = parameter.grad
        if not isinstance(parameter, DTensor) or not isinstance(gradient, DTensor):
            continue
        if gradient.placements != parameter.placements:
            parameter.grad = gradient.redistribute(placements=parameter.placements)


@torch.no_grad()
def materialise(model: SwitchTransformer, device: torch.device, seed: int) -> None:
    """Allocate a model of the meta device, and initialise the weights of this process.

    The weights equal those of one process with the same seed. Temporary memory is at most one full
    dense parameter, or the local experts of one stack.
    """
    model.to_empty(device=device)
    initialiser = Initialiser.of(model.config, seed)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        local_shape, offset = _torch.local_shape_and_offset(parameter)
        region = [slice(start, start + n) for start, n in zip(offset, local_shape, strict=True)]
        experts = None
        if ".experts." in name:
            experts = range(region[0].start, region[0].stop)
            region[0] = slice(None)
        local(parameter).copy_(initialiser.draw(name, shape, experts)[tuple(region)])
    for buffer in model.buffers():
        buffer.zero_()


def _shard_placement(num_shards: int, parameter: nn.Parameter) -> Shard | None:
    """Shard a stack by experts if their number is divisible, else by the rows of the matrices."""
    shape = local(parameter).shape
    by_experts = shape[0] % num_shards == 0 or shape[1] % num_shards
    return Shard(0) if by_experts else Shard(1)


def _experts(module: nn.Module) -> set[nn.Parameter]:
    return {p for name, p in module.named_parameters() if ".experts." in f".{name}"}


def float32_modules(block: Block) -> list[nn.Module]:
    """Return the routers and norms of a block, which compute in float32."""
    return [
        module
        for name, module in block.named_modules()
        if isinstance(module, Router) or name.endswith("norm")
    ]


def _silence_warnings() -> None:
    # No code changes a block's output in place; slicing of flattened axes is deprecated but works.
    for message in ("FSDP2-wrapped module", "Slicing a flattened dim", ".*_StridedShard"):
        warnings.filterwarnings("ignore", message=message)


@torch.no_grad()
def gather_model(model: SwitchTransformer) -> SwitchTransformer:
    """Return an unsharded copy of a sharded model, in eval mode, on every process.

    All processes call this, and need memory for the copy on the model's device. A model that is not
    sharded is returned itself.
    """
    state = model.state_dict()
    if not any(isinstance(tensor, DTensor) for tensor in state.values()):
        return model
    with torch.device("meta"):
        copy = SwitchTransformer(model.config, model.metadata)
    parts = {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
        for name, tensor in state.items()
    }
    copy.load_state_dict(parts, assign=True)
    return copy.eval()


def split_tensors(model: SwitchTransformer, mesh: Mesh) -> None:
    """Split attention, dense feed-forward networks, embedding and head over the tensor axis."""
    tensor = mesh.sub("tensor")
    if tensor is None:
        return
    _check_divisible(model.config, tensor.size())
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
        """Return logits as a DTensor split over the vocabulary."""
        x_BTD = DTensor.from_local(x_BTD, tensor, [Replicate()], run_check=False)
        return nn.functional.linear(x_BTD, weight_VD)

    model.project = project


def loss_parallel_context(mesh: Mesh) -> AbstractContextManager:
    """Return the context for the loss and its backward pass: logits may be split by vocabulary."""
    return loss_parallel() if mesh.size("tensor") > 1 else nullcontext()


def full_logits(logits: Tensor) -> Tensor:
    """Return logits gathered over the vocabulary, for losses that `loss_parallel` does not support.

    Costs the memory that splitting saves.
    """
    return logits.full_tensor() if isinstance(logits, DTensor) else logits


def _split_attention(module: Attention, tensor: DeviceMesh) -> None:
    # The input is prepared once for all three projections, so that one all-reduce sums its
    # gradient; likewise the encoder's output, the keyword argument `memory` of cross-attention.
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


def _check_divisible(config: ModelConfig, size: int) -> None:
    for name in ("num_heads", "d_ff", "vocabulary_size"):
        value = getattr(config, name)
        if value % size:
            raise ConfigError(
                f"model.{name} {value} cannot be split evenly over mesh.tensor {size}; choose a "
                "mesh.tensor that divides it."
            )
