"""Grouped matmul in main memory: one matmul per expert, experts divided among the threads.

Autograd over a loop that indexes the stacked weight builds one full-size gradient per expert, and
`torch.nn.functional.grouped_mm` leaves the rows past the counts undefined. Here the loop is inside
one autograd function: every matmul writes its slice of the result, an expert without rows costs the
zeroing of its weight gradient, and rows past the counts are zero.

A matmul of 64 rows is too small to split among threads: threads that take full experts are faster,
since they do not wait at a barrier after every matmul. The costs of the experts are laid end to end
and cut into equal lengths, one per thread (McNaughton's rule). Two threads share an expert that is
cut, by columns. So threads have equal work however skewed the loads.

A matmul is PyTorch's, or native/gemm.c where rows are few: BLAS libraries pack their factors first,
which costs as much as it saves where one factor has some ten to a hundred rows. The plain twins are
`torch.mm` and `addmm_`.

Shapes: R rows, D in, F out, E experts, P pieces (see `Piece`); of one matmul, M x K times K x N.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchlm import _torch
from switchlm.kernels.cpu import memory, native, small_matmul, threads
from switchlm.kernels.cpu.memory import Workspace, compiles_shapes, keep

FIXED_ROWS = 48  # cost of reading an expert's weights, in rows
LEAST_WORK = 2**25  # multiply-adds below which another thread does not pay
BLOCK_ROWS = 2048  # of an expert at a time, so that hidden rows stay in the cache
LEAST_GAIN = 0.02  # of a thread's time; a cut that gains less is moved to an expert's end
ALIGNMENT = 16  # columns
FEW_WIDTHS = 4  # how many widths a cut expert's columns may have where shapes are compiled


@dataclass(frozen=True)
class Piece:
    """Rows of an expert, all or a block, and its columns, all or a part.

    The pieces of the same columns follow each other on one thread.

    first, rows: the block; None is all rows.
    start, stop: the part of the columns, from 0 to 1.
    few_shapes: columns are cut coarsely, so that matmuls have few shapes (see memory.py).
    """

    expert: int
    first: int = 0
    rows: int | None = None
    start: float = 0.0
    stop: float = 1.0
    few_shapes: bool = False

    @property
    def begins(self) -> bool:
        """Whether this is the first block of its columns: it writes the sum that others add to."""
        return self.first == 0

    def of_rows(self, rows: Tensor) -> Tensor:
        return rows if self.rows is None else rows.narrow(0, self.first, self.rows)

    def of_columns(self, matrix: Tensor, dim: int) -> Tensor:
        """Return the piece's columns of a matrix, which are on the dim `dim`."""
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
class Schedule:
    """The rows of every expert, and the pieces of every thread.

    sizes: the number of rows of every expert, and last those of no expert.
    pieces: of experts with rows, in order.
    parts: the pieces of every thread; one part where several threads do not pay.
    idle: the experts without rows.
    """

    sizes: list[int]
    pieces: list[Piece]
    parts: list[range]
    idle: list[int]

    def rows(self, rows: Tensor | None, cut: bool = False) -> list[Tensor]:
        """Return the rows of every piece, none of None; `cut`: only its columns of them."""
        if rows is None:
            return []
        rows_E = rows.split_with_sizes(self.sizes)
        found = [piece.of_rows(rows_E[piece.expert]) for piece in self.pieces]
        if not cut:
            return found
        return [piece.of_columns(t, 1) for piece, t in zip(self.pieces, found, strict=True)]

    def columns(self, stacked: Tensor | None, dim: int) -> list[Tensor]:
        """Return every piece's columns, on the dim `dim`, of its expert's matrix; none of None."""
        if stacked is None:
            return []
        matrix_E = stacked.unbind()
        return [piece.of_columns(matrix_E[piece.expert], dim) for piece in self.pieces]

    def empty(self, like: Tensor, width: int) -> Tensor:
        """Return uninitialised rows of this width; those of no expert are zeros."""
        rows = like.new_empty(sum(self.sizes), width)
        if self.sizes[-1]:
            rows[-self.sizes[-1] :].zero_()
        return rows


class Sums:
    """Rows summed over the pieces of an expert: the first writes, the others add at the end."""

    def __init__(self, schedule: Schedule, rows: Tensor) -> None:
        self.out_P = schedule.rows(rows)
        self._later: list[tuple[Tensor, Tensor]] = []
        for number, (piece, total) in enumerate(zip(schedule.pieces, self.out_P, strict=True)):
            if piece.start > 0:
                self.out_P[number] = torch.empty_like(total)
                self._later.append((total, self.out_P[number]))

    def add_up(self) -> None:
        """Add the results of the later pieces, in order."""
        for total, part in self._later:
            total.add_(part)


