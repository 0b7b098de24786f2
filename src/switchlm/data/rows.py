"""Rows of raw tokens out of a token cache: examples of text, before they are masked.

Running text is here, packed documents are in packing.py; both answer `examples(index_N)`. A
source's rows are numbered on for ever: row `num_rows` is the first of the second pass, shuffled
anew. Suffixes: D documents, N rows, E examples in those rows, L raw positions.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from switchlm.data.cache import TokenCache
from switchlm.data.order import Int64, derive_key, hash_numbers, permute


class Rows(Protocol):
    """What a source of rows answers."""

    num_rows: int
    num_tokens: int

    def examples(self, index_N: Int64) -> "Examples":
        """Return the examples in the rows of those numbers."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Raw tokens of E examples: tokens_EL is padded on the right; row_E says which row each is in,
    counting from 0, and examples of a row are neighbours."""

    tokens_EL: Int64
    length_E: Int64
    row_E: Int64

    @property
    def place_E(self) -> Int64:
        """The place of each example in its row, from 0."""
        return np.arange(len(self.row_E)) - np.searchsorted(self.row_E, self.row_E)


def join(parts: list[Examples]) -> Examples:
    """Return the examples of all parts in the order of their rows."""
    if len(parts) == 1:
        return parts[0]
    longest = max(part.tokens_EL.shape[1] for part in parts)
    widened = [
        np.pad(part.tokens_EL, ((0, 0), (0, longest - part.tokens_EL.shape[1]))) for part in parts
    ]
    row_E = np.concatenate([part.row_E for part in parts])
    order_E = np.argsort(row_E, kind="stable")
    return Examples(
        tokens_EL=np.concatenate(widened)[order_E],
        length_E=np.concatenate([part.length_E for part in parts])[order_E],
        row_E=row_E[order_E],
    )


def shuffle(index_N: Int64, num_rows: int, seed: int) -> tuple[Int64, Int64]:
    """Return the pass over the source that each number belongs to, and its row in that pass."""
    pass_N, place_N = index_N // num_rows, index_N % num_rows
    key_N = hash_numbers(derive_key(seed, "order"), pass_N)
    return pass_N, permute(place_N, num_rows, key_N)


class RunningText:
    """Rows of `row_length` tokens cut from the chosen documents, end to end.

    Every pass begins elsewhere in the text, so that cuts fall at other places and the tokens left
    over at the end of a pass (fewer than a row) are others each time.
    """

    def __init__(self, cache: TokenCache, chosen_D: np.ndarray, row_length: int, seed: int) -> None:
        self._tokens = cache.tokens
        self._row_length = row_length
        self._seed = seed
        # Neighbouring chosen documents form a run: one stretch of the file.
        edge_D = np.diff(chosen_D.astype(np.int8), prepend=0, append=0)
        run_start, run_end = cache.offsets[edge_D == 1], cache.offsets[edge_D == -1]
        run_length = run_end - run_start
        self._run_at = np.concatenate([[0], np.cumsum(run_length)])
        self._shift = np.append(run_start - self._run_at[:-1], 0)
        self.num_tokens = int(self._run_at[-1])
        self.num_rows = self.num_tokens // row_length

    def examples(self, index_N: Int64) -> Examples:
        """Return the rows of those numbers, one example each."""
        pass_N, row_N = shuffle(index_N, self.num_rows, self._seed)
        offset_N = (hash_numbers(derive_key(self._seed, "offset"), pass_N) >> np.uint64(1)).astype(
            np.int64
        )
        start_N = row_N * self._row_length + offset_N % self.num_tokens
        position_NL = start_N[:, None] + np.arange(self._row_length)
        return Examples(
            tokens_EL=self._read(position_NL % self.num_tokens),
            length_E=np.full(len(index_N), self._row_length, dtype=np.int64),
            row_E=np.arange(len(index_N)),
        )

    def _read(self, position_NL: Int64) -> Int64:
        """Return the tokens at positions of the chosen text."""
        run_NL = np.searchsorted(self._run_at, position_NL[:, :1], side="right") - 1
        first_N, last_N = position_NL[:, 0], position_NL[:, -1]
        run_end_N = self._run_at[run_NL[:, 0] + 1]
        across = np.flatnonzero((last_N >= run_end_N) | (last_N < first_N))
        shift_NL = np.broadcast_to(self._shift[run_NL], position_NL.shape)
        if across.size:
            shift_NL = shift_NL.copy()
            runs = np.searchsorted(self._run_at, position_NL[across], side="right") - 1
            shift_NL[across] = self._shift[runs]
        return self._tokens[position_NL + shift_NL].astype(np.int64)
