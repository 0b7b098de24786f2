"""Models of fewer experts: prune the least important, or merge those that are similar.

The importance of an expert on a text is its number of tokens, or the change of the loss without it.
Experts are merged by the mean of their weights, after their hidden units are matched.

Shapes: E experts, N experts that stay, D d_model, F d_ff, R rows in the order of their experts.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from switchlm.config import check_choice
from switchlm.data.batch import Batch
from switchlm.errors import ConfigError
from switchlm.generation.decode import evaluation_mode
from switchlm.model.config import ModelConfig
from switchlm.model.experts import Experts, FeedForwardExperts
from switchlm.model.losses import token_losses
from switchlm.model.routing import Routing
from switchlm.model.switch import SwitchLayer, switch_layers
from switchlm.model.transformer import SwitchTransformer, forward_batch

Measure = Literal["load", "gradient"]


class MaskedExperts(nn.Module):
    """Experts whose outputs are multiplied by a mask of ones, for its gradient.

    mask_R: of the last rows.
    counts_E: rows of each expert among them.
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
        counts = self.counts_E.tolist()
        rows = value_R[: sum(counts)].cpu().double().split(counts)
        return torch.stack([value.sum() for value in rows])


def importance(
    model: SwitchTransformer, batches: Sequence[Batch], by: Measure
) -> dict[str, Tensor]:
    """Return a score per expert for each Switch layer by name, float64 [E]; large is important.

    The model is run as in evaluation, its capacity included, and is not changed.

    by: `load`, the assignments that the expert took; `gradient`, the absolute change of the summed
        loss, to first order, if the expert's output were zero for one token, summed over its tokens
        (after Molchanov et al. 2017). Both as a fraction of the layer's total.
    """
    check_choice(by, Measure, "by")
    layers = list(switch_layers(model).values())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    measure = _loads if by == "load" else _gradients
    totals = [torch.zeros(layer.experts.num_experts, dtype=torch.float64) for layer in layers]
    try:
        with evaluation_mode(model):
            for scores in measure(model, layers, batches):
                for total_E, score_E in zip(totals, scores, strict=True):
                    total_E += score_E
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    shares = (total_E / total_E.sum().clamp(min=1e-30) for total_E in totals)
    return dict(zip(switch_layers(model), shares, strict=True))


def _loads(
    model: SwitchTransformer, layers: Sequence[SwitchLayer], batches: Sequence[Batch]
) -> Iterator[list[Tensor]]:
    """Yield for each batch the loads of the experts of each layer."""
    for batch in batches:
        _, routing = _run(model, batch)
        yield [
            torch.bincount(one.expert_A[one.kept_A], minlength=layer.experts.num_experts).cpu()
            for layer, one in zip(layers, routing, strict=True)
        ]


def _gradients(
    model: SwitchTransformer, layers: Sequence[SwitchLayer], batches: Sequence[Batch]
) -> Iterator[list[Tensor]]:
    """Yield for each batch the gradient scores of the experts of each layer."""
    masked = [MaskedExperts(layer.experts) for layer in layers]
    try:
        for layer, one in zip(layers, masked, strict=True):
            layer.experts = one
        for batch in batches:
            with torch.enable_grad():
                loss, _ = _run(model, batch)
            gradients = torch.autograd.grad(loss, [one.mask_R for one in masked])
            yield [
                one.by_expert(gradient_R.abs())
                for one, gradient_R in zip(masked, gradients, strict=True)
            ]
    finally:
        for layer, one in zip(layers, masked, strict=True):
            layer.experts = one.base


def _run(model: SwitchTransformer, batch: Batch) -> tuple[Tensor, tuple[Routing, ...]]:
    """Return the summed loss of the targets, and the routing of all Switch layers."""
    here = batch.to(model.embedding.weight.device)
    output = forward_batch(model, here)
    loss_BT = token_losses(output.logits_BTV, here.targets_BT)
    return torch.where(here.target_mask_BT, loss_BT, 0.0).sum(), output.routing


def cluster(layer: SwitchLayer, score_E: Tensor, number: int) -> list[list[int]]:
    """Return groups of experts, first its centre: one of the `number` that score highest.

    The similarity of two experts is the cosine of their rows of the router's weight, minus the mean
    over all experts.
    """
    row_ED = layer.router.weight.detach().float().cpu()
    row_ED = nn.functional.normalize(row_ED - row_ED.mean(0), dim=1)
    order = score_E.argsort(descending=True, stable=True).tolist()
    groups = [[centre] for centre in order[:number]]
    for other in order[number:]:
        similarity = row_ED[order[:number]] @ row_ED[other]
        groups[int(similarity.argmax())].append(other)
    return groups


