"""GPTQ: round a matrix an input at a time, and let the inputs left make up for the error.

Frantar et al. 2023. Of all codes those are sought whose outputs are nearest to the weight's, on the
rows that the matrix really meets, known by their Gram matrix.

Shapes: N outputs, K inputs, R rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from switchlm.compression.quantise import (
    LARGEST_INT8,
    LEVELS,
    group_size,
    int4_grid,
    int8_scale,
    pad_grid,
)
from switchlm.huggingface.quantised import Quantisation
from switchlm.kernels.cpu.quantised import pack_int4

COLUMNS = 128  # rounded before the columns after them are corrected, all at once
DAMPING = 0.01  # of the mean diagonal, added to it
MOST_DAMPING = 1.0

Grid = tuple[Tensor, Tensor]  # scale and offset of each output


def gptq(
    weight_NK: Tensor, gram_KK: Tensor, quantisation: Quantisation
) -> tuple[Tensor, Tensor] | None:
    """Return codes and scale of a matrix as they are stored; None where the rows tell nothing.

    gram_KK: x^T x of the rows, float32.
    """
    factor_KK = _inverse_factor(gram_KK)
    if factor_KK is None:
        return None
    weight_NK = weight_NK.float().clone()
    if quantisation.bits == 8:
        scale_N = int8_scale(weight_NK)
        grid = scale_N, torch.zeros_like(scale_N)
        limits = -LARGEST_INT8, LARGEST_INT8
        codes_NK = _round(weight_NK, factor_KK, lambda _: grid, limits, COLUMNS)
        return codes_NK.to(torch.int8), scale_N
    size = group_size(weight_NK, quantisation)
    grids: list[Tensor] = []

    def next_grid(column: int) -> Grid:
        if column % size == 0:
            grids.append(int4_grid(weight_NK[:, column : column + size], size)[0])
        scale_N, offset_N = grids[-1].float().unbind(1)
        return scale_N, offset_N

    columns = max(COLUMNS, size)
    codes_NK = _round(weight_NK, factor_KK, next_grid, (-8, LEVELS - 8), columns) + 8
    return pack_int4(codes_NK), pad_grid(torch.stack(grids))


def _round(
    weight_NK: Tensor,
    factor_KK: Tensor,
    grid_of: Callable[[int], Grid],
    limits: tuple[int, int],
    columns: int,
) -> Tensor:
    """Return integers, [N, K]; the weight is corrected on the way.

    grid_of: called with each column in turn, when all corrections of its group are made.
    """
    codes_NK = torch.empty_like(weight_NK)
    inputs = weight_NK.shape[1]
    for start in range(0, inputs, columns):
        stop = min(start + columns, inputs)
        errors_NC = torch.zeros_like(weight_NK[:, start:stop])
        for column in range(start, stop):
            scale_N, offset_N = grid_of(column)
            value_N = weight_NK[:, column]
            code_N = ((value_N - offset_N) / scale_N).round_().clamp_(*limits)
            codes_NK[:, column] = code_N
            error_N = (value_N - (code_N * scale_N + offset_N)) / factor_KK[column, column]
            errors_NC[:, column - start] = error_N
            weight_NK[:, column + 1 : stop].addr_(
                error_N, factor_KK[column, column + 1 : stop], alpha=-1
            )
        weight_NK[:, stop:].addmm_(errors_NC, factor_KK[start:stop, stop:], alpha=-1)
    return codes_NK


def _inverse_factor(gram_KK: Tensor) -> Tensor | None:
    """Return the upper Cholesky factor of the inverse of the damped Gram matrix."""
    diagonal_K = gram_KK.diagonal()
    mean = diagonal_K.mean()
    if not mean.isfinite() or mean <= 0:
        return None
    damping = DAMPING
    while damping <= MOST_DAMPING:
        damped_KK = gram_KK.clone()
        damped_KK.diagonal().add_(damping * mean)
        lower_KK, failed = torch.linalg.cholesky_ex(damped_KK)
        if not failed:
            inverse_KK = torch.cholesky_inverse(lower_KK)
            upper_KK, failed = torch.linalg.cholesky_ex(inverse_KK, upper=True)
            if not failed and upper_KK.isfinite().all():
                return upper_KK
        damping *= 10
    return None
