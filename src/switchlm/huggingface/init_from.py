"""Weights from one architecture to another: a sparse teacher's to a student, a dense model's to a
sparse one.

Every parameter of the target is accounted for: taken as it is, derived from others, or left as it
was drawn. Nothing is cut or stretched: shapes that do not fit are an error.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from switchlm.checkpoint.layout import full_region, part_of, region_of, slices
from switchlm.errors import CheckpointError
from switchlm.huggingface.config import stack_layers
from switchlm.huggingface.names import STACKS
from switchlm.model.config import ModelConfig
from switchlm.model.transformer import SwitchTransformer

# What a feed-forward network that stands for several experts starts from.
FeedForwardSource = Literal["random", "mean", "most_used"]

# Fields of a model that taken weights depend on, in their shape or in what they mean.
_SHARED = (
    "vocabulary_size", "d_model", "d_ff", "d_kv", "num_heads", "num_encoder_layers",
    "num_decoder_layers", "activation", "gated", "relative_buckets", "relative_distance",
)  # fmt: skip
_EXPERTS = ".feedforward.experts."
_ROUTER = ".feedforward.router."


@dataclass(frozen=True, kw_only=True)
class Account:
    """Where each parameter (and buffer) of the target came from, by name."""

    taken: tuple[str, ...]
    derived: tuple[str, ...]
    drawn: tuple[str, ...]


def check_fit(
    source: ModelConfig, target: ModelConfig, *, feedforward: FeedForwardSource | None = None
) -> None:
    """Raise CheckpointError where `transplant` would, from the configurations alone."""
    differing = [
        f"{field} {getattr(target, field)} (not {getattr(source, field)})"
        for field in _SHARED
        if getattr(source, field) != getattr(target, field)
    ]
    if differing:
        raise CheckpointError(
            "The weights of one model cannot start another of a different shape: the new model has "
            f"{', '.join(differing)}. Make these equal, or start from random weights."
        )
    if feedforward is None and _merges_experts(source, target):
        raise CheckpointError(
            f"The weights to start from have {source.num_experts} experts a Switch layer, and the "
            "model to start has other layers or experts. Only a dense model, or one of the same "
            "experts, can be gone on from; to make a smaller model of a sparse one, distil it."
        )


def _merges_experts(source: ModelConfig, target: ModelConfig) -> bool:
    """Return whether a Switch layer of the source is to become something else."""
    same = source.num_experts == target.num_experts
    return any(
        stack_layers(source, stack) - (stack_layers(target, stack) if same else frozenset())
        for stack in STACKS
    )


@torch.no_grad()
def transplant(
    source: SwitchTransformer,
    target: SwitchTransformer,
    *,
    feedforward: FeedForwardSource | None = None,
    load: Mapping[str, Tensor] | None = None,
) -> Account:
    """Copy what fits from `source`, which is whole, into `target`, which may be sharded.

    A dense network becomes every expert of a Switch layer (sparse upcycling, Komatsuzaki et al.
    2022), whose router stays as drawn. The experts of a Switch layer become a dense network, or
    fewer or more experts, by `feedforward`: `random` leaves what was drawn; `mean` takes the mean
    of all experts; `most_used` takes the busiest by `load` (of each Switch layer by name, [E]), and
    their rows of the router. None: no such case is to come up.

    Raises CheckpointError where the two differ in what both must share.
    """
    check_fit(source.config, target.config, feedforward=feedforward)
    givers = source.state_dict()
    taken: list[str] = []
    derived: list[str] = []
    drawn: list[str] = []
    for name, place in target.state_dict().items():
        shape = tuple(place.shape)
        giver = givers.get(name)
        if giver is not None and tuple(giver.shape) == shape:
            value: Tensor | None = giver
            taken.append(name)
        else:
            value = _derive(name, shape, source, givers, feedforward, load or {})
            (drawn if value is None else derived).append(name)
        if value is not None:
            box = region_of(place)
            part_of(place).copy_(value[slices(box, full_region(shape))])
    return Account(taken=tuple(taken), derived=tuple(derived), drawn=tuple(drawn))


def _derive(
    name: str,
    shape: tuple[int, ...],
    source: SwitchTransformer,
    givers: Mapping[str, Tensor],
    feedforward: FeedForwardSource | None,
    load: Mapping[str, Tensor],
) -> Tensor | None:
    """Return what a parameter starts from that the source has in another form; None for nothing."""
    if name == "head.weight":
        # A tied head multiplies with the embedding, its input scaled by d_model^-0.5.
        return source.embedding.weight * source.config.d_model**-0.5
    layer, _, part = name.partition(".feedforward.")
    layer += ".feedforward"
    kind = part.removeprefix("experts.").removesuffix(".weight")
    dense = givers.get(f"{layer}.{kind}.weight")
    if _EXPERTS in name and dense is not None:
        return dense.t().expand(shape)
    experts = givers.get(f"{layer}.experts.{kind}")
    if _ROUTER in name:
        experts = givers.get(name)  # for a router each expert is a row
    if experts is None:
        return None
    if feedforward == "random" or (feedforward == "mean" and _ROUTER in name):
        return None
    if feedforward == "mean":
        mean = experts.float().mean(0)
        return mean.expand(shape) if _EXPERTS in name else mean.t()
    busiest_E = load[layer].argsort(descending=True, stable=True)
    if _EXPERTS in name or _ROUTER in name:
        # With more experts than the source has, the busiest come twice.
        return experts[busiest_E[torch.arange(shape[0]) % len(busiest_E)]]
    return experts[busiest_E[0]].t()