def align(experts: FeedForwardExperts, centre: int, other: int) -> Tensor:
    """Return for each hidden unit of the centre the most similar unit of the other, [F].

    Each is matched once: repeatedly, of the remaining units, those that are each other's most
    similar. The similarity of two units is the cosine of all their weights, in and out.
    """

    def units(expert: int) -> Tensor:
        weights = [experts.up[expert].t(), experts.down[expert]]
        if experts.gate is not None:
            weights.append(experts.gate[expert].t())
        joined_FW = torch.cat([weight.detach().float() for weight in weights], 1)
        return nn.functional.normalize(joined_FW, dim=1)

    similarity_FF = units(centre) @ units(other).t()
    order_F = torch.full((similarity_FF.shape[0],), -1)
    while (order_F < 0).any():
        best_F, chosen_F = similarity_FF.argmax(1), similarity_FF.argmax(0)
        unit_F = torch.arange(len(order_F))
        mutual_F = (chosen_F[best_F] == unit_F) & (order_F < 0)
        order_F[mutual_F] = best_F[mutual_F]
        similarity_FF[mutual_F] = -torch.inf
        similarity_FF[:, best_F[mutual_F]] = -torch.inf
    return order_F


def check_number(config: ModelConfig, number: int, most: int, option: str) -> None:
    """Raise ConfigError unless `number` of `most` experts per layer can stay.

    option: the command-line option, for the message.
    """
    least = config.router.experts_per_token
    if not most:
        raise ConfigError(f"{option} is {number}, but the model is dense: it has no experts.")
    if not least <= number < most:
        raise ConfigError(
            f"{option} is {number}; of the {most} experts per layer at least {least} and at most "
            f"{most - 1} can stay."
        )


@torch.no_grad()
def prune(
    model: SwitchTransformer, scores: Mapping[str, Tensor], keep: int
) -> tuple[SwitchTransformer, dict[str, list[int]]]:
    """Return a model of the `keep` experts per layer that score highest, and their indices.

    Routers lose the rows of the other experts, whose tokens go to the next best that stays.

    scores: see `importance`.
    """
    check_number(model.config, keep, model.config.num_experts, "--keep-experts")
    kept = {
        name: sorted(score_E.argsort(descending=True, stable=True)[:keep].tolist())
        for name, score_E in scores.items()
    }
    state = model.state_dict()
    for name, layer in switch_layers(model).items():
        for key, tensor in layer.state_dict().items():
            state[f"{name}.{key}"] = tensor[kept[name]]
    return _smaller(model, state, keep), kept


@torch.no_grad()
def merge(
    model: SwitchTransformer, scores: Mapping[str, Tensor], number: int
) -> tuple[SwitchTransformer, dict[str, list[list[int]]]]:
    """Return a model of `number` experts per layer, and which were merged into each.

    In every layer the experts that score highest are the centres; each other expert is merged into
    the most similar centre. A centre becomes the mean of its group, weighted by load, with hidden
    units in the centre's order (Li et al. 2024). Routers' rows are averaged too.

    scores: the loads.
    """
    check_number(model.config, number, model.config.num_experts, "--merge-experts")
    state = model.state_dict()
    groups = {}
    for name, layer in switch_layers(model).items():
        groups[name] = cluster(layer, scores[name], number)
        for key, tensor in (layer.state_dict() | _aligned(layer, groups[name])).items():
            means = [_mean(tensor, group, scores[name]) for group in groups[name]]
            state[f"{name}.{key}"] = torch.stack(means)
    return _smaller(model, state, number), groups


def _mean(tensor_E: Tensor, group: list[int], score_E: Tensor) -> Tensor:
    """Return the mean over a group, weighted by score; that of the centre if all are zero."""
    weight_G = score_E[group].to(tensor_E)
    if not weight_G.sum() > 0:
        return tensor_E[group[0]].clone()
    weight_G = weight_G / weight_G.sum()
    return torch.einsum("g,g...->...", weight_G, tensor_E[group])


def _aligned(layer: SwitchLayer, groups: list[list[int]]) -> dict[str, Tensor]:
    """Return the feed-forward weights with every expert's hidden units in its centre's order."""
    experts = layer.experts
    if not isinstance(experts, FeedForwardExperts):
        return {}
    found = {f"experts.{key}": one.clone() for key, one in experts.state_dict().items()}
    for centre, *others in groups:
        for other in others:
            order_F = align(experts, centre, other)
            for key, tensor in found.items():
                place = tensor[other]
                place.copy_(place[order_F] if key.endswith("down") else place[:, order_F])
    return found


def _smaller(
    model: SwitchTransformer, state: dict[str, Tensor], num_experts: int
) -> SwitchTransformer:
    with torch.device("meta"):
        config = dataclasses.replace(model.config, num_experts=num_experts)
        smaller = SwitchTransformer(config, model.metadata)
    smaller.load_state_dict(state, assign=True)
    return smaller.train(model.training)
