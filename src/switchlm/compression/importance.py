"""How much each expert matters on a text: by the tokens it takes, or by what the loss would lose.

Shapes: R rows in the order of their experts, D width, E experts.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from switchlm.data.batch import Batch
from switchlm.model.experts import Experts
from switchlm.model.losses import token_losses
from switchlm.model.routing import Routing
from switchlm.model.switch import SwitchLayer
from switchlm.model.transformer import SwitchTransformer, shift_right

Measure = Literal["load", "gradient"]


class MaskedExperts(nn.Module):
    """Experts whose outputs are multiplied with a mask of ones, for its gradient.

    mask_R: of the last rows; counts_E: how many of them each expert had.
    """

    mask_R: Tensor
    counts_E: Tensor

    def __init__(self, base: Experts) -> None:
        super().__init__()
        self.base = base
        self.num_experts = base.num_experts

    def forward(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        y_RD = self.base(x_RD, counts_E)
        self.mask_R = torch.ones(y_RD.shape[0], device=y_RD.device, requires_grad=True)
        self.counts_E = counts_E
        return y_RD * self.mask_R[:, None].to(y_RD.dtype)

    def by_expert(self, value_R: Tensor) -> Tensor:
        """Return the sum over each expert's rows, float64 [E]."""
        counts_E = self.counts_E.cpu()
        expert_R = torch.repeat_interleave(torch.arange(self.num_experts), counts_E)
        sum_E = torch.zeros(self.num_experts, dtype=torch.float64)
        return sum_E.index_add_(0, expert_R, value_R[: expert_R.numel()].double().cpu())


def switch_layers(model: nn.Module) -> dict[str, SwitchLayer]:
    """Return the Switch layers by name, in the order of the routing records."""
    return {name: part for name, part in model.named_modules() if isinstance(part, SwitchLayer)}


def importance(
    model: SwitchTransformer, batches: Sequence[Batch], by: Measure
) -> dict[str, Tensor]:
    """Return a score an expert for each Switch layer by name, float64 [E]; more is more important.

    load: the assignments that the expert took. gradient: by how much the summed loss would change,
    to first order, if the expert's output were zero for one token, in absolute value, summed over
    its tokens (after Molchanov et al. 2017). Both as a share of the layer's.

    The model is run as in evaluation, its capacity included, and is left as it was.
    """
    layers = switch_layers(model)
    training = model.training
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        if by == "load":
            scores = _loads(model, layers, batches)
        else:
            scores = _gradients(model, layers, batches)
    finally:
        model.train(training)
        for parameter in trained:
            parameter.requires_grad_(True)
    return {name: score / score.sum().clamp(min=1e-30) for name, score in scores.items()}


@torch.no_grad()
def _loads(
    model: SwitchTransformer, layers: dict[str, SwitchLayer], batches: Sequence[Batch]
) -> dict[str, Tensor]:
    scores = {
        name: torch.zeros(layer.experts.num_experts, dtype=torch.float64)
        for name, layer in layers.items()
    }
    for batch in batches:
        _, routing = _run(model, batch)
        for name, record in zip(layers, routing, strict=True):
            expert_A = record.expert_A[record.kept_A].cpu()
            scores[name] += torch.bincount(expert_A, minlength=scores[name].numel())
    return scores


def _gradients(
    model: SwitchTransformer, layers: dict[str, SwitchLayer], batches: Sequence[Batch]
) -> dict[str, Tensor]:
    masked = {name: MaskedExperts(layer.experts) for name, layer in layers.items()}
    scores = {
        name: torch.zeros(one.num_experts, dtype=torch.float64) for name, one in masked.items()
    }
    try:
        for name, layer in layers.items():
            layer.experts = masked[name]
        for batch in batches:
            loss, _ = _run(model, batch)
            masks = [one.mask_R for one in masked.values()]
            gradients = torch.autograd.grad(loss, masks)
            for (name, one), gradient_R in zip(masked.items(), gradients, strict=True):
                scores[name] += one.by_expert(gradient_R.abs())
    finally:
        for name, layer in layers.items():
            layer.experts = masked[name].base
    return scores


def _run(model: SwitchTransformer, batch: Batch) -> tuple[Tensor, tuple[Routing, ...]]:
    """Return the summed loss of the targets, and the routing of all Switch layers."""
    here = batch.to(model.embedding.weight.device)
    decoder_inputs_BT = shift_right(here.targets_BT, here.target_segments_BT, model.config.pad_id)
    output = model(
        here.inputs_BS, decoder_inputs_BT, here.input_segments_BS, here.target_segments_BT
    )
    loss_BT = token_losses(output.logits_BTV, here.targets_BT)
    return torch.where(here.target_mask_BT, loss_BT, 0.0).sum(), output.routing
