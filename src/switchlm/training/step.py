"""One optimisation step: loss, gradients, and an update that is skipped if they are not finite.

The objective besides the routing losses is cross-entropy by default; `Distillation` is another.

Shapes: L Switch layers, E experts, B batch, T target, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from switchlm.data.batch import Batch
from switchlm.data.order import mix
from switchlm.model.losses import cross_entropy, routing_losses
from switchlm.model.precision import Precision, set_precision
from switchlm.model.router import Router
from switchlm.model.routing import ModelOutput, Routing
from switchlm.model.transformer import SwitchTransformer, forward_batch
from switchlm.parallel.apply import align_gradients, loss_parallel_context, set_gradient_sync
from switchlm.parallel.mesh import ALONE, Mesh
from switchlm.training.monitor import global_norm


def prepare_for_training(
    model: SwitchTransformer, precision: Precision, activation_checkpointing: bool = False
) -> None:
    """Set precision, activation checkpointing and training mode, in place."""
    set_precision(model, precision)
    model.encoder.activation_checkpointing = activation_checkpointing
    model.decoder.activation_checkpointing = activation_checkpointing
    model.train()


# The loss of a model's output on a batch, summed over the batch's targets: nats, a float32 scalar.
# Inputs of the loss besides the targets are fields of a subclass of `Batch`.
Objective = Callable[[ModelOutput, Batch], Tensor]


def target_cross_entropy(output: ModelOutput, batch: Batch) -> Tensor:
    """Return the summed negative log likelihood of the batch's targets, in nats."""
    mask_BT = None if batch.target_segments_BT is None else batch.target_mask_BT
    return cross_entropy(output.logits_BTV, batch.targets_BT, mask_BT)[0]


Routings = tuple[Routing, ...]


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """The result of a step: detached tensors on the model's device, without synchronisation.

    metrics: float32 [5]: the objective in nats per target, weighted balance loss, weighted z-loss,
        gradient norm before clipping, and 1 if the step was skipped because a number is not finite
        (else 0).
    tokens: int64 scalar, the non-padding tokens of all processes.
    stops: int64 scalar, the number of processes that request a stop.
    routing: a tuple of layers for each micro-batch.
    """

    metrics: Tensor
    tokens: Tensor
    stops: Tensor
    routing: tuple[Routings, ...]


@dataclass(frozen=True, kw_only=True)
class RoutingSummary:
    """The routing of a step, by layer.

    load_LE: each expert's share of the assignments, rows sum to 1.
    dropped_L: share of the assignments that capacity dropped.
    gate_L: mean gate of the assignments that were kept.
    """

    load_LE: Tensor
    dropped_L: Tensor
    gate_L: Tensor


def seed_step(seed: int, step: int, device: torch.device | None = None, share: int = 0) -> None:
    """Seed torch from (seed, step) alone, so that noise is the same in a resumed run.

    device: seeded besides the CPU.
    share: index of the process's share of the batch; each has its own noise.
    """
    # Not torch.manual_seed: it formats a stack trace for every kind of device that is not in use.
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
    mesh: Mesh = ALONE,
    objective: Objective = target_cross_entropy,
    num_tokens: int = 0,
    stop: bool = False,
) -> StepRecord:
    """Update the model on micro-batches as if they were one batch; learning rates are set already.

    batches: this process's share of the micro-batches.
    mesh: the processes that the model is sharded over.
    num_tokens: non-padding tokens of that share, for the metrics; counting them here would wait
        for the GPU.
    stop: whether this process requests a stop.

    The loss is the summed objective of all micro-batches divided by their number of targets, plus
    the mean of their routing losses. If loss or gradients are not finite, weights, optimizer state
    and expert biases stay bitwise unchanged, on all processes.
    """
    optimizer.zero_grad(set_to_none=True)
    losses, routing = backward(model, batches, mesh, objective)
    with torch.no_grad():
        if mesh.is_distributed:
            align_gradients(model)
        gradients = [
            parameter.grad
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        # Tensor parallel ranks have the same share of the batch; one of them counts it.
        own_tokens = num_tokens if mesh.rank("tensor") == 0 else 0
        norm, (tokens, stops) = global_norm(gradients, mesh, [own_tokens, int(stop)])
        finite = torch.isfinite(norm) & torch.isfinite(losses).all()
        skipped = 1.0 - finite.float()
        optimizer.found_inf = skipped  # type: ignore[attr-defined]
        optimizer.grad_scale = (  # type: ignore[attr-defined]
            None if gradient_clip is None else (norm / gradient_clip).clamp(min=1.0)
        )
        optimizer.step()
        update_expert_biases(model, routing, finite, mesh)
        metrics = torch.cat([losses, torch.stack([norm, skipped])])
    return StepRecord(metrics=metrics, tokens=tokens, stops=stops, routing=routing)


def backward(
    model: SwitchTransformer,
    batches: Sequence[Batch],
    mesh: Mesh = ALONE,
    objective: Objective = target_cross_entropy,
) -> tuple[Tensor, tuple[Routings, ...]]:
    """Add the gradients of the loss of all batches together.

    Returns float32 [3] (objective per target, balance loss, z-loss) of all processes, and the
    routing of each batch of this process.
    """
    num_targets = mesh.all_reduce_sum(sum_of([batch.target_mask_BT.sum() for batch in batches]))
    num_parts = len(batches) * mesh.data_size
    losses = None
    routing: tuple[Routings, ...] = ()
    for number, batch in enumerate(batches, start=1):
        set_gradient_sync(model, number == len(batches))
        output = forward_batch(model, batch)
        with loss_parallel_context(mesh):
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
    """Update the expert biases of trainable routers with balance `bias`, if `finite`."""
    if model.config.router.balance != "bias":
        return
    routers = [module for module in model.modules() if isinstance(module, Router)]
    if not routers:  # a dense model
        return
    for router, load_E in zip(routers, _loads(routing, mesh), strict=True):
        if router.weight.requires_grad:
            # Equal loads change no bias.
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
    kept_L, gates_L = mesh.all_reduce_sum(torch.stack([kept_L.float(), gates_L.float()]))
    total_L = load_LE.sum(-1)
    return RoutingSummary(
        load_LE=load_LE / total_L[:, None].clamp(min=1),
        dropped_L=((total_L - kept_L) / total_L.clamp(min=1)).float(),
        gate_L=(gates_L / kept_L.clamp(min=1)).float(),
    )


def _loads(routing: Sequence[Routings], mesh: Mesh) -> Tensor:
    """Return load_LE, int64: assignments of a step to each expert, before drops, of all ranks."""
    layers = zip(*routing, strict=True)
    return mesh.all_reduce_sum(
        torch.stack([sum_of([layer.load_E for layer in batches]) for batches in layers])
    )


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of tensors of equal shape."""
    return torch.stack(list(tensors)).sum(0)
