"""Rows of raw tokens from a token cache, before masking: concatenated text, or packed documents.

The rows of a source are numbered without end: row `num_rows` is the first of the second epoch, with
another shuffle. A packed row has several documents, which do not attend to each other.

Shapes: D documents, N rows, E examples of those rows, L raw positions, P pieces (a document, or a
part of one too long for a row).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from switchlm.data.order import Int64, derive_key, hash_numbers, permute
from switchlm.data.pretraining.span_corruption import Noise
from switchlm.data.text.token_cache import TokenCache


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Raw tokens of E examples.

    tokens_EL: padded on the right.
    length_E: tokens without padding.
    row_E: the row of each example, from 0; examples of a row are neighbours.
    """

    tokens_EL: Int64
    length_E: Int64
    row_E: Int64

    @property
    def place_E(self) -> Int64:
        """The index of each example in its row."""
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


def shuffle(index_N: Int64, num_rows: int | Int64, seed: int) -> tuple[Int64, Int64]:
    """Return the epoch of each sample number, and its row in that epoch.

    num_rows: of the source, or of the source of each number.
    """
    pass_N, place_N = index_N // num_rows, index_N % num_rows
    key_N = hash_numbers(derive_key(seed, "order"), pass_N)
    return pass_N, permute(place_N, num_rows, key_N)


class RunningText:
    """Rows of `row_length` tokens cut from the concatenated chosen documents.

    Every epoch begins at another offset, so that the cuts differ, and also the remaining tokens at
    its end (fewer than a row).
    """

    def __init__(self, cache: TokenCache, chosen_D: np.ndarray, row_length: int, seed: int) -> None:
        # A plain array, since slices of a np.memmap are slow to create.
        self._tokens = np.asarray(cache.tokens)
        self.row_length = row_length
        self.seed = seed
        # Neighbouring chosen documents form a run: one stretch of the file.
        edge_D = np.diff(chosen_D.astype(np.int8), prepend=0, append=0)
        run_start, run_end = cache.offsets[edge_D == 1], cache.offsets[edge_D == -1]
        run_length = run_end - run_start
        self._run_at = np.concatenate([[0], np.cumsum(run_length)])
        self._shift = np.append(run_start - self._run_at[:-1], 0)
        self.num_tokens = int(self._run_at[-1])
        self.num_rows = self.num_tokens // row_length

    def examples(self, index_N: Int64) -> "Examples":
        """Return the rows with these numbers, one example for each."""
        return running_rows([self], np.zeros_like(index_N), index_N)

    def read(self, start: int) -> np.ndarray:
        """Return `row_length` tokens of the chosen text from position `start` on."""
        run = self._run_at.searchsorted(start, side="right") - 1
        if start + self.row_length <= self._run_at[run + 1]:
            at = start + self._shift[run]
            return self._tokens[at : at + self.row_length]
        position_L = (start + np.arange(self.row_length)) % self.num_tokens
        run_L = self._run_at.searchsorted(position_L, side="right") - 1
        return self._tokens[position_L + self._shift[run_L]]


def running_rows(texts: Sequence[RunningText], source_N: Int64, index_N: Int64) -> Examples:
    """Return row `index_N` of text `source_N`, one example for each.

    Vectorised over sources, since a batch may draw a few rows from each of a hundred.
    """
    row_length, seed = texts[0].row_length, texts[0].seed
    num_rows_N = np.array([text.num_rows for text in texts])[source_N]
    num_tokens_N = np.array([text.num_tokens for text in texts])[source_N]
    pass_N, row_N = shuffle(index_N, num_rows_N, seed)
    offset_N = (hash_numbers(derive_key(seed, "offset"), pass_N) >> np.uint64(1)).astype(np.int64)
    start_N = (row_N * row_length + offset_N % num_tokens_N) % num_tokens_N
    tokens_NL = np.empty((len(index_N), row_length), dtype=np.int64)
    for row, (source, start) in enumerate(zip(source_N.tolist(), start_N.tolist(), strict=True)):
        tokens_NL[row] = texts[source].read(start)
    return Examples(
        tokens_EL=tokens_NL,
        length_E=np.full(len(index_N), row_length, dtype=np.int64),
        row_E=np.arange(len(index_N)),
    )


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """Parts of the token file, each to become one example."""

    start_P: Int64
    length_P: Int64


