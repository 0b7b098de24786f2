"""The forward kernels: the first matmul gathers tokens, the second scatters outputs.

Neither permuted tokens nor unweighted outputs are stored, only hidden rows. Sums are in float32.

Shapes: N tokens, K assignments per token, A = N * K assignments, R = A rows in the order of their
experts, D d_model, F d_ff, V summed over, W out, E experts, T tiles.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from switchlm.kernels.gpu.tiles import (
    Tiles,
    activate,
    add_matmul,
    autotune,
    configs,
    even,
    load,
    precision,
    rows_of_tile,
    tile_and_column,
)

MATMUL_CONFIGS = configs(
    ("BLOCK_W", "BLOCK_V"),
    [(256, 64, 8, 3), (128, 64, 8, 3), (128, 64, 4, 4), (128, 32, 4, 4), (64, 64, 4, 4)],
    (32, 16, 4, 1),
)


@dataclass(frozen=True)
class Hidden:
    """Hidden rows, [R, F].

    middle: the input of the second matmul.
    inner, linear: the two factors before the activation; None where the backward pass does not need
        them (that of an ungated ReLU needs its output only) or there is none.
    """

    middle_RF: Tensor
    inner_RF: Tensor | None
    linear_RF: Tensor | None


def hidden_rows(
    x_ND: Tensor,
    inner_EDF: Tensor,
    linear_EDF: Tensor | None,
    assignment_R: Tensor,
    tiles: Tiles,
    activation: str,
    keep: bool,
) -> Hidden:
    """Gather tokens, multiply and activate. Rows of dropped assignments stay uninitialised.

    All tensors are contiguous.

    keep: whether a backward pass follows.
    """
    num_rows, (num_experts, d_model, d_ff) = assignment_R.shape[0], inner_EDF.shape
    gated = linear_EDF is not None
    middle_RF = x_ND.new_empty(num_rows, d_ff)
    kept = keep and (gated or activation != "relu")
    hidden = Hidden(
        middle_RF,
        torch.empty_like(middle_RF) if kept else None,
        torch.empty_like(middle_RF) if keep and gated else None,
    )
    with torch.cuda.device_of(x_ND):
        _hidden[lambda meta: (tiles.number * triton.cdiv(d_ff, meta["BLOCK_W"]),)](
            x_ND,
            inner_EDF,
            linear_EDF,
            middle_RF,
            hidden.inner_RF,
            hidden.linear_RF,
            assignment_R,
            *tiles.arguments,
            d_model,
            d_ff,
            num_experts,
            num_rows // x_ND.shape[0],
            ACTIVATION=activation,
            GATED=gated,
            KEEP=kept,
            PRECISION=precision(x_ND),
            ROWS=tiles.rows,
        )
    return hidden


@autotune(MATMUL_CONFIGS, key=["V", "W", "ROWS", "GATED", "KEEP", "PRECISION"])
@even
@triton.jit
def _hidden(
    x_NV, inner_EVW, linear_EVW, middle_RW, inner_RW, linear_RW, assignment_R,
    expert_T, first_T, end_T, num_tiles, V, W, E, K,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_V: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    tile, column = tile_and_column(tl.program_id(0), num_tiles, tl.cdiv(W, BLOCK_W))
    expert = tl.load(expert_T + tile)
    if expert >= E:
        return
    first = tl.load(first_T + tile)
    row, here = rows_of_tile(first, tl.load(end_T + tile), ROWS)
    token = tl.load(assignment_R + first + row) // K
    w = column * BLOCK_W + tl.arange(0, BLOCK_W)
    v = tl.arange(0, BLOCK_V)
    x_at = x_NV + token[:, None] * V + v[None, :]
    inner_EVW += expert.to(tl.int64) * V * W
    if GATED:
        linear_EVW += expert.to(tl.int64) * V * W
    weight_at = v[:, None] * W + w[None, :]
    inner = tl.zeros((ROWS, BLOCK_W), tl.float32)
    linear = tl.zeros((ROWS, BLOCK_W), tl.float32)
    for start in range(0, V, BLOCK_V):
        left = v < V - start
        mask = left[:, None] & (w < W)[None, :]
        x = load(x_at + start, left[None, :], EVEN)
        weight = load(inner_EVW + weight_at, mask, EVEN)
        inner = add_matmul(x, weight, inner, PRECISION)
        if GATED:
            weight = load(linear_EVW + weight_at, mask, EVEN)
            linear = add_matmul(x, weight, linear, PRECISION)
        weight_at += BLOCK_V * W
    # Rounded before the activation, as the backward pass reads it.
    dtype = middle_RW.dtype.element_ty
    inner = inner.to(dtype)
    middle = activate(inner.to(tl.float32), ACTIVATION)
    at = row[:, None] * W + w[None, :]
    mask = here[:, None] & (w < W)[None, :]
    if GATED:
        linear = linear.to(dtype)
        middle = middle * linear.to(tl.float32)
    if KEEP:
        tl.store(inner_RW + first * W + at, inner, mask=mask)
        if GATED:
            tl.store(linear_RW + first * W + at, linear, mask=mask)
    tl.store(middle_RW + first * W + at, middle.to(dtype), mask=mask)


def scatter_matmul(
    rows_RV: Tensor,
    weight_EVW: Tensor,
    assignment_R: Tensor,
    tiles: Tiles,
    scale_A: Tensor | None = None,
    more: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return y_AW: each row times its expert's matrix and its scale, at its assignment.

    Dropped assignments give zeros.

    weight_EVW: any strides.
    more: rows and weights, of the same strides, of a second matmul to add.
    """
    (num_rows, summed), (num_experts, _, width) = rows_RV.shape, weight_EVW.shape
    y_AW = rows_RV.new_empty(num_rows, width)
    more_rows, more_weight = more or (None, None)
    with torch.cuda.device_of(rows_RV):
        _scatter[lambda meta: (tiles.number * triton.cdiv(width, meta["BLOCK_W"]),)](
            y_AW,
            rows_RV,
            weight_EVW,
            more_rows,
            more_weight,
            scale_A,
            assignment_R,
            *tiles.arguments,
            summed,
            width,
            num_experts,
            *weight_EVW.stride(),
            SCALED=scale_A is not None,
            TWO=more is not None,
            PRECISION=precision(rows_RV),
            ROWS=tiles.rows,
        )
    return y_AW


