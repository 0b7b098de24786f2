"""How far a figure may be off: percentile intervals of the bootstrap (Efron 1979), over groups.

Every figure here is a function of sums over examples, so a resample needs only the sums of the
groups that it drew. Suffixes: N examples, G groups, R resamples, K statistics.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Combine = Callable[[Floats], Floats]  # sums [..., K] to figures [...]

RESAMPLES = 1000
_CHUNK = 2**22  # numbers drawn at once


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure, and between which two the same measurement on other examples would mostly lie."""

    value: float
    low: float
    high: float


def bootstrap(
    statistics_NK: Floats,
    combine: Combine,
    groups_N: Sequence[Hashable] | None = None,
    *,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return combine(sum over examples) and its interval of the given confidence.

    groups_N: what belongs together and is drawn together, such as all questions about a text; every
    example is drawn by itself where None. The same seed draws the same groups.
    """
    sums_GK = _group_sums(np.asarray(statistics_NK, dtype=np.float64), groups_N)
    value = float(combine(sums_GK.sum(0)))
    num_groups = len(sums_GK)
    chance = np.random.default_rng(seed)
    figures: list[Floats] = []
    at_once = max(_CHUNK // num_groups, 1)
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        drawn_RG = chance.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=rows)
        figures.append(combine(drawn_RG @ sums_GK))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(figures), [tail, 1 - tail]).tolist()
    return Interval(value=value, low=low, high=high)


def ratio(sums: Floats) -> Floats:
    """Return the first sum over the second; what is not defined is 0."""
    return divide(sums[..., 0], sums[..., 1])


def divide(above: Floats, below: Floats) -> Floats:
    """Return the quotients, 0 where the divisor is not positive."""
    defined = below > 0
    return np.where(defined, above / np.where(defined, below, 1.0), 0.0)


def _group_sums(statistics_NK: Floats, groups_N: Sequence[Hashable] | None) -> Floats:
    if groups_N is None:
        return statistics_NK
    numbers: dict[Hashable, int] = {}
    group_N = [numbers.setdefault(group, len(numbers)) for group in groups_N]
    sums_GK = np.zeros((len(numbers), statistics_NK.shape[1]))
    np.add.at(sums_GK, group_N, statistics_NK)
    return sums_GK