def make_schedule(
    counts: list[int], num_rows: int, work_per_row: int, *, few_shapes: bool = False
) -> Schedule:
    """Divide experts among threads, evenly to within a few percent whatever their loads.

    counts: rows of each expert.
    work_per_row: multiply-adds of one row in one matmul.
    few_shapes: cut columns coarsely (see Piece).
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
        return Schedule(sizes, pieces, [range(len(pieces))], idle)
    fair = (total + FIXED_ROWS * len(busy)) / threads
    ends, remaining = [0], fair
    for expert in busy:
        cost = left = float(counts[expert] + FIXED_ROWS)
        while len(ends) < threads and left > remaining:
            cut = _snap(remaining, left, LEAST_GAIN * fair)
            if cut:
                start, stop = 1 - left / cost, 1 - (left - cut) / cost
                pieces += _blocks(expert, counts[expert], start, stop, few_shapes)
            ends.append(len(pieces))
            left -= cut
            remaining += fair - cut
        if left:
            pieces += _blocks(expert, counts[expert], 1 - left / cost, 1.0, few_shapes)
            remaining -= left
    ends.append(len(pieces))
    parts = [range(first, last) for first, last in pairwise(ends) if first < last]
    return Schedule(sizes, pieces, parts, idle)


def _blocks(
    expert: int, count: int, start: float, stop: float, few_shapes: bool = False
) -> list[Piece]:
    """Return the pieces of these columns, rows in equal blocks."""
    number = -(-count // BLOCK_ROWS)
    if number == 1:
        return [Piece(expert, 0, None, start, stop, few_shapes)]
    edges = [count * block // number for block in range(number + 1)]
    return [
        Piece(expert, first, end - first, start, stop, few_shapes) for first, end in pairwise(edges)
    ]


def _snap(cut: float, length: float, tolerance: float) -> float:
    """Return the cut, moved to an end of the length if one is within the tolerance."""
    if cut <= tolerance:
        return 0.0
    return length if length - cut <= tolerance else cut


# Tokens of an expert; measured at 256 x 1,024, on an EPYC with and one without AVX-512.
MOST_ROWS = 256 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32


def matmul_into(
    a_MK: Tensor, b_KN: Tensor, out_MN: Tensor, *, add: bool = False, large: bool = False
) -> Tensor:
    """Write a @ b into `out_MN`, or add it, and return that.

    large: the result exceeds the cache and is not read soon.
    """
    if a_MK.is_cpu and small_matmul.is_slow(a_MK.dtype):
        wide_MN = torch.empty(out_MN.shape)
        matmul_into(a_MK.float(), b_KN.float(), wide_MN)
        return out_MN.add_(wide_MN) if add else out_MN.copy_(wide_MN)
    if _fits(a_MK, b_KN, out_MN):
        _multiply(a_MK, b_KN, out_MN, add, large)
        return out_MN
    if add:
        return out_MN.addmm_(a_MK, b_KN)
    return torch.mm(a_MK, b_KN, out=out_MN)


def _fits(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor) -> bool:
    """Whether gemm.c takes these: few rows of float32, all in main memory, in whole vectors."""
    (rows, inputs), outputs = a_MK.shape, b_KN.shape[1]
    transposed = a_MK.stride(1) != 1  # of a gradient of weights, whose inputs are tokens
    return (
        (inputs if transposed else rows) <= MOST_ROWS
        and all(x.dtype == torch.float32 and x.is_cpu for x in (a_MK, b_KN, out_MN))
        and out_MN.stride(1) == 1
        and (
            (b_KN.stride(1) == 1 and outputs % native.WIDTH == 0)
            or (b_KN.stride(0) == 1 and not transposed and inputs % native.WIDTH == 0)
        )
        and not _torch.has_dispatch_mode()
        and native.native().library is not None
    )


def _multiply(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor, add: bool, large: bool) -> None:
    (rows, inputs), outputs = a_MK.shape, b_KN.shape[1]
    a, b, y = a_MK.data_ptr(), b_KN.data_ptr(), out_MN.data_ptr()
    shape, y_row = (rows, inputs, outputs), out_MN.stride(0)
    if b_KN.stride(1) == 1 and outputs % native.WIDTH == 0:
        a_row, a_column = a_MK.stride()
        native.library().gemm(a, a_row, a_column, b, b_KN.stride(0), y, y_row, *shape, add, large)
    else:
        a_row, b_column = a_MK.stride(0), b_KN.stride(1)
        native.library().gemm_nt(a, a_row, b, b_column, y, y_row, *shape, add)


def weight_gradient(weight_EDF: Tensor, schedule: Schedule) -> Tensor:
    """Return an uninitialised gradient for a stacked weight; experts without rows have zeros."""
    if weight_EDF.device.type == "cpu":
        gradient_EDF = memory.empty_reused(tuple(weight_EDF.shape), weight_EDF.dtype)
    else:
        gradient_EDF = torch.empty_like(weight_EDF, memory_format=torch.contiguous_format)
    for expert in schedule.idle:
        gradient_EDF[expert].zero_()
    return gradient_EDF


def forward(x_RD: Tensor, weight_EDF: Tensor, schedule: Schedule) -> Tensor:
    """Return y_RF: each row times its expert's matrix; zeros past the counts."""
    y_RF = schedule.empty(x_RD, weight_EDF.shape[2])
    x_P, weight_P = schedule.rows(x_RD), schedule.columns(weight_EDF, 1)
    y_P = schedule.rows(y_RF, cut=True)

    def multiply(part: Sequence[int]) -> None:
        workspace = Workspace(x_RD)
        for p in part:
            x = workspace.filled("x", x_P[p])
            keep(matmul_into(x, weight_P[p], workspace.output_for("y", y_P[p], len(x))), y_P[p])

    threads.parallel_for(multiply, schedule.parts)
    return y_RF


