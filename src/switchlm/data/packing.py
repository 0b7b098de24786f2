"""Many short documents in one row, each an example of its own, none seeing another.

Suffixes: D documents, P pieces (a document, or a part of one too long for a row), N rows, E
examples of those rows, L raw positions.
"""

from dataclasses import dataclass

import numpy as np

from switchlm.data.cache import TokenCache
from switchlm.data.order import Int64
from switchlm.data.rows import Examples, shuffle
from switchlm.data.span_corruption import Noise


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """Parts of the token file, each to become one example."""

    start_P: Int64
    length_P: Int64


def cut(cache: TokenCache, chosen_D: np.ndarray, longest: int) -> Pieces:
    """Cut the chosen documents into even pieces of at most `longest` tokens.

    Documents of a single token are left out: nothing would be left to predict it from.
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
    """Return a target length that fills about as fast as the inputs do, a multiple of 8.

    Short examples have a larger share of sentinels and end tokens in their targets than long ones.
    """
    length_P = np.concatenate([part.length_P for part in pieces])
    inputs_P, targets_P = noise.corrupted_lengths(length_P)
    even = input_length * int(targets_P.sum()) / max(int(inputs_P.sum()), 1)
    full = noise.corrupted_lengths(np.array([noise.raw_length(input_length)]))[1][0]
    return int(-(-max(even, full) // 8) * 8)


def pack(size_P: Int64, room: int) -> tuple[Int64, Int64]:
    """Share pieces out over bins of `room`, best fit decreasing; every size is at most `room`.

    Returns order_P and first_B: bin b holds the pieces order_P[first_B[b] : first_B[b + 1]].
    """
    waiting: list[list[int]] = [[] for _ in range(room + 1)]  # open bins by the room left in them
    open_rooms = 0  # bit r is set where waiting[r] has a bin
    num_bins = 0
    decreasing_P = np.argsort(-size_P, kind="stable")
    bin_P = np.empty(len(size_P), dtype=np.int64)
    for place, size in enumerate(size_P[decreasing_P].tolist()):
        fitting = open_rooms >> size
        if fitting:
            left = size + (fitting & -fitting).bit_length() - 1
            number = waiting[left].pop()
            if not waiting[left]:
                open_rooms ^= 1 << left
        else:
            left, number = room, num_bins
            num_bins += 1
        bin_P[place] = number
        waiting[left - size].append(number)
        open_rooms |= 1 << (left - size)
    by_bin_P = np.argsort(bin_P, kind="stable")
    return decreasing_P[by_bin_P], np.searchsorted(bin_P[by_bin_P], np.arange(num_bins + 1))


class PackedDocuments:
    """Rows of whole pieces. Which pieces share a row is settled once; passes shuffle the rows."""

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
        # One size for both limits: the larger share of a row, counted in input tokens. Trying the
        # two limits one by one leaves a third of the room empty: long pieces would take the inputs
        # first, and the many targets of the short ones would then have no place.
        size_P = np.maximum(inputs_P, -(-targets_P * input_length // target_length))
        self._order_P, self._first_B = pack(size_P, input_length)
        self.num_rows = len(self._first_B) - 1
        self.num_tokens = int(pieces.length_P.sum())

    def examples(self, index_N: Int64) -> Examples:
        """Return the pieces packed into the rows of those numbers."""
        _, bin_N = shuffle(index_N, self.num_rows, self._seed)
        count_N = self._first_B[bin_N + 1] - self._first_B[bin_N]
        row_E = np.repeat(np.arange(len(index_N)), count_N)
        place_E = np.arange(len(row_E)) - (np.cumsum(count_N) - count_N)[row_E]
        piece_E = self._order_P[self._first_B[bin_N][row_E] + place_E]
        length_E = self._pieces.length_P[piece_E]
        position_EL = self._pieces.start_P[piece_E][:, None] + np.arange(int(length_E.max()))
        tokens_EL = self._tokens[np.minimum(position_EL, len(self._tokens) - 1)]
        return Examples(tokens_EL=tokens_EL.astype(np.int64), length_E=length_E, row_E=row_E)
