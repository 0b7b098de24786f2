"""One optimisation step: the loss, its gradients, and an update that a bad batch cannot spoil.

A step computes in one of three precisions, the experiment of Table 2 (section 2.4). Weights,
gradients and the optimizer's state stay float32 in each, so that only what it names differs. What
is minimised besides routing losses is cross-entropy, unless a recipe says otherwise.

Shapes: L Switch layers, E experts, B batch, T target, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from switchlm.data.batch import Batch
from switchlm.data.order import mix
from switchlm.errors import ConfigError
from switchlm.kernels import select
from switchlm.kernels.select import Choice, Implementation
from switchlm.model.experts import FeedForwardExperts
from switchlm.model.losses import cross_entropy, routing_losses
from switchlm.model.router import Router
from switchlm.model.routing import ModelOutput, Routing
from switchlm.model.switch import SwitchFeedForward, fused_switch_misfit
from switchlm.model.transformer import SwitchTransformer, forward_batch
from switchlm.parallel.apply import losses_of, send_gradients
from switchlm.parallel.mesh import ALONE, Mesh
from switchlm.training.config import Precision, TrainingConfig
from switchlm.training.monitor import global_norm


def set_router_dtype(model: nn.Module, precision: Precision) -> None:
    """Make routers compute in bfloat16 in the mode `bfloat16`, in float32 otherwise."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    for module in model.modules():
        if isinstance(module, Router):
            module.dtype = dtype


def prepare_for_training(
    model: SwitchTransformer, precision: Precision, activation_checkpointing: bool = False
) -> None:
    """Make a model compute and store what its configuration of training says, in place."""
    set_router_dtype(model, precision)
    model.encoder.activation_checkpointing = activation_checkpointing
    model.decoder.activation_checkpointing = activation_checkpointing
    model.train()


def choose_switch(
    model: SwitchTransformer,
    config: TrainingConfig,
    num_tokens: int,
    way: Implementation = "auto",
    mesh: Mesh = ALONE,
) -> Choice | None:
    """Tell the Switch feed-forwards of a model how to run, and return what they will do.

    Every process of a job calls this once, before its first step. The main one decides for all, by
    a trial of its own where one is due; where another cannot do as the main one does, all take
    separate products. A process by itself that is told `auto` goes on to try every new shape.

    num_tokens: that the encoder reads in a batch of this process.

    Returns None for a model without such layers. Raises ConfigError, in all processes, where `way`
    is `fused` and no kernel takes these layers here.
    """
    layers = [part for part in model.modules() if isinstance(part, SwitchFeedForward)]
    if not layers:
        return None
    fitting = [layer for layer in layers if fused_switch_misfit(layer) is None]
    if config.compile:
        choice = Choice("separate", "the model is compiled (training.compile)")
    elif fitting:
        choice = _choose_for(fitting[0], config, num_tokens, way, mesh)
    else:
        choice = Choice("separate", str(fused_switch_misfit(layers[0])))
    found = mesh.gather(choice)
    choice = next((one for one in found if one.name == "separate"), found[0])
    if way == "fused" and choice.name == "separate":
        raise ConfigError(
            f"kernels.switch is 'fused', but no Switch layer can run so here: {choice.reason}. "
            "Take kernels.switch=auto, or separate."
        )
    if mesh.is_distributed:
        way = "separate" if choice.name == "separate" else "fused"
    for layer in fitting:
        cast(FeedForwardExperts, layer.experts).implementation = way
    return choice


def _choose_for(
    layer: SwitchFeedForward,
    config: TrainingConfig,
    num_tokens: int,
    way: Implementation,
    mesh: Mesh,
) -> Choice:
    """Return how a layer without `fused_switch_misfit` runs; `autotune`: the main one times it."""
    experts, router = cast(FeedForwardExperts, layer.experts), layer.router
    num_experts, d_model, d_ff = experts.up.shape
    about = (num_experts, d_ff, experts.activation, experts.gate is not None, way)
    dtype = torch.float32 if config.precision == "float32" else torch.bfloat16
    x_ND = torch.randn(num_tokens, d_model, dtype=dtype, device=router.weight.device)
    per_token = router.config.experts_per_token
    with computing(config.precision, x_ND.device):
        if mesh.is_main:
            return select.choose_switch(x_ND.requires_grad_(), per_token, *about)
        return select.explain_switch(x_ND, num_tokens * per_token, *about)


