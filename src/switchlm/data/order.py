"""Randomness without state: hashes and permutations that are pure functions of a key and a counter.

Every random choice of this room is `hash(key, counter)`, so any step can be computed alone, by any
worker, in any order, and is the same on every machine. Suffixes: N numbers, L positions.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

UInt64 = NDArray[np.uint64]
Int64 = NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_ROUNDS = 6


def derive_key(*parts: int | str) -> int:
    """Return a 64-bit key for the purpose that `parts` spell out, such as (seed, "mask")."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix(values: UInt64) -> UInt64:
    """Scramble 64-bit words: the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * _FIRST
    values = (values ^ (values >> np.uint64(27))) * _SECOND
    return values ^ (values >> np.uint64(31))


def hash_numbers(key: int | UInt64, numbers_N: Int64) -> UInt64:
    """Hash each number under one key, or under a key of its own: uint64, uniform."""
    counter_N = (np.asarray(numbers_N).astype(np.uint64) + np.uint64(1)) * _GOLDEN
    return mix(np.asarray(key, dtype=np.uint64) + counter_N)


def hash_grid(key_N: UInt64, length: int) -> UInt64:
    """Return [N, length] uint64: the first `length` outputs of SplitMix64 started at each key."""
    counter_L = np.arange(1, length + 1, dtype=np.uint64) * _GOLDEN
    return mix(key_N[:, None] + counter_L[None, :])


def permute(index_N: Int64, size: int | Int64, key_N: UInt64) -> Int64:
    """Where each index of range(size) goes under the permutation that its key names.

    size: of all permutations, below 2**52; or one for each index.

    A Feistel network over a grid just larger than `size`; what falls outside walks on until it is
    inside again (Black and Rogaway 2002), which keeps it a bijection. O(1) memory a number.
    """
    size_N = np.broadcast_to(np.asarray(size, dtype=np.uint64), np.shape(index_N))
    grid_N = np.sqrt(size_N.astype(np.float64) - (size_N > 0)).astype(np.uint64) + np.uint64(1)
    grid_2N = np.stack([grid_N, (size_N + grid_N - np.uint64(1)) // grid_N])
    value_N = _feistel(np.asarray(index_N).astype(np.uint64), grid_2N, key_N)
    while (outside := np.flatnonzero(value_N >= size_N)).size:
        value_N[outside] = _feistel(value_N[outside], grid_2N[:, outside], key_N[outside])
    return value_N.astype(np.int64)


def _feistel(value_N: UInt64, grid_2N: UInt64, key_N: UInt64) -> UInt64:
    """One pass over grids of so many rows and columns, an own grid for each value."""
    rows, columns = grid_2N
    row_N, column_N = value_N // columns, value_N % columns
    for turn in range(_ROUNDS):
        turn_key_N = key_N + np.uint64(turn)
        if turn % 2 == 0:
            row_N = (row_N + mix(mix(turn_key_N) ^ column_N) % rows) % rows
        else:
            column_N = (column_N + mix(mix(turn_key_N) ^ row_N) % columns) % columns
    return row_N * columns + column_N
