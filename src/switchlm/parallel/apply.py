"""`apply`: the one call that shards a model over processes, and `gather_model`, its inverse.

The model itself does not change. Tensor parallelism first, experts next, then FSDP2 over what is
left: experts over (replicas, data), everything else over (replicas, data x expert), a block at a
time. An axis of length 1 does nothing.
"""

import functools
import warnings
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from switchlm import _torch
from switchlm.model.initialise import Initialiser
from switchlm.model.router import Router
from switchlm.model.switch import switch_layers
from switchlm.model.transformer import Block, SwitchTransformer
from switchlm.parallel.expert import shard_experts
from switchlm.parallel.mesh import Mesh
from switchlm.parallel.tensor import split_tensors


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
        box = box_of(parameter)
        experts = None
        if ".experts." in name:
            experts = range(box[0].start, box[0].stop)
            box = (slice(None), *box[1:])
        place.copy_(initialiser.draw(name, shape, experts)[box])
    for buffer in model.buffers():
        buffer.zero_()


def box_of(tensor: Tensor) -> tuple[slice, ...]:
    """Return which part of a sharded tensor is here; all of it, if it is not sharded."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    shape, offset = _torch.local_shape_and_offset(tensor)
    return tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))


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
