"""The order of samples as a pure function of seed and step: hashes, permutations, mixing, held out.

Every random choice of this package is `hash(key, counter)`, so any worker can compute any step, in
any order, with the same result on every machine.

Sources are interleaved in blocks with a fixed quota for each. Within a block the samples of a
source are evenly spaced, with a small jitter by a hash, and each comes exactly once, in order. So
the proportions hold in every part of the run, and the number of a sample determines its source.

Shapes: N numbers (of samples), L positions, S sources, D documents, P places of a block.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from switchlm.errors import DataError

UInt64 = NDArray[np.uint64]
Int64 = NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_ROUNDS = 6


def derive_key(*parts: int | str) -> int:
    """Return a 64-bit key for a purpose, such as (seed, "mask")."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix(values: UInt64) -> UInt64:
    """Scramble 64-bit words: the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * _FIRST
    values = (values ^ (values >> np.uint64(27))) * _SECOND
    return values ^ (values >> np.uint64(31))


def hash_numbers(key: int | UInt64, numbers_N: Int64) -> UInt64:
    """Hash each number with one key, or with one key per number: uint64, uniform."""
    counter_N = (np.asarray(numbers_N).astype(np.uint64) + np.uint64(1)) * _GOLDEN
    return mix(np.asarray(key, dtype=np.uint64) + counter_N)


def hash_grid(key_N: UInt64, length: int) -> UInt64:
    """Return [N, length] uint64: the first `length` outputs of SplitMix64 started at each key."""
    counter_L = np.arange(1, length + 1, dtype=np.uint64) * _GOLDEN
    return mix(key_N[:, None] + counter_L[None, :])


def permute(index_N: Int64, size: int | Int64, key_N: UInt64) -> Int64:
    """Return the image of each index under the permutation of range(size) given by its key.

    size: below 2**52, of all permutations, or one for each index.

    A Feistel network over a grid just larger than `size`; values outside are permuted again until
    they are inside (cycle walking, Black and Rogaway 2002). O(1) memory per number.
    """
    size_N = np.broadcast_to(np.asarray(size, dtype=np.uint64), np.shape(index_N))
    grid_N = np.sqrt(size_N.astype(np.float64) - (size_N > 0)).astype(np.uint64) + np.uint64(1)
    grid_2N = np.stack([grid_N, (size_N + grid_N - np.uint64(1)) // grid_N])
    value_N = _feistel(np.asarray(index_N).astype(np.uint64), grid_2N, key_N)
    while (outside := np.flatnonzero(value_N >= size_N)).size:
        value_N[outside] = _feistel(value_N[outside], grid_2N[:, outside], key_N[outside])
    return value_N.astype(np.int64)


def _feistel(value_N: UInt64, grid_2N: UInt64, key_N: UInt64) -> UInt64:
    """Permute each value once in its grid; grid_2N are the numbers of rows and columns."""
    rows, columns = grid_2N
    row_N, column_N = value_N // columns, value_N % columns
    for turn in range(_ROUNDS):
        turn_key_N = key_N + np.uint64(turn)
        if turn % 2 == 0:
            row_N = (row_N + mix(mix(turn_key_N) ^ column_N) % rows) % rows
        else:
            column_N = (column_N + mix(mix(turn_key_N) ^ row_N) % columns) % columns
    return row_N * columns + column_N


BLOCK = 2**15  # samples; the share of a source is a multiple of 1 / BLOCK


def probabilities(
    tokens_S: list[int], weights_S: list[float | None], mixing: str, exponent: float
) -> np.ndarray:
    """Return float64 shares that sum to one.

    `temperature` draws a source in proportion to tokens ** exponent (mT5, Xue et al. 2021, section
    3.1, with 0.3). Weights, if given, are normalised to a sum of one.
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
        """Return the source of every place of a block, and its rank among that source's places."""
        source_P = np.repeat(np.arange(len(self.quotas_S)), self.quotas_S)
        rank_P = np.arange(BLOCK) - (np.cumsum(self.quotas_S) - self.quotas_S)[source_P]
        key = np.array([derive_key(self._seed, "mixture", block)], dtype=np.uint64)
        jitter_P = hash_grid(key, BLOCK)[0] / 2.0**64
        order_P = np.argsort((rank_P + jitter_P) / self.quotas_S[source_P], kind="stable")
        return source_P[order_P], rank_P[order_P]


