"""Share the experts of a layer out among the cores: whole experts a core, not all cores a product.

Products of 64 rows are too small to split: each thread taking whole experts is faster, and does not
wait at a barrier after every product. Experts are laid out in a row, each as long as its cost, and
the row is cut into equal lengths, one a thread (McNaughton's rule): an expert that a cut goes
through is shared by two threads, column by column. So loads may be as skewed as they like.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

FIXED_ROWS = 48  # reading an expert's weights costs as much as multiplying about so many rows
LEAST_WORK = 2**25  # multiply-adds a product below which waking a thread does not pay
BLOCK_ROWS = 2048  # of a busy expert at a time, so that its hidden rows stay in the cache
LEAST_GAIN = 0.02  # of a thread's time; a cut that evens out less is moved to an expert's end
ALIGNMENT = 16  # columns
FEW_WIDTHS = 4  # how many widths a cut expert's columns may have where shapes are compiled


@dataclass(frozen=True)
class Piece:
    """Rows of an expert, all of them or a block, and columns, all or those between two shares.

    The pieces of the same columns follow each other on one thread. few_shapes: columns are cut
    coarsely, so that products have few shapes (see spare.py).
    """

    expert: int
    first: int = 0
    rows: int | None = None
    start: float = 0.0
    stop: float = 1.0
    few_shapes: bool = False

    @property
    def begins(self) -> bool:
        """Whether no other block of these columns comes before: results start, others are added."""
        return self.first == 0

    def of_rows(self, rows: Tensor) -> Tensor:
        return rows if self.rows is None else rows.narrow(0, self.first, self.rows)

    def of_columns(self, matrix: Tensor, dim: int) -> Tensor:
        """Return the piece's slices of a matrix; an expert's pieces tile it."""
        if self.start == 0 and self.stop == 1:
            return matrix
        width = matrix.shape[dim]
        step = max(ALIGNMENT, width // FEW_WIDTHS) if self.few_shapes else ALIGNMENT
        start, stop = (
            min(round(share * width / step) * step, width) if share < 1 else width
            for share in (self.start, self.stop)
        )
        return matrix.narrow(dim, start, stop - start)


@dataclass(frozen=True)
class Plan:
    """Which rows are whose, and which thread takes whom.

    sizes: rows of every expert, and last the rows of none. pieces: of experts with rows, in order.
    parts: for every thread its pieces; one part where sharing does not pay. idle: the experts
    without rows.
    """

    sizes: list[int]
    pieces: list[Piece]
    parts: list[range]
    idle: list[int]

    def rows(self, rows: Tensor, cut: bool = False) -> list[Tensor]:
        """Return every piece's rows; `cut`: its columns of them alone."""
        rows_E = rows.split_with_sizes(self.sizes)
        found = [piece.of_rows(rows_E[piece.expert]) for piece in self.pieces]
        if not cut:
            return found
        return [piece.of_columns(t, 1) for piece, t in zip(self.pieces, found, strict=True)]

    def columns(self, stacked: Tensor, dim: int) -> list[Tensor]:
        """Return every piece's columns, in this dim, of its expert's matrix."""
        matrix_E = stacked.unbind()
        return [piece.of_columns(matrix_E[piece.expert], dim) for piece in self.pieces]

    def empty(self, like: Tensor, width: int) -> Tensor:
        """Return uninitialised rows of this width; those of no expert are zeros."""
        rows = like.new_empty(sum(self.sizes), width)
        if self.sizes[-1]:
            rows[-self.sizes[-1] :].zero_()
        return rows


class Sums:
    """Rows to which all pieces of an expert add: the first writes, the others wait their turn."""

    def __init__(self, plan: Plan, rows: Tensor) -> None:
        self.room_P = plan.rows(rows)
        self._later: list[tuple[Tensor, Tensor]] = []
        for number, (piece, total) in enumerate(zip(plan.pieces, self.room_P, strict=True)):
            if piece.start > 0:
                self.room_P[number] = torch.empty_like(total)
                self._later.append((total, self.room_P[number]))

    def add_up(self) -> None:
        """Add what the later pieces found, in order."""
        for total, part in self._later:
            total.add_(part)


def make_plan(
    counts: list[int], num_rows: int, work_per_row: int, *, few_shapes: bool = False
) -> Plan:
    """Share experts out, evenly to within a few percent whatever their loads.

    counts: rows of each expert. work_per_row: multiply-adds of one row in one product. few_shapes:
    cut columns coarsely (see Piece).
    """
    total = sum(counts)
    assert total <= num_rows, f"experts have {total} rows in all, the input has {num_rows}"
    sizes = [*counts, num_rows - total]
    busy = [expert for expert, count in enumerate(counts) if count]
    idle = [expert for expert, count in enumerate(counts) if not count]
    threads = torch.get_num_threads()
    pieces: list[Piece] = []
    if threads == 1 or total * work_per_row < LEAST_WORK:
        for expert in busy:
            pieces += _blocks(expert, counts[expert], 0.0, 1.0)
        return Plan(sizes, pieces, [range(len(pieces))], idle)
    fair = (total + FIXED_ROWS * len(busy)) / threads
    ends, room = [0], fair
    for expert in busy:
        cost = left = float(counts[expert] + FIXED_ROWS)
        while len(ends) < threads and left > room:
            cut = _snap(room, left, LEAST_GAIN * fair)
            if cut:
                start, stop = 1 - left / cost, 1 - (left - cut) / cost
                pieces += _blocks(expert, counts[expert], start, stop, few_shapes)
            ends.append(len(pieces))
            left -= cut
            room += fair - cut
        if left:
            pieces += _blocks(expert, counts[expert], 1 - left / cost, 1.0, few_shapes)
            room -= left
    ends.append(len(pieces))
    parts = [range(first, last) for first, last in pairwise(ends) if first < last]
    return Plan(sizes, pieces, parts, idle)


def _blocks(
    expert: int, count: int, start: float, stop: float, few_shapes: bool = False
) -> list[Piece]:
    """Return the pieces of these columns: the rows in equal blocks."""
    number = -(-count // BLOCK_ROWS)
    if number == 1:
        return [Piece(expert, 0, None, start, stop, few_shapes)]
    edges = [count * block // number for block in range(number + 1)]
    return [
        Piece(expert, first, end - first, start, stop, few_shapes) for first, end in pairwise(edges)
    ]


def _snap(cut: float, length: float, tolerance: float) -> float:
    """Return the cut, moved to an end of the length that is nearer than the tolerance."""
    if cut <= tolerance:
        return 0.0
    return length if length - cut <= tolerance else cut