def computing(precision: Precision, device: torch.device) -> AbstractContextManager:
    """Return the context of a forward pass.

    `float32`: everything. `selective`: bfloat16, but routers float32 (the paper's choice).
    `bfloat16`: routers too, which the paper found to diverge.
    """
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


# The loss of a model's answer to a batch, summed over the batch's targets: nats, a float32 scalar.
# What it needs beyond targets is part of the batch, as fields of a subclass of `Batch`.
Objective = Callable[[ModelOutput, Batch], Tensor]


def target_cross_entropy(output: ModelOutput, batch: Batch) -> Tensor:
    """Return the summed negative log likelihood of the batch's targets, in nats."""
    mask_BT = None if batch.target_segments_BT is None else batch.target_mask_BT
    return cross_entropy(output.logits_BTV, batch.targets_BT, mask_BT)[0]


Routings = tuple[Routing, ...]


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What a step leaves behind: detached tensors on the model's device, nothing synchronised.

    figures: float64 [6]: the objective in nats per target, weighted balance loss, weighted z-loss,
        gradient norm before clipping, 1 if the step was skipped for a number that is not finite,
        else 0, and real tokens, of all processes.
    stops: a float64 scalar: how many processes wish to stop.
    routing: of the last step, a tuple of layers for each micro-batch.
    """

    figures: Tensor
    stops: Tensor
    routing: tuple[Routings, ...]


@dataclass(frozen=True, kw_only=True)
class RoutingSummary:
    """How the routers of a step did, by layer.

    load_LE: each expert's share of the tokens, rows sum to 1.
    dropped_L: the share of tokens that capacity dropped.
    gate_L: mean gate of the tokens that were not.
    """

    load_LE: Tensor
    dropped_L: Tensor
    gate_L: Tensor


def seed_step(seed: int, step: int, device: torch.device | None = None, share: int = 0) -> None:
    """Seed torch from (seed, step) alone, so that noise does not depend on where a run began.

    share: which share of the batch this process sees; each has its own noise. Seeds the CPU's
        generator and that of `device`; torch.manual_seed would format a stack trace for every kind
        of device that is not in use.
    """
    word = (seed * 0x9E3779B97F4A7C15 + step + 1 + (share << 40)) % 2**64
    mixed = int(mix(np.array([word], dtype=np.uint64))[0]) >> 1
    torch.default_generator.manual_seed(mixed)
    if device is not None and device.type != "cpu":
        torch.get_device_module(device).manual_seed(mixed)


def training_step(
    model: SwitchTransformer,
    optimizer: Optimizer,
    batches: Sequence[Batch],
    *,
    gradient_clip: float | None = None,
    precision: Precision = "float32",
    mesh: Mesh = ALONE,
    objective: Objective = target_cross_entropy,
    num_tokens: int = 0,
    stop: bool = False,
) -> StepRecord:
    """Update the model on micro-batches as if they were one batch; learning rates are set already.

    batches: this process's share of them; the model is sharded over `mesh`.
    num_tokens: real tokens in that share, to be summed; counting them on a GPU would wait for it.
    stop: whether this process wishes to stop.

    The loss is the summed objective of all micro-batches over their targets, plus the mean of their
    routing losses. If loss or gradients are not finite, weights, optimizer state and
    selection biases stay bitwise as they are, on all processes.
    """
    optimizer.zero_grad(set_to_none=True)
    losses, routing = backward(model, batches, precision, mesh, objective)
    with torch.no_grad():
        gradients = [
            parameter.grad
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        copies = mesh.world_size // mesh.data_size  # of a share of the batch
        norm, counts = global_norm(gradients, mesh, [num_tokens / copies, float(stop)])
        finite = torch.isfinite(norm) & torch.isfinite(losses).all()
        skipped = 1.0 - finite.float()
        optimizer.found_inf = skipped  # type: ignore[attr-defined]
        optimizer.grad_scale = (  # type: ignore[attr-defined]
            None if gradient_clip is None else (norm / gradient_clip).clamp(min=1.0)
        )
        optimizer.step()
        update_expert_biases(model, routing, finite, mesh)
        figures = torch.cat([losses, torch.stack([norm, skipped]), counts[:1]])
    return StepRecord(figures=figures, stops=counts[1], routing=routing)


def backward(
    model: SwitchTransformer,
    batches: Sequence[Batch],
    precision: Precision,
    mesh: Mesh = ALONE,
    objective: Objective = target_cross_entropy,
) -> tuple[Tensor, tuple[Routings, ...]]:
    """Add the gradients of the loss of all batches together.

    Returns float32 [3] (objective a target, balance loss, z-loss), of all processes, and the
    routing of each batch here.
    """
    num_targets = mesh.all_reduce_sum(sum_of([batch.target_mask_BT.sum() for batch in batches]))
    num_parts = len(batches) * mesh.data_size
    losses = None
    routing: tuple[Routings, ...] = ()
    for number, batch in enumerate(batches, start=1):
        send_gradients(model, now=number == len(batches))
        with computing(precision, batch.inputs_BS.device):
            output = forward_batch(model, batch)
        with losses_of(mesh):
            summed = objective(output, batch)
            balance, z_loss = routing_losses(output, model.config)
            parts = torch.stack([summed / num_targets, balance / num_parts, z_loss / num_parts])
            parts.sum().backward()
        losses = parts.detach() if losses is None else losses + parts.detach()
        routing += (output.routing,)
    assert losses is not None, "a step needs at least one batch"
    return mesh.all_reduce_sum(losses), routing


def update_expert_biases(
    model: SwitchTransformer, routing: Sequence[Routings], finite: Tensor, mesh: Mesh = ALONE
) -> None:
    """Move the selection biases of routers balanced by `bias`; not at all after a bad batch.

    A frozen router keeps its bias too.
    """
    if model.config.router.balance != "bias":
        return
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router, load_E in zip(routers, _loads(routing, mesh), strict=True):
        if router.weight.requires_grad:
            # Equal loads move no bias.
            router.update_expert_bias(torch.where(finite, load_E, 0))


@torch.no_grad()
def summarise_routing(routing: Sequence[Routings], mesh: Mesh = ALONE) -> RoutingSummary | None:
    """Summarise the routing of a step's batches on all processes; None for dense models."""
    if not routing[0]:
        return None
    load_LE = _loads(routing, mesh)
    layers = list(zip(*routing, strict=True))
    kept_L = torch.stack([sum_of([layer.kept_A.sum() for layer in batches]) for batches in layers])
    gates_LN = [
        [torch.where(one.kept_A, one.gate_A.float(), 0.0).sum() for one in batches]
        for batches in layers
    ]
    gates_L = torch.stack([sum_of(gates_N) for gates_N in gates_LN])
    kept_L, gates_L = mesh.all_reduce_sum(torch.stack([kept_L.double(), gates_L.double()]))
    wanted_L = load_LE.sum(-1)
    return RoutingSummary(
        load_LE=load_LE / wanted_L[:, None].clamp(min=1),
        dropped_L=((wanted_L - kept_L) / wanted_L.clamp(min=1)).float(),
        gate_L=(gates_L / kept_L.clamp(min=1)).float(),
    )


def _loads(routing: Sequence[Routings], mesh: Mesh) -> Tensor:
    """Return load_LE, int64: how many tokens of a step asked for each expert, everywhere."""
    layers = zip(*routing, strict=True)
    return mesh.all_reduce_sum(
        torch.stack([sum_of([layer.load_E for layer in batches]) for batches in layers])
    )


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of tensors of equal shape."""
    return torch.stack(list(tensors)).sum(0)
