"""Which source each sample comes from, and which of the source's samples it is.

Sources take turns in blocks of fixed quotas: within a block the samples of a source are spread
evenly, each a little off by a hash, and every sample of a source comes exactly once and in order.
So the share of a source is right in every stretch of the run, not only on average, and the answer
for a sample needs its number alone. Suffixes: S sources, N samples.
"""

from functools import lru_cache

import numpy as np

from switchlm.data.order import Int64, derive_key, hash_grid
from switchlm.errors import DataError

BLOCK = 2**15  # samples; the share of a source is a multiple of 1 / BLOCK


def probabilities(
    tokens_S: list[int], weights_S: list[float | None], mixing: str, exponent: float
) -> np.ndarray:
    """Return float64 shares that sum to one.

    `temperature` draws a source in proportion to tokens ** exponent (mT5, Xue et al. 2021, section
    3.1, with 0.3). Weights, where given, are taken as they are up to their sum.
    """
    given = [weight for weight in weights_S if weight is not None]
    if mixing == "weights" or given:
        if len(given) < len(weights_S):
            raise DataError(
                f"{len(given)} of {len(weights_S)} data sources have a weight. Write one for each, "
                "as in en=path:0.7, or for none."
            )
        if mixing == "temperature":
            raise DataError(
                "The data sources have weights, and data.mixing is 'temperature', which would set "
                "them. Drop the weights, or set data.mixing to 'weights'."
            )
        shares_S = np.array(given, dtype=np.float64)
    else:
        power = exponent if mixing == "temperature" else 1.0
        shares_S = np.array(tokens_S, dtype=np.float64) ** power
    return shares_S / shares_S.sum()


class Mixture:
    """Maps sample numbers to (source, index within the source); a pure function of the seed."""

    def __init__(self, probabilities_S: np.ndarray, seed: int) -> None:
        self.quotas_S = _quotas(probabilities_S)
        self._seed = seed
        self._block = lru_cache(maxsize=4)(self._arrange)

    def assign(self, sample_N: Int64) -> tuple[Int64, Int64]:
        """Return source_N and index_N, int64; index counts the source's own samples from 0."""
        sample_N = np.asarray(sample_N, dtype=np.int64)
        if len(self.quotas_S) == 1:
            return np.zeros_like(sample_N), sample_N
        source_N, index_N = np.empty_like(sample_N), np.empty_like(sample_N)
        block_N, place_N = sample_N // BLOCK, sample_N % BLOCK
        for block in np.unique(block_N):
            here = block_N == block
            sources, ranks = self._block(int(block))
            source_N[here] = sources[place_N[here]]
            index_N[here] = block * self.quotas_S[source_N[here]] + ranks[place_N[here]]
        return source_N, index_N

    def _arrange(self, block: int) -> tuple[Int64, Int64]:
        """Return for every place of a block its source and its rank among that source's places."""
        source_P = np.repeat(np.arange(len(self.quotas_S)), self.quotas_S)
        rank_P = np.arange(BLOCK) - (np.cumsum(self.quotas_S) - self.quotas_S)[source_P]
        key = np.array([derive_key(self._seed, "mixture", block)], dtype=np.uint64)
        jitter_P = hash_grid(key, BLOCK)[0] / 2.0**64
        order_P = np.argsort((rank_P + jitter_P) / self.quotas_S[source_P], kind="stable")
        return source_P[order_P], rank_P[order_P]


def _quotas(probabilities_S: np.ndarray) -> Int64:
    """Share out BLOCK samples by largest remainder, at least one to each that has any share."""
    drawn_S = (probabilities_S > 0).astype(np.int64)
    exact_S = probabilities_S * (BLOCK - drawn_S.sum())
    quotas_S = drawn_S + np.floor(exact_S).astype(np.int64)
    missing = BLOCK - int(quotas_S.sum())
    largest = np.argsort(-(exact_S - np.floor(exact_S)), kind="stable")[:missing]
    quotas_S[largest] += 1
    return quotas_S