def _quotas(probabilities_S: np.ndarray) -> Int64:
    """Apportion BLOCK samples by largest remainder, at least one if the probability is not 0."""
    drawn_S = (probabilities_S > 0).astype(np.int64)
    exact_S = probabilities_S * (BLOCK - drawn_S.sum())
    quotas_S = drawn_S + np.floor(exact_S).astype(np.int64)
    missing = BLOCK - int(quotas_S.sum())
    largest = np.argsort(-(exact_S - np.floor(exact_S)), kind="stable")[:missing]
    quotas_S[largest] += 1
    return quotas_S


def choose_held_out(
    hashes_SD: Sequence[UInt64],
    lengths_SD: Sequence[Int64],
    share: float,
    least: int,
    *,
    aligned: bool = False,
) -> list[np.ndarray]:
    """Return for each source which of its documents are held out, bool [D].

    hashes_SD, lengths_SD: hash and tokens of each document; one array per source.
    share: of the documents. It depends on a document's own hash alone, so other documents do not
        change it.
    least: tokens of a source to hold out; if there are fewer, documents next in the order of hashes
        are added, up to half of the tokens and to twice what is wanted (see `choose_tail`).
    aligned: hold out the same groups in all sources, also those added for `least`, so that no
        translation of a held-out text is trained on; then up to half of the tokens.
    """
    chosen_SD = [
        _choose_by_hash(hashes_D, lengths_D, share, least, 1.0 if aligned else share)
        for hashes_D, lengths_D in zip(hashes_SD, lengths_SD, strict=True)
    ]
    held_out = [hashes_D[chosen_D] for hashes_D, chosen_D in zip(hashes_SD, chosen_SD, strict=True)]
    chosen = np.concatenate(held_out)
    if not aligned or not chosen.size:
        return chosen_SD
    # Documents with a small hash are chosen, so the largest chosen hash is the limit.
    return [hashes_D <= chosen.max() for hashes_D in hashes_SD]


def _choose_by_hash(
    hashes_D: UInt64, lengths_D: Int64, share: float, least: int, most: float
) -> np.ndarray:
    if share == 0:
        return np.zeros(len(hashes_D), dtype=bool)
    chosen_D = hashes_D < np.uint64(share * 2.0**64)
    total = int(lengths_D.sum())
    if total - lengths_D[chosen_D].sum() < least:  # nothing would remain to train on
        chosen_D = np.zeros(len(hashes_D), dtype=bool)
    if lengths_D[chosen_D].sum() < least:
        limit = min(max(share, 0.5) * total, 2 * max(most * total, least))
        for value in np.unique(hashes_D):
            with_next_D = hashes_D <= value
            if lengths_D[with_next_D].sum() > limit:
                break
            chosen_D = with_next_D
            if lengths_D[chosen_D].sum() >= least:
                break
    return chosen_D


def choose_tail(
    hashes_D: UInt64, lengths_D: Int64, chosen_D: np.ndarray, share: float, least: int
) -> tuple[int, int] | None:
    """Return a document, and how many of its last tokens to hold out; None if none is needed.

    So a source of one or a few large documents is split by position, where `choose_held_out` chose
    fewer than `least` tokens of it. The document is the first in the order of hashes that is long
    enough and not there twice. None too if less than `least` would remain to train on.
    """
    total, have = int(lengths_D.sum()), int(lengths_D[chosen_D].sum())
    wanted = max(int(share * total), least) - have
    if share == 0 or have >= least or total - have - wanted < least:
        return None
    _, first_D, times_D = np.unique(hashes_D, return_index=True, return_counts=True)
    for document in first_D[times_D == 1].tolist():
        if not chosen_D[document] and lengths_D[document] > wanted + 1:
            return document, wanted
    return None
