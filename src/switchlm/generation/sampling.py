"""Choose the next token: greedy, or sampled with temperature, top-k and top-p.

Shapes: B batch, V vocabulary.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from switchlm.errors import ConfigError

SMALLEST_TEMPERATURE = 1e-30  # far less is zero in float32, by which logits are not divided


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose the next token. The default is greedy.

    temperature: logits are divided by it; 0 is greedy.
    top_k: sample from the k most probable tokens only.
    top_p: then from the fewest of those whose probabilities sum to at least p (Holtzman et al.
        2020). Applied in this order.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        lowest = SMALLEST_TEMPERATURE
        if not (self.temperature == 0 or lowest <= self.temperature < float("inf")):
            raise ConfigError(
                f"The temperature must be 0 (greedy) or at least {lowest:g}, got "
                f"{self.temperature:g}."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top-k must be at least 1, got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top-p must be above 0 and at most 1, got {self.top_p}.")


GREEDY = Sampling()
LARGEST_SEED = 2**63 - 1


def seeds_from(seed: int | None, number: int) -> list[int]:
    """Return a seed for each of several outputs: consecutive ones from `seed`, or random ones.

    So equal prompts have different samples.
    """
    if seed is None:
        return [secrets.randbelow(LARGEST_SEED) for _ in range(number)]
    return [(seed + place) % (LARGEST_SEED + 1) for place in range(number)]


def uniforms(seeds: Sequence[int], length: int) -> Tensor:
    """Return float32 [B, length] in [0, 1), each row from its own seed.

    A row does not depend on the other rows; a longer row starts with the same numbers.
    """
    streams = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        streams.append(torch.rand(length, generator=generator))
    return torch.stack(streams)


class Draws:
    """The numbers of `uniforms`, one of every row at a time, without a limit."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def next(self) -> Tensor:
        """Return the next number of each row, float32 [B]."""
        return torch.cat([torch.rand(1, generator=one) for one in self._generators])


def next_tokens(logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor | None) -> Tensor:
    """Return token_B, int64.

    uniform_B: a number in [0, 1) per row; None for greedy.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    assert uniform_B is not None
    probability_BV, token_BV = candidates(logits_BV, sampling)
    # Invert the cumulative distribution.
    reached_BV = probability_BV.cumsum(-1)
    place_B1 = torch.searchsorted(reached_BV, uniform_B[:, None] * reached_BV[:, -1:], right=True)
    last_B1 = (probability_BV > 0).sum(-1, keepdim=True) - 1
    last_B1 = last_B1.clamp(min=0)  # of a row of NaN, whose token is not used
    return token_BV.gather(1, torch.minimum(place_B1, last_B1))[:, 0]


def candidates(logits_BV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return probability_BV (float32, descending, zero where excluded) and the tokens in order.

    At least one candidate per row remains. The temperature must be above 0.
    """
    logits_BV, token_BV = logits_BV.float().sort(dim=-1, descending=True, stable=True)
    # Subtract the maximum first: large logits over a small temperature overflow.
    probability_BV = ((logits_BV - logits_BV[:, :1]) / sampling.temperature).softmax(-1)
    if sampling.top_k is not None:
        probability_BV[:, sampling.top_k :] = 0
        probability_BV = probability_BV / probability_BV.sum(-1, keepdim=True)
    if sampling.top_p < 1:
        before_BV = probability_BV.cumsum(-1) - probability_BV
        outside_BV = before_BV >= sampling.top_p
        outside_BV[:, 0] = False
        probability_BV = probability_BV.masked_fill(outside_BV, 0.0)
    return probability_BV / probability_BV.sum(-1, keepdim=True), token_BV
