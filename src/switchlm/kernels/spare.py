"""Room for rows that are needed for a moment, and rows filled up to one of few sizes.

oneDNN, which multiplies in bfloat16 and float16 on a CPU, compiles code for every shape that it
meets: milliseconds each, while loads differ at every step. So there rows are filled up with zeros
to one of some fifty sizes, each of which is compiled once.

Shapes: X rows of one piece of an expert (see plan.py).
"""

import torch
from torch import Tensor

from switchlm.kernels import half_precision

EXACT_ROWS = 16  # up to here every number of rows has code of its own, as in decoding


def compiles_shapes(dtype: torch.dtype) -> bool:
    """Whether products in this dtype are compiled for their shape."""
    return dtype in half_precision.DTYPES and not half_precision.is_slow(dtype)


def padded(rows: int, dtype: torch.dtype) -> int:
    """Return the size that so many rows are filled up to: at most 15 more, or an eighth."""
    if rows <= EXACT_ROWS or not compiles_shapes(dtype):
        return rows
    step = 16 if rows <= 256 else 32 if rows <= 512 else 64 if rows <= 1024 else 128
    return -(-rows // step) * step


class Spare:
    """Memory that one thread uses again and again for one piece after the other: stays in cache."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._rooms: dict[str, Tensor] = {}

    def __call__(self, room: str, rows: int, columns: int) -> Tensor:
        """Return uninitialised rows; what this room held before is gone."""
        size = rows * columns
        if room not in self._rooms or self._rooms[room].numel() < size:
            self._rooms[room] = self._like.new_empty(size)
        return self._rooms[room][:size].view(rows, columns)

    def filled(self, room: str, rows_X: Tensor) -> Tensor:
        """Return the rows, and zeros up to a size that is compiled."""
        rows, columns = rows_X.shape
        size = padded(rows, rows_X.dtype)
        if size == rows:
            return rows_X
        full = self(room, size, columns)
        full[:rows].copy_(rows_X)
        full[rows:].zero_()
        return full

    def room_for(self, room: str, result_X: Tensor, rows: int) -> Tensor:
        """Return where so many rows may be written of which `result_X` wants the first."""
        return result_X if len(result_X) == rows else self(room, rows, result_X.shape[1])


def keep(rows: Tensor, result_X: Tensor) -> None:
    """Bring what was written to `room_for` a result there, unless it stands there already."""
    if len(rows) != len(result_X):
        result_X.copy_(rows[: len(result_X)])