@autotune(MATMUL_CONFIGS, key=["V", "W", "stride_V", "ROWS", "SCALED", "TWO", "PRECISION"])
@even
@triton.jit
def _scatter(
    y_AW, rows_RV, weight_EVW, more_RV, more_EVW, scale_A, assignment_R,
    expert_T, first_T, end_T, num_tiles, V, W, E, stride_E, stride_V, stride_W,
    SCALED: tl.constexpr, TWO: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_V: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    tile, column = tile_and_column(tl.program_id(0), num_tiles, tl.cdiv(W, BLOCK_W))
    expert = tl.load(expert_T + tile)
    if expert > E:
        return
    first = tl.load(first_T + tile)
    row, here = rows_of_tile(first, tl.load(end_T + tile), ROWS)
    assignment = tl.load(assignment_R + first + row)
    w = column * BLOCK_W + tl.arange(0, BLOCK_W)
    v = tl.arange(0, BLOCK_V)
    row_at = row[:, None] * V + v[None, :]
    weight_at = v[:, None] * stride_V + w[None, :] * stride_W
    rows_RV += first * V
    weight_EVW += expert.to(tl.int64) * stride_E
    if TWO:
        more_RV += first * V
        more_EVW += expert.to(tl.int64) * stride_E
    y = tl.zeros((ROWS, BLOCK_W), tl.float32)
    summed = tl.where(expert < E, V, 0)  # dropped rows are zeros
    for start in range(0, summed, BLOCK_V):
        left = v < V - start
        mask = left[:, None] & (w < W)[None, :]
        rows = load(rows_RV + row_at, left[None, :], EVEN)
        weight = load(weight_EVW + weight_at, mask, EVEN)
        y = add_matmul(rows, weight, y, PRECISION)
        if TWO:
            rows = load(more_RV + row_at, left[None, :], EVEN)
            weight = load(more_EVW + weight_at, mask, EVEN)
            y = add_matmul(rows, weight, y, PRECISION)
        row_at += BLOCK_V
        weight_at += BLOCK_V * stride_V
    if SCALED:
        y *= tl.load(scale_A + assignment)[:, None]
    y_at = y_AW + assignment[:, None] * W + w[None, :]
    tl.store(y_at, y.to(y_AW.dtype.element_ty), mask=here[:, None] & (w < W)[None, :])
