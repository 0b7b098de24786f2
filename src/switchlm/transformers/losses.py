"""The losses of forward.

Shapes: B batch, T target, V vocabulary.
"""

import dataclasses

import torch
from torch import Tensor

from switchlm.errors import ConfigError
from switchlm.model.config import ModelConfig
from switchlm.model.losses import cross_entropy, routing_losses
from switchlm.model.routing import ModelOutput

IGNORED = -100  # a label that is ignored


def loss_of(
    output: ModelOutput,
    labels_BT: Tensor,
    num_items: Tensor | int | None,
    config: ModelConfig,
    with_router_losses: bool,
) -> Tensor:
    """Return the loss of a batch, float32.

    That is the negative log likelihood of labels other than -100, in nats, summed and divided by
    `num_items`; by their number where that is None. The router losses are weighted by the share of
    this batch's labels in `num_items`, so that losses of accumulated batches add up.
    """
    if labels_BT.shape != output.logits_BTV.shape[:2]:
        raise ConfigError(
            f"labels are of shape {list(labels_BT.shape)}, the decoder's inputs of "
            f"{list(output.logits_BTV.shape[:2])}: they must be equal."
        )
    labels_BT = labels_BT.to(output.logits_BTV.device)
    counts_BT = labels_BT != IGNORED
    total, count = cross_entropy(output.logits_BTV, labels_BT.masked_fill(~counts_BT, 0), counts_BT)
    items = torch.as_tensor(count if num_items is None else num_items, device=total.device)
    items = items.clamp(min=1)
    loss = total / items
    if with_router_losses:
        balance_loss, z_loss = routing_losses(output, config)
        loss = loss + count / items * (balance_loss + z_loss)
    return loss


def router_losses(output: ModelOutput, config: ModelConfig) -> dict[str, Tensor]:
    """Return the balance and z-loss of each stack, not weighted, by transformers' names."""
    router = dataclasses.replace(config.router, balance="loss", balance_weight=1.0, z_weight=1.0)
    config = dataclasses.replace(config, router=router)
    alone = {
        "encoder": dataclasses.replace(output, decoder_routing=()),
        "decoder": dataclasses.replace(output, encoder_routing=()),
    }
    losses = {}
    for stack, part in alone.items():
        losses[f"{stack}_aux_loss"], losses[f"{stack}_z_loss"] = routing_losses(part, config)
    return losses
