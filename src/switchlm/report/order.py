"""An order in which neighbours are alike, so that families show in a heat map."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def similarity_order(vectors_NF: Floats) -> list[int]:
    """Return the numbers 0 to N-1 so that similar rows stand beside each other.

    The two closest groups are joined again and again, by the mean distance of their members; of
    the ways to lay two groups end to end, the one whose ends are closest is taken.
    """
    square_N = (vectors_NF**2).sum(1)
    squared_NN = square_N[:, None] + square_N[None] - 2 * vectors_NF @ vectors_NF.T
    between_NN = np.sqrt(np.maximum(squared_NN, 0))
    distance_NN = between_NN.copy()
    np.fill_diagonal(distance_NN, np.inf)
    groups: list[list[int]] = [[row] for row in range(len(vectors_NF))]
    for _ in range(len(groups) - 1):
        place, other = divmod(int(distance_NN.argmin()), len(groups))
        left, right = groups[place], groups[other]
        ways = [(first, second) for first in (left, left[::-1]) for second in (right, right[::-1])]
        first, second = min(ways, key=lambda way: between_NN[way[0][-1], way[1][0]])
        groups[place], groups[other] = first + second, []
        sizes = len(left), len(right)
        joined_N = (sizes[0] * distance_NN[place] + sizes[1] * distance_NN[other]) / sum(sizes)
        distance_NN[place], distance_NN[:, place] = joined_N, joined_N
        distance_NN[place, place] = np.inf
        distance_NN[other], distance_NN[:, other] = np.inf, np.inf
    return max(groups, key=len, default=[])
