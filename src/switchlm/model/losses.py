"""Losses: cross-entropy over target tokens, balance loss and router z-loss.

Shapes: B batch, T target, V vocabulary, L layers, G groups, E experts.
"""

import torch
from torch import Tensor

from switchlm.kernels import select
from switchlm.model.config import ModelConfig
from switchlm.model.layers import local
from switchlm.model.routing import ModelOutput, Routing


def cross_entropy(
    logits_BTV: Tensor, targets_BT: Tensor, mask_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the summed negative log likelihood in nats (float32) and the number of targets.

    mask_BT: bool, true where a target counts; None is all.
    """
    losses_BT = token_losses(logits_BTV, targets_BT)
    if mask_BT is None:
        return losses_BT.sum(), torch.full((), losses_BT.numel(), device=losses_BT.device)
    return torch.where(mask_BT, losses_BT, 0.0).sum(), mask_BT.sum()


def token_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Return losses_BT, float32: the negative log likelihood of each target in nats."""
    losses_N = select.token_losses(logits_BTV.float().flatten(0, 1), targets_BT.flatten())
    return local(losses_N).view(targets_BT.shape)


def joined_balance_loss(routing: tuple[Routing, ...]) -> Tensor:
    """Return E * sum of f * P with f and P averaged over layers first, mean over groups (`hf`).

    Groups of nothing but padding are left out of the mean.
    """
    fraction_GE = torch.stack([layer.fraction_GE for layer in routing]).mean(0)
    probability_GE = torch.stack([layer.probability_GE for layer in routing]).mean(0)
    groups = (fraction_GE > 0).any(-1).sum().clamp(min=1)
    return (fraction_GE * probability_GE).sum() / groups * fraction_GE.shape[-1]


def routing_losses(output: ModelOutput, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Return the weighted balance loss and the weighted router z-loss of all Switch layers.

    Over the layers: `paper` sums, `t5x` takes the mean, `hf` joins the layers of each stack and
    adds the two stacks, leaving out those with Switch layers only (see semantics.py). Both are zero
    for dense models.
    """
    router, semantics = config.router, config.router.semantics
    stacks = [
        layers
        for layers, decoder in ((output.encoder_routing, False), (output.decoder_routing, True))
        if layers
        and (semantics.losses_where_all_sparse or config.sparse_step_of(decoder=decoder) > 1)
    ]
    zero = torch.zeros((), device=output.logits_BTV.device)
    if not stacks:
        return zero, zero
    if semantics.balance_over_layers == "joined":
        balance_X = torch.stack([joined_balance_loss(layers) for layers in stacks])
        z_loss_X = torch.stack(
            [torch.stack([layer.z_loss for layer in layers]).mean() for layers in stacks]
        )
    else:
        balance_X = torch.stack([layer.balance_loss for layers in stacks for layer in layers])
        z_loss_X = torch.stack([layer.z_loss for layers in stacks for layer in layers])
    over_layers = torch.mean if semantics.balance_over_layers == "mean" else torch.sum
    weight = router.balance_weight if router.balance == "loss" else 0.0
    # Without a weight, no backward pass is needed.
    balance_loss = weight * over_layers(balance_X) if weight else zero
    z_loss = router.z_weight * over_layers(z_loss_X) if router.z_weight else zero
    return balance_loss, z_loss
