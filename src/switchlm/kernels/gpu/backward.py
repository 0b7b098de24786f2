"""The backward kernels: gradients of hidden rows and gates in one, of weights in another.

The gradient of a gate is the dot product of a token's gradient with its expert's output, which is
not stored. It equals the dot product of the hidden row with the token's gradient times the
transposed second matrix, which is computed here anyway. The gradient of the tokens is
`scatter_matmul` again.

Shapes: N tokens, K assignments per token, A = N * K assignments, R = A rows in the order of their
experts, D d_model, F d_ff, V and W the sides of a weight, E experts, T tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from switchlm.kernels.gpu.forward import Hidden
from switchlm.kernels.gpu.tiles import (
    INTERPRETED,
    Tiles,
    activate,
    activate_backward,
    add_matmul,
    autotune,
    configs,
    even,
    load,
    precision,
    rows_of_tile,
    tile_and_column,
)

COLUMNS = 32 if INTERPRETED else 128  # of hidden rows per program, which sums its part of the gate

HIDDEN_CONFIGS = configs(("BLOCK_V",), [(64, 8, 3), (64, 8, 4), (32, 8, 4)], (16, 4, 1))
WEIGHT_CONFIGS = configs(
    ("BLOCK_V", "BLOCK_W", "BLOCK_R"),
    [(128, 256, 64, 8, 5), (128, 128, 64, 8, 5), (128, 128, 32, 4, 4), (64, 128, 64, 4, 4)],
    (16, 32, 16, 4, 1),
)


def hidden_gradients(
    dy_ND: Tensor,
    weight_A: Tensor,
    down_EFD: Tensor,
    hidden: Hidden,
    assignment_R: Tensor,
    tiles: Tiles,
    activation: str,
) -> tuple[Hidden, Tensor]:
    """Return the gradients of inner and linear, with middle recomputed, and dweight_A.

    Rows of dropped assignments stay uninitialised; the gradients of their weights are zeros.
    """
    num_rows, (num_experts, d_ff, d_model) = assignment_R.shape[0], down_EFD.shape
    gated, kept = hidden.linear_RF is not None, hidden.inner_RF is not None
    inner_RF = hidden.middle_RF if hidden.inner_RF is None else hidden.inner_RF
    dinner_RF = torch.empty_like(inner_RF)
    gradients = Hidden(
        torch.empty_like(inner_RF) if kept else inner_RF,
        dinner_RF,
        torch.empty_like(inner_RF) if gated else None,
    )
    columns = triton.cdiv(d_ff, COLUMNS)
    dweight_CA = torch.empty(columns, num_rows, dtype=torch.float32, device=dy_ND.device)
    with torch.cuda.device_of(dy_ND):
        _hidden_gradients[(tiles.number * columns,)](
            dy_ND,
            weight_A,
            down_EFD,
            inner_RF,
            hidden.linear_RF,
            gradients.middle_RF,
            dinner_RF,
            gradients.linear_RF,
            dweight_CA,
            assignment_R,
            *tiles.arguments,
            d_model,
            d_ff,
            num_experts,
            num_rows // dy_ND.shape[0],
            num_rows,
            ACTIVATION=activation,
            GATED=gated,
            KEPT=kept,
            PRECISION=precision(dy_ND),
            ROWS=tiles.rows,
            BLOCK_W=COLUMNS,
        )
    return gradients, dweight_CA.sum(0)


@autotune(HIDDEN_CONFIGS, key=["V", "W", "ROWS", "GATED", "KEPT", "PRECISION"])
@even
@triton.jit
def _hidden_gradients(
    dy_NV, weight_A, down_EWV, inner_RW, linear_RW, middle_RW, dinner_RW, dlinear_RW, dweight_CA,
    assignment_R, expert_T, first_T, end_T, num_tiles, V, W, E, K, A,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, KEPT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_V: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    tile, column = tile_and_column(tl.program_id(0), num_tiles, tl.cdiv(W, BLOCK_W))
    expert = tl.load(expert_T + tile)
    if expert > E:
        return
    first = tl.load(first_T + tile)
    row, here = rows_of_tile(first, tl.load(end_T + tile), ROWS)
    assignment = tl.load(assignment_R + first + row)
    dweight_at = dweight_CA + column.to(tl.int64) * A + assignment
    if expert == E:
        tl.store(dweight_at, tl.zeros((ROWS,), tl.float32), mask=here)
        return
    w = column * BLOCK_W + tl.arange(0, BLOCK_W)
    v = tl.arange(0, BLOCK_V)
    dy_at = dy_NV + (assignment // K)[:, None] * V + v[None, :]
    down_EWV += expert.to(tl.int64) * V * W
    down_at = v[:, None] + w[None, :] * V
    gradient = tl.zeros((ROWS, BLOCK_W), tl.float32)
    for start in range(0, V, BLOCK_V):
        left = v < V - start
        dy = load(dy_at + start, left[None, :], EVEN)
        down = load(down_EWV + down_at + start, left[:, None] & (w < W)[None, :], EVEN)
        gradient = add_matmul(dy, down, gradient, PRECISION)
    at = row[:, None] * W + w[None, :]
    mask = here[:, None] & (w < W)[None, :]
    inner = tl.load(inner_RW + first * W + at, mask=mask, other=0.0).to(tl.float32)
    activated = activate(inner, ACTIVATION)
    slope = activate_backward(inner, ACTIVATION)
    dtype = dinner_RW.dtype.element_ty
    middle = activated
    if GATED:
        linear = tl.load(linear_RW + first * W + at, mask=mask, other=0.0).to(tl.float32)
        middle = activated * linear
        slope = slope * linear
    if KEPT:
        tl.store(middle_RW + first * W + at, middle.to(dtype), mask=mask)
    tl.store(dweight_at, tl.sum(gradient * middle.to(dtype).to(tl.float32), axis=1), mask=here)
    gradient *= tl.load(weight_A + assignment)[:, None]
    tl.store(dinner_RW + first * W + at, (gradient * slope).to(dtype), mask=mask)
    if GATED:
        tl.store(dlinear_RW + first * W + at, (gradient * activated).to(dtype), mask=mask)


def weight_gradient(
    left: Tensor,
    right: Tensor,
    assignment_R: Tensor,
    tiles: Tiles,
    dtype: torch.dtype,
    scale_A: Tensor | None = None,
) -> Tensor:
    """Return dweight_EVW: for each expert left^T @ right over its rows; zeros without rows.

    left [., V] and right [., W]: one has hidden rows, [R, F], the other tokens to gather, [N, D].
        right is gathered if there is a scale, left otherwise.
    """
    num_experts, v, w = tiles.end_E.shape[0], left.shape[1], right.shape[1]
    num_rows, scaled = assignment_R.shape[0], scale_A is not None
    tokens = right.shape[0] if scaled else left.shape[0]
    dweight_EVW = torch.empty(num_experts, v, w, dtype=dtype, device=left.device)

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (num_experts * triton.cdiv(v, meta["BLOCK_V"]) * triton.cdiv(w, meta["BLOCK_W"]),)

    with torch.cuda.device_of(left):
        _weight_gradient[grid](
            dweight_EVW,
            left,
            right,
            scale_A,
            assignment_R,
            tiles.end_E,
            v,
            w,
            num_rows // tokens,
            SCALED=scaled,
            PRECISION=precision(left),
        )
    return dweight_EVW


@autotune(WEIGHT_CONFIGS, key=["V", "W", "SCALED", "PRECISION"])
@triton.jit
def _weight_gradient(
    dweight_EVW, left, right, scale_A, assignment_R, end_E, V, W, K,
    SCALED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(W, BLOCK_W)
    per_expert = tl.cdiv(V, BLOCK_V) * columns
    expert = tl.program_id(0) // per_expert
    within = tl.program_id(0) % per_expert
    v = within // columns * BLOCK_V + tl.arange(0, BLOCK_V)
    w = within % columns * BLOCK_W + tl.arange(0, BLOCK_W)
    first = tl.load(end_E + expert - 1, mask=expert > 0, other=0)
    end = tl.load(end_E + expert)
    dweight = tl.zeros((BLOCK_V, BLOCK_W), tl.float32)
    for start in range(first, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        here = row < end
        assignment = tl.load(assignment_R + row, mask=here, other=0)
        if SCALED:
            left_row, right_row = row, assignment // K
        else:
            left_row, right_row = assignment // K, row
        a = tl.load(
            left + v[:, None] + left_row[None, :].to(tl.int64) * V,
            mask=(v < V)[:, None] & here[None, :],
            other=0.0,
        )
        b = tl.load(
            right + right_row[:, None].to(tl.int64) * W + w[None, :],
            mask=here[:, None] & (w < W)[None, :],
            other=0.0,
        )
        if SCALED:
            scale = tl.load(scale_A + assignment, mask=here, other=0.0)
            b = (b.to(tl.float32) * scale[:, None]).to(b.dtype)
        dweight = add_matmul(a, b, dweight, PRECISION)
    at = expert.to(tl.int64) * V * W + v[:, None] * W + w[None, :]
    tl.store(
        dweight_EVW + at,
        dweight.to(dweight_EVW.dtype.element_ty),
        mask=(v < V)[:, None] & (w < W)[None, :],
    )
