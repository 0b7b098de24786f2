"""Models of fewer experts: prune those that matter least, or merge those that are alike.

Shapes: E experts, N experts left, D d_model, F d_ff.
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from switchlm.compression.alike import align, cluster
from switchlm.compression.importance import switch_layers
from switchlm.errors import ConfigError
from switchlm.model.config import ModelConfig
from switchlm.model.experts import FeedForwardExperts
from switchlm.model.switch import SwitchLayer
from switchlm.model.transformer import SwitchTransformer


def check_number(config: ModelConfig, number: int, most: int, option: str) -> None:
    """Raise ConfigError unless of `most` experts a layer that many can be left.

    option: what asked for it, for the message.
    """
    least = config.router.experts_per_token
    if not most:
        raise ConfigError(f"{option} is {number}, but the model is dense: it has no experts.")
    if not least <= number < most:
        raise ConfigError(
            f"{option} is {number}; of the {most} experts a layer at least {least} and at most "
            f"{most - 1} can stay."
        )


@torch.no_grad()
def prune(
    model: SwitchTransformer, scores: Mapping[str, Tensor], keep: int
) -> tuple[SwitchTransformer, dict[str, list[int]]]:
    """Return a model of the `keep` experts a layer that score highest, and which they were.

    scores: see importance.py. Routers lose the rows of the experts that go, so that their tokens go
    to the next best of those that stay.
    """
    check_number(model.config, keep, model.config.num_experts, "--keep-experts")
    kept = {
        name: sorted(score_E.argsort(descending=True, stable=True)[:keep].tolist())
        for name, score_E in scores.items()
    }
    state = dict(model.state_dict())
    for name, layer in switch_layers(model).items():
        for key, tensor in _stacked(name, layer):
            state[key] = tensor[kept[name]].clone()
    return _smaller(model, state, keep), kept


@torch.no_grad()
def merge(
    model: SwitchTransformer, scores: Mapping[str, Tensor], number: int
) -> tuple[SwitchTransformer, dict[str, list[list[int]]]]:
    """Return a model of `number` experts a layer, and which were merged into each.

    scores: the loads. In every layer the experts that score highest are kept as centres; each
    other expert joins the centre that is most like it, and a centre becomes the mean of its group,
    weighted by load, hidden units first brought into the centre's order (Li et al. 2024). Routers'
    rows are averaged likewise.
    """
    check_number(model.config, number, model.config.num_experts, "--merge-experts")
    state = dict(model.state_dict())
    groups = {}
    for name, layer in switch_layers(model).items():
        score_E = scores[name]
        groups[name] = cluster(layer, score_E, number)
        aligned = {
            f"{name}.experts.{key}": tensor for key, tensor in _aligned(layer, groups[name]).items()
        }
        for key, tensor in _stacked(name, layer):
            tensor = aligned.get(key, tensor)
            state[key] = torch.stack([_mean(tensor, group, score_E) for group in groups[name]])
    return _smaller(model, state, number), groups


def _mean(tensor_E: Tensor, group: list[int], score_E: Tensor) -> Tensor:
    """Return the mean over a group, by score; over experts that nothing chose, the centre's."""
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
    found = {key: tensor.detach().clone() for key, tensor in experts.named_parameters()}
    for centre, *others in groups:
        for other in others:
            order_F = align(experts, centre, other)
            for key, tensor in found.items():
                place = tensor[other]
                place.copy_(place[order_F] if key == "down" else place[:, order_F])
    return found


def _stacked(name: str, layer: SwitchLayer) -> list[tuple[str, Tensor]]:
    """Return what has a row an expert: the router's weight and bias, and the experts."""
    found = [(f"{name}.router.weight", layer.router.weight.detach())]
    if layer.router.bias_E is not None:
        found.append((f"{name}.router.bias_E", layer.router.bias_E))
    experts = layer.experts
    assert isinstance(experts, torch.nn.Module)
    found += [(f"{name}.experts.{key}", one.detach()) for key, one in experts.named_parameters()]
    return found


def _smaller(
    model: SwitchTransformer, state: dict[str, Tensor], num_experts: int
) -> SwitchTransformer:
    with torch.device("meta"):
        smaller = SwitchTransformer(dataclasses.replace(model.config, num_experts=num_experts))
    smaller.load_state_dict(state, assign=True)
    return smaller.train(model.training)