def cut(cache: TokenCache, chosen_D: np.ndarray, longest: int) -> Pieces:
    """Cut the chosen documents into pieces of nearly equal length, at most `longest` tokens.

    Skips documents of a single token, which cannot be masked.
    """
    chosen_D = chosen_D & (cache.lengths_D > 1)
    start_D, length_D = cache.offsets[:-1][chosen_D], cache.lengths_D[chosen_D]
    parts_D = -(-length_D // longest)
    document_P = np.repeat(np.arange(len(length_D)), parts_D)
    place_P = np.arange(len(document_P)) - (np.cumsum(parts_D) - parts_D)[document_P]
    bounds_P2 = np.stack([place_P, place_P + 1], axis=1) * length_D[document_P, None]
    bounds_P2 //= parts_D[document_P, None]
    return Pieces(
        start_P=start_D[document_P] + bounds_P2[:, 0], length_P=bounds_P2[:, 1] - bounds_P2[:, 0]
    )


def target_length_for(pieces: list[Pieces], noise: Noise, input_length: int) -> int:
    """Return a target length, a multiple of 8, for which packed inputs and targets fill equally.

    Short examples have relatively more sentinels and end tokens in their targets than long ones.
    """
    length_P = np.concatenate([part.length_P for part in pieces])
    inputs_P, targets_P = noise.corrupted_lengths(length_P)
    even = input_length * int(targets_P.sum()) / max(int(inputs_P.sum()), 1)
    full = noise.corrupted_lengths(np.array([noise.raw_length(input_length)]))[1][0]
    return int(-(-max(even, full) // 8) * 8)


def pack(
    inputs_P: Int64, targets_P: Int64, input_length: int, target_length: int
) -> tuple[Int64, Int64]:
    """Pack pieces into rows, by best fit decreasing.

    inputs_P, targets_P: input and target lengths of the pieces, at most those of a row.

    Returns order_P and first_B: row b has the pieces order_P[first_B[b] : first_B[b + 1]].
    """
    # One size for both limits: the larger share of a row, in input tokens. Two separate limits
    # leave a third of the row empty: long pieces fill the inputs first, and then there is no space
    # for the many targets of short pieces.
    size_P = np.maximum(inputs_P, -(-targets_P * input_length // target_length))
    # Open bins by their remaining space.
    waiting: list[list[int]] = [[] for _ in range(input_length + 1)]
    open_bins = 0  # bit r is set if waiting[r] has a bin
    num_bins = 0
    decreasing_P = np.argsort(-size_P, kind="stable")
    bin_P = np.empty(len(size_P), dtype=np.int64)
    for place, size in enumerate(size_P[decreasing_P].tolist()):
        fitting = open_bins >> size
        if fitting:
            left = size + (fitting & -fitting).bit_length() - 1
            number = waiting[left].pop()
            if not waiting[left]:
                open_bins ^= 1 << left
        else:
            left, number = input_length, num_bins
            num_bins += 1
        bin_P[place] = number
        waiting[left - size].append(number)
        open_bins |= 1 << (left - size)
    by_bin_P = np.argsort(bin_P, kind="stable")
    return decreasing_P[by_bin_P], np.searchsorted(bin_P[by_bin_P], np.arange(num_bins + 1))


class PackedDocuments:
    """Rows of packed pieces. Pieces are packed once; every epoch shuffles the rows."""

    def __init__(
        self,
        cache: TokenCache,
        pieces: Pieces,
        noise: Noise,
        *,
        input_length: int,
        target_length: int,
        seed: int,
    ) -> None:
        self._tokens = cache.tokens
        self._pieces = pieces
        self._seed = seed
        inputs_P, targets_P = noise.corrupted_lengths(pieces.length_P)
        self._order_P, self._first_B = pack(inputs_P, targets_P, input_length, target_length)
        self.num_rows = len(self._first_B) - 1
        self.num_tokens = int(pieces.length_P.sum())
        length_P2 = np.stack([inputs_P, targets_P], axis=1)[self._order_P].astype(np.int32)
        self._length_N2 = np.add.reduceat(length_P2, self._first_B[:-1], axis=0)

    def longest(self, index_N: Int64) -> Int64:
        """Return the lengths of the longest inputs and the longest targets of these rows."""
        _, bin_N = shuffle(index_N, self.num_rows, self._seed)
        longest_2: Int64 = self._length_N2[bin_N].max(0)
        return longest_2

    def examples(self, index_N: Int64) -> Examples:
        """Return the pieces in the rows with these numbers."""
        _, bin_N = shuffle(index_N, self.num_rows, self._seed)
        count_N = self._first_B[bin_N + 1] - self._first_B[bin_N]
        row_E = np.repeat(np.arange(len(index_N)), count_N)
        place_E = np.arange(len(row_E)) - (np.cumsum(count_N) - count_N)[row_E]
        piece_E = self._order_P[self._first_B[bin_N][row_E] + place_E]
        length_E = self._pieces.length_P[piece_E]
        position_EL = self._pieces.start_P[piece_E][:, None] + np.arange(int(length_E.max()))
        tokens_EL = self._tokens[np.minimum(position_EL, len(self._tokens) - 1)]
        return Examples(tokens_EL=tokens_EL.astype(np.int64), length_E=length_E, row_E=row_E)
