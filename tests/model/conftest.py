"""The dense one-hot Switch layer of appendix F, which the sparse one must equal."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from switchlm.kernels.reference import ACTIVATIONS
from switchlm.model.switch import SwitchFeedForward


@dataclass
class Dense:
    """dispatch_GSEC, combine_GSEC: appendix F's tensors. y: the output. balance: the loss."""

    y: Tensor
    balance: Tensor
    z_loss: Tensor
    dispatch_GSEC: Tensor
    combine_GSEC: Tensor


def dense_layer(
    layer: SwitchFeedForward,
    x_GSD: Tensor,
    capacity: int,
    real_GS: Tensor | None = None,
) -> Dense:
    """Compute a Switch layer with one-hot tensors of [group, token, expert, place].

    Follows the paper's pseudo-code, extended to several choices per token: all first choices take
    their places before any second one, and gates are divided by their sum.
    """
    num_experts, choices = layer.router.num_experts, layer.router.config.experts_per_token
    if real_GS is None:
        real_GS = torch.ones(x_GSD.shape[:2], dtype=torch.bool)
    real_GS1 = real_GS[..., None].float()
    logits_GSE = torch.einsum("gsd,ed->gse", x_GSD, layer.router.weight)
    probability_GSE = logits_GSE.softmax(-1)
    order_GSE = probability_GSE.argsort(dim=-1, descending=True, stable=True)

    taken_GE = torch.zeros(x_GSD.shape[0], num_experts)
    wanted_GSE = torch.zeros_like(probability_GSE)
    kept = []
    for choice in range(choices):
        mask_GSE = torch.nn.functional.one_hot(order_GSE[..., choice], num_experts) * real_GS1
        wanted_GSE = wanted_GSE + mask_GSE
        place_GSE = (mask_GSE.cumsum(1) - mask_GSE + taken_GE[:, None]) * mask_GSE
        taken_GE = taken_GE + mask_GSE.sum(1)
        mask_GSE = mask_GSE * (place_GSE < capacity)
        place_GS = place_GSE.sum(-1).long().clamp(max=capacity - 1)
        place_GSC = torch.nn.functional.one_hot(place_GS, capacity)
        kept.append(mask_GSE[..., None] * place_GSC[:, :, None, :])
    chosen_GSK = order_GSE[..., :choices]
    gate_GSK = probability_GSE.gather(-1, chosen_GSK)
    if choices > 1:
        gate_GSK = gate_GSK / gate_GSK.sum(-1, keepdim=True)
    dispatch_GSEC = sum(kept)
    combine_GSEC = sum(
        mask_GSEC * gate_GSK[..., choice, None, None] for choice, mask_GSEC in enumerate(kept)
    )

    experts = layer.experts
    activate = ACTIVATIONS[experts.activation]
    inputs_GECD = torch.einsum("gsd,gsec->gecd", x_GSD, dispatch_GSEC)
    hidden_GECF = torch.einsum("gecd,edf->gecf", inputs_GECD, experts.up)
    if experts.gate is None:
        hidden_GECF = activate(hidden_GECF)
    else:
        hidden_GECF = (
            activate(torch.einsum("gecd,edf->gecf", inputs_GECD, experts.gate)) * hidden_GECF
        )
    outputs_GECD = torch.einsum("gecf,efd->gecd", hidden_GECF, experts.down)
    y_GSD = torch.einsum("gecd,gsec->gsd", outputs_GECD, combine_GSEC)

    tokens_G1 = real_GS1.sum(1).clamp(min=1)
    fraction_GE = wanted_GSE.sum(1) / (choices * tokens_G1)
    proxy_GE = (probability_GSE * real_GS1).sum(1) / tokens_G1
    groups = (real_GS.sum(1) > 0).sum().clamp(min=1)
    z_GS = logits_GSE.logsumexp(-1).square() * real_GS
    return Dense(
        y=y_GSD,
        balance=(fraction_GE * proxy_GE).mean(-1).sum() / groups * num_experts**2,
        z_loss=(z_GS.sum(1) / tokens_G1[:, 0]).sum() / groups,
        dispatch_GSEC=dispatch_GSEC,
        combine_GSEC=combine_GSEC,
    )


@pytest.fixture(scope="session")
def dense() -> Callable[..., Dense]:
    """The oracle as a function of (layer, x_GSD, capacity, real_GS)."""
    return dense_layer
