"""Initialise a model from the weights of another architecture: a student from a sparse teacher, a
sparse model from a dense one (sparse upcycling).

Every parameter is copied, derived from others, or keeps its random initial value. Nothing is
truncated or padded: shapes that do not fit are an error.
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

# How a feed-forward network is initialised from several experts.
FeedForwardSource = Literal["random", "mean", "most_used"]

# Fields of a configuration that must be equal: shapes or the meaning of weights depend on them.
_SHARED = (
    "vocabulary_size", "d_model", "d_ff", "d_kv", "num_heads", "num_encoder_layers",
    "num_decoder_layers", "activation", "gated", "relative_buckets", "relative_distance",
    "scaled_head",
)  # fmt: skip
_EXPERTS = ".feedforward.experts."
_ROUTER = ".feedforward.router."


@dataclass(frozen=True, kw_only=True)
class InitResult:
    """How each parameter (and buffer) of the target was initialised, by name."""

    copied: tuple[str, ...]
    derived: tuple[str, ...]
    random: tuple[str, ...]


def check_fit(
    source: ModelConfig, target: ModelConfig, *, feedforward: FeedForwardSource | None = None
) -> None:
    """Raise the CheckpointError of `init_from`, from the configurations alone."""
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
            f"The weights to start from have {source.num_experts} experts per Switch layer; the "
            "new model has other layers or experts. Start from a dense model, or from one with the "
            "same experts; to make a smaller model from a sparse one, distil it."
        )


def _merges_experts(source: ModelConfig, target: ModelConfig) -> bool:
    """Return whether a Switch layer of the source has no equal in the target."""
    same = source.num_experts == target.num_experts
    return any(
        stack_layers(source, stack) - (stack_layers(target, stack) if same else frozenset())
        for stack in STACKS
    )


@torch.no_grad()
def init_from(
    source: SwitchTransformer,
    target: SwitchTransformer,
    *,
    feedforward: FeedForwardSource | None = None,
    load: Mapping[str, Tensor] | None = None,
) -> InitResult:
    """Initialise `target` from `source`.

    source: an unsharded model.
    target: changed in place; it may be sharded.
    feedforward: how experts become a dense network, or fewer or more experts. `random` keeps the
        random weights; `mean` takes the mean of all experts; `most_used` takes those of highest
        load, and their rows of the router. None: raise an error instead.
    load: for `most_used`, the load of each Switch layer by name, [E].

    A dense network becomes every expert of a Switch layer (sparse upcycling, Komatsuzaki et al.
    2022), whose router stays random. Raises CheckpointError for configurations that do not fit.
    """
    check_fit(source.config, target.config, feedforward=feedforward)
    source_state = source.state_dict()
    copied: list[str] = []
    derived: list[str] = []
    random: list[str] = []
    for name, parameter in target.state_dict().items():
        shape = tuple(parameter.shape)
        tensor = source_state.get(name)
        if tensor is not None and tuple(tensor.shape) == shape:
            value: Tensor | None = tensor
            copied.append(name)
        else:
            value = _derive(name, shape, source, source_state, feedforward, load or {})
            (random if value is None else derived).append(name)
        if value is not None:
            region = region_of(parameter)
            part_of(parameter).copy_(value[slices(region, full_region(shape))])
    return InitResult(copied=tuple(copied), derived=tuple(derived), random=tuple(random))


def _derive(
    name: str,
    shape: tuple[int, ...],
    source: SwitchTransformer,
    source_state: Mapping[str, Tensor],
    feedforward: FeedForwardSource | None,
    load: Mapping[str, Tensor],
) -> Tensor | None:
    """Return the initial value of a parameter that the source lacks; None: keep the random one."""
    if name == "head.weight":
        # A tied head multiplies its input by the embedding and by d_model^-0.5.
        return source.embedding.weight * source.config.d_model**-0.5
    layer, _, part = name.partition(".feedforward.")
    layer += ".feedforward"
    kind = part.removeprefix("experts.").removesuffix(".weight")
    dense = source_state.get(f"{layer}.{kind}.weight")
    if _EXPERTS in name and dense is not None:
        return dense.t().expand(shape)
    experts = source_state.get(f"{layer}.experts.{kind}")
    if _ROUTER in name:
        experts = source_state.get(name)  # one row per expert
    if experts is None:
        return None
    if feedforward == "random" or (feedforward == "mean" and _ROUTER in name):
        return None
    if feedforward == "mean":
        mean = experts.float().mean(0)
        return mean.expand(shape) if _EXPERTS in name else mean.t()
    busiest_E = load[layer].argsort(descending=True, stable=True)
    if _EXPERTS in name or _ROUTER in name:
        # With more experts than the source has, the busiest are repeated.
        return experts[busiest_E[torch.arange(shape[0]) % len(busiest_E)]]
    return experts[busiest_E[0]].t()
