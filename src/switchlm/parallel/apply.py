"""`apply`: the one call that shards a model over processes, and `gather_model`, its inverse.

The model itself does not change. Tensor parallelism first, experts next, then FSDP2 over what is
left: experts over (replicas, data), everything else over (replicas, data x expert), a block at a
time. An axis of length 1 does nothing.

Tensor parallelism (the paper's model parallelism, section 5.3) splits heads, d_ff and the
vocabulary: one all-reduce of [B, S, D] a sublayer and direction, as in Megatron (Shoeybi et al.
2019), by PyTorch's own DTensor: the first matrices of a sublayer are split by columns, the last by
rows.
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
from switchlm.model.layers import FeedForward
from switchlm.model.router import Router
from switchlm.model.switch import switch_layers
from switchlm.model.transformer import Block, SwitchTransformer
from switchlm.parallel.expert import shard, shard_experts
from switchlm.parallel.mesh import Mesh


def apply(model: SwitchTransformer, mesh: Mesh, *, wire_dtype: torch.dtype | None = None) -> None:
    """Shard `model` over `mesh` in place; build it on the meta device, then `materialise` it.

    wire_dtype: what weights are gathered in (None: their own). Routers, norms, positions and the
        embedding are gathered in their own dtype, since they compute in it (section 2.4), and
        gradients are summed in float32.

    Gradients are sums over all processes: divide the loss by what is counted globally. Raises
    ConfigError where an axis does not divide what it splits.
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
                    shard_placement_fn=functools.partial(_whole_experts, experts.size(-1)),
                )
        if weights is not None:
            if wire_dtype is not None:
                fully_shard(exact_modules(block), mesh=weights)
            fully_shard(block, mesh=weights, mp_policy=policy, ignored_params=_experts(block))
    if weights is not None:
        fully_shard(model, mesh=weights, ignored_params=_experts(model))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def send_gradients(model: nn.Module, now: bool) -> None:
    """Say whether the next backward pass sends gradients, or keeps them for one that does."""
    if isinstance(model, FSDPModule):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(now, recurse=False)


@torch.no_grad()
def materialise(model: SwitchTransformer, device: torch.device, seed: int) -> None:
    """Give a model of the meta device its memory, and draw what this process holds of it.

    The numbers are those of the same model on one process. No more than one whole dense parameter,
    or the experts here of one, is in memory besides.
    """
    model.to_empty(device=device)
    initialiser = Initialiser.of(model.config, seed)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        place = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        here, offset = _torch.local_shape_and_offset(parameter)
        box = [slice(start, start + size) for start, size in zip(offset, here, strict=True)]
        experts = None
        if ".experts." in name:
            experts = range(box[0].start, box[0].stop)
            box[0] = slice(None)
        place.copy_(initialiser.draw(name, shape, experts)[tuple(box)])
    for buffer in model.buffers():
        buffer.zero_()


def _whole_experts(num_shards: int, parameter: nn.Parameter) -> Shard | None:
    """Shard a stack by experts where they suffice, else by the rows of their matrices."""
    here = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    fits = here.shape[0] % num_shards == 0 or here.shape[1] % num_shards
    return Shard(0) if fits else Shard(1)


def _experts(module: nn.Module) -> set[nn.Parameter]:
    return {p for name, p in module.named_parameters() if ".experts." in f".{name}"}


def exact_modules(block: Block) -> list[nn.Module]:
    """Return the routers and norms of a block, which compute in float32."""
    return [
        module
        for name, module in block.named_modules()
        if isinstance(module, Router) or name.endswith("norm")
    ]


def _silence_warnings() -> None:
    # Nothing works in place on a block's output, and slicing a flattened axis goes on working.
    for said in ("FSDP2-wrapped module", "Slicing a flattened dim", ".*_StridedShard"):
        warnings.filterwarnings("ignore", message=said)


@torch.no_grad()
def gather_model(model: SwitchTransformer) -> SwitchTransformer:
    """Return a copy of a sharded model that is whole in this process, in eval mode.

    All processes call this, and each must have room for the copy, on the model's device. A model
    that is not sharded is returned as it is.
    """
    state = model.state_dict()
    if not any(isinstance(tensor, DTensor) for tensor in state.values()):
        return model
    with torch.device("meta"):
        copy = SwitchTransformer(model.config)
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


def _check_divisible(config: ModelConfig, size: int) -> None:
    for name in ("num_heads", "d_ff", "vocabulary_size"):
        value = getattr(config, name)
        if value % size:
            raise ConfigError(
                f"model.{name} {value} cannot be split evenly over mesh.tensor {size}; choose a "
                "mesh.tensor that divides it."
            )