def backward_weight(dy_RF: Tensor, x_RD: Tensor, weight_EDF: Tensor, schedule: Schedule) -> Tensor:
    """Return dweight_EDF; zeros for experts without rows."""
    dweight_EDF = weight_gradient(weight_EDF, schedule)
    x_P, dy_P = schedule.rows(x_RD), schedule.rows(dy_RF, cut=True)
    dweight_P = schedule.columns(dweight_EDF, 1)

    def multiply(part: Sequence[int]) -> None:
        workspace = Workspace(x_RD)
        for p in part:
            x, dy = workspace.filled("x", x_P[p]), workspace.filled("dy", dy_P[p])
            matmul_into(x.t(), dy, dweight_P[p], add=not schedule.pieces[p].begins, large=True)

    threads.parallel_for(multiply, schedule.parts)
    return dweight_EDF


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, weight_EDF: Tensor, schedule: Schedule) -> Tensor:
        ctx.save_for_backward(x_RD, weight_EDF)
        ctx.schedule = schedule
        return forward(x_RD, weight_EDF, schedule)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_RD, weight_EDF = ctx.saved_tensors
        dy_RF = gradients[0].contiguous()
        dx_RD = dweight_EDF = None
        if ctx.needs_input_grad[0]:
            dx_RD = forward(dy_RF, weight_EDF.mT, ctx.schedule)
        if ctx.needs_input_grad[1]:
            dweight_EDF = backward_weight(dy_RF, x_RD, weight_EDF, ctx.schedule)
        return dx_RD, dweight_EDF, None


def schedule_for(x_RD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Schedule:
    """Return the schedule of these rows; waits for the counts."""
    few_shapes = compiles_shapes(x_RD.dtype)
    work_per_row = weight_EDF[0].numel()
    return make_schedule(counts_E.tolist(), x_RD.shape[0], work_per_row, few_shapes=few_shapes)


def grouped_matmul(x_RD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """Multiply consecutive runs of rows with their expert's matrix: see reference.py."""
    y_RF: Tensor = _GroupedMatmul.apply(x_RD, weight_EDF, schedule_for(x_RD, weight_EDF, counts_E))
    return y_RF


def traced_matmul(x_RD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """`grouped_matmul` as an opaque operator with a shape rule, for torch.compile and fake tensors.

    The number of rows per expert is known only at run time, so the loop cannot be traced. Used only
    then, since calling an operator takes tens of microseconds more.
    """
    y_RF: Tensor = _matmul(x_RD, weight_EDF, counts_E)
    return y_RF


@torch.library.custom_op("switchlm::grouped_matmul", mutates_args=())
def _matmul(x_RD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
    return forward(x_RD, weight_EDF, schedule_for(x_RD, weight_EDF, counts_E))


@_matmul.register_fake
def _(x_RD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
    return x_RD.new_empty(x_RD.shape[0], weight_EDF.shape[2])


@torch.library.custom_op("switchlm::grouped_matmul_backward", mutates_args=())
def _gradients(
    dy_RF: Tensor, x_RD: Tensor, weight_EDF: Tensor, counts_E: Tensor
) -> tuple[Tensor, Tensor]:
    schedule = schedule_for(x_RD, weight_EDF, counts_E)
    dy_RF = dy_RF.contiguous()
    dweight_EDF = backward_weight(dy_RF, x_RD, weight_EDF, schedule)
    return forward(dy_RF, weight_EDF.mT, schedule), dweight_EDF


@_gradients.register_fake
def _(dy_RF: Tensor, x_RD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor]:
    return x_RD.new_empty(x_RD.shape), weight_EDF.new_empty(weight_EDF.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy_RF: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_gradients(dy_RF, *ctx.saved_tensors), None


_matmul.register_autograd(_backward, setup_context=_save)
