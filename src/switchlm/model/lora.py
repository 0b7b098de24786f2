"""Low-rank adapters (LoRA, Hu et al. 2021) on attention and on experts, added to a built model.

An adapted weight is W + scale * A B, and only A and B train. Dense projections have one pair;
stacked experts have a pair each, [E, D, K] and [E, K, F], by grouped matmul. B is zero at first, so
an adapted model equals its base model before training.

Shapes: D in, F out, K rank, E experts, R rows in the order of their experts.
"""

from collections.abc import Iterator
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from switchlm.errors import ConfigError
from switchlm.kernels.reference import Map, feed_forward
from switchlm.kernels.select import grouped_matmul
from switchlm.model.attention import Attention, SwitchAttention
from switchlm.model.config import Initialisation
from switchlm.model.experts import FeedForwardExperts, ProjectionExperts
from switchlm.model.initialise import Initialiser
from switchlm.model.layers import local
from switchlm.model.transformer import SwitchTransformer


class AdaptedLinear(nn.Module):
    """A frozen linear map and its low-rank pair."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        linear = partial(nn.Linear, bias=False, device=base.weight.device, dtype=base.weight.dtype)
        self.base = base
        self.a = linear(base.in_features, rank)
        self.b = linear(rank, base.out_features)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * self.b(self.a(x))

    def merged(self) -> dict[str, Tensor]:
        """Return the weights of the plain module that computes the same."""
        return {"weight": _merge(self.base.weight, self.scale, self.b.weight, self.a.weight)}


class Pair(nn.Module):
    """The low-rank pairs of one stacked weight, a_EDK and b_EKF."""

    def __init__(self, weight_EDF: Tensor, rank: int) -> None:
        super().__init__()
        num_experts, width_in, width_out = weight_EDF.shape
        self.a = nn.Parameter(weight_EDF.new_empty(num_experts, width_in, rank))
        self.b = nn.Parameter(weight_EDF.new_empty(num_experts, rank, width_out))

    def forward(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        return grouped_matmul(grouped_matmul(x_RD, self.a, counts_E), self.b, counts_E)


class AdaptedExperts(nn.Module):
    """Frozen experts and a pair for each of their stacked weights (see the `Experts` protocol)."""

    def __init__(
        self, base: FeedForwardExperts | ProjectionExperts, rank: int, scale: float
    ) -> None:
        super().__init__()
        self.base = base
        self.pairs = nn.ModuleDict(
            {name: Pair(weight, rank) for name, weight in base.named_parameters()}
        )
        self.num_experts = base.num_experts
        self.scale = scale

    def forward(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        base = self.base
        if isinstance(base, ProjectionExperts):
            return self._map("projection", counts_E)(x_RD)
        return feed_forward(
            x_RD,
            self._map("up", counts_E),
            None if base.gate is None else self._map("gate", counts_E),
            self._map("down", counts_E),
            base.activation,
            base.dropout if self.training else 0.0,
        )

    def _map(self, name: str, counts_E: Tensor) -> Map:
        """Return the map of one of the stacked weights plus its pair."""
        weight, pair = local(getattr(self.base, name)), self.pairs[name]
        return lambda rows: (
            grouped_matmul(rows, weight, counts_E) + self.scale * pair(rows, counts_E)
        )

    def merged(self) -> dict[str, Tensor]:
        """Return the weights of the plain module that computes the same."""
        found = {}
        for name, weight in self.base.named_parameters():
            pair = cast(Pair, self.pairs[name])
            found[name] = _merge(weight, self.scale, pair.a, pair.b)
        return found


Adapted = AdaptedLinear | AdaptedExperts


def _merge(weight: Tensor, scale: float, left: Tensor, right: Tensor) -> Tensor:
    """Return weight + scale * left @ right, computed in float32 and rounded once."""
    return (weight.float() + scale * (left.float() @ right.float())).to(weight.dtype)


def apply(model: SwitchTransformer, rank: int, alpha: float, seed: int = 0) -> None:
    """Freeze the model and add adapters to its attention projections and experts, in place.

    rank: K; ConfigError where it is larger than a width of a weight.
    alpha: the scale of A B, times the rank.
    seed: of A.
    """
    model.requires_grad_(False)
    for name, part in list(_adaptable(model)):
        narrowest = min(width for weight in part.parameters() for width in weight.shape[-2:])
        if rank > narrowest:
            raise ConfigError(
                f"The rank {rank} of the adapters is larger than {narrowest}, a width of "
                f"{name}: choose a rank of at most {narrowest}; 4 to 64 are usual."
            )
        adapted: Adapted
        if isinstance(part, nn.Linear):
            adapted = AdaptedLinear(part, rank, alpha / rank)
        else:
            adapted = AdaptedExperts(part, rank, alpha / rank)
        model.set_submodule(name, adapted.train(part.training))
    initialiser = Initialiser(Initialisation(scale=1.0), seed=seed)
    with torch.no_grad():
        for name, parameter in adapters(model).items():
            if name.removesuffix(".weight").endswith(".b"):
                parameter.zero_()
            elif not parameter.is_meta:
                parameter.copy_(initialiser.draw(name, tuple(parameter.shape)))


def adapters(model: SwitchTransformer) -> dict[str, Tensor]:
    """Return the pairs by name, all trained parameters of an adapted model; not copied."""
    return {
        f"{name}.{inner}": parameter
        for name, part in _adapted(model)
        for inner, parameter in part.named_parameters()
        if not inner.startswith("base.")
    }


@torch.no_grad()
def merged(model: SwitchTransformer) -> SwitchTransformer:
    """Return a plain model that computes the same; weights without adapter are shared."""
    parts = dict(_adapted(model))
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not any(name.startswith(f"{adapted}.") for adapted in parts)
    }
    for name, part in parts.items():
        state |= {f"{name}.{inner}": tensor for inner, tensor in part.merged().items()}
    with torch.device("meta"):
        plain = SwitchTransformer(model.config, model.metadata)
    plain.load_state_dict(state, assign=True)
    return plain.train(model.training)


def _adaptable(
    model: nn.Module,
) -> Iterator[tuple[str, nn.Linear | FeedForwardExperts | ProjectionExperts]]:
    """Yield the attention projections and the experts, by name."""
    for name, module in model.named_modules():
        if isinstance(module, FeedForwardExperts | ProjectionExperts):
            yield name, module
        elif isinstance(module, Attention | SwitchAttention):
            for inner, part in module.named_children():
                if isinstance(part, nn.Linear):
                    yield f"{name}.{inner}", part


def _adapted(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear | AdaptedExperts):
            yield name, module
