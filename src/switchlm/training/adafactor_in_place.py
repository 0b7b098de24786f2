"""Adafactor's update of factored weights in place: for plain float32 tensors in main memory.

The plain way, in adafactor.py, passes a dozen times over temporaries as large as the weights. Here
a slice of a few experts at a time is read, and its squares stay in the cache while rows, columns
and the update's norm are summed; then the slice of the weights is written. The update's root mean
square, by which it is clipped, and the weights', by which the rate is multiplied, are those of the
whole stack: so weights and gradients are read once before the first weight is written, and once
more.

Shapes: M matrices (experts, or one plain matrix), D rows, F columns.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

DECAY_EXPONENT = -0.8
SQUARE_FLOOR = 1e-30  # added to squared gradients
SCALE_FLOOR = 1e-3  # the least root mean square a parameter counts with
SLICE = (
    2**19
)  # elements: squares of so many, and what they are made of, fit the caches of two cores


def fits(parameter: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> bool:
    """Whether `update` takes these: plain, float32, contiguous, in main memory, factored."""
    return "row" in state and all(
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and tensor.is_contiguous()
        for tensor in (parameter, gradient)
    )


def update(
    parameter: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    group: dict[str, Any],
    grad_scale: Tensor | None,
) -> None:
    """Do what Adafactor's own update does; `group` holds its settings."""
    state["step"] += 1
    new = float(state["step"]) ** DECAY_EXPONENT
    scale = 1.0 if grad_scale is None else float(grad_scale)
    num_rows, num_columns = parameter.shape[-2:]
    weight_MDF = parameter.view(-1, num_rows, num_columns)
    gradient_MDF = gradient.view(-1, num_rows, num_columns)
    row_MD, column_MF = state["row"].view(-1, num_rows), state["column"].view(-1, num_columns)
    together = not (group["per_expert_rms"] and parameter.dim() == 3)
    room = parameter.new_empty(min(max(SLICE, num_columns), parameter.numel()))

    row_MD.mul_(1 - new).add_(new * SQUARE_FLOOR)
    column_MF.mul_(1 - new).add_(new * SQUARE_FLOOR)
    mean_square_M = _move_statistics(gradient_MDF, row_MD, column_MF, new / scale**2, room)
    rate_M = torch.full_like(mean_square_M, group["lr"])
    if group["scale_by_parameter"]:
        norm_MD = torch.linalg.vector_norm(weight_MDF, dim=-1)
        size_M = norm_MD.square_().mean(-1) / weight_MDF.shape[2]
        rate_M *= _root(size_M, together).clamp_(min=SCALE_FLOOR)
    clip_M = (_root(mean_square_M, together) / (scale * group["clip"])).clamp_(min=1.0)
    keep_M11 = (1 - rate_M * group["weight_decay"])[:, None, None]
    step_MD = (row_MD.mean(-1, keepdim=True) / row_MD).sqrt_()
    step_MD *= (rate_M / (clip_M * -scale))[:, None]
    factor_MF = column_MF.rsqrt()
    for matrices, rows in _slices(weight_MDF):
        weight, gradient = weight_MDF[matrices, rows], gradient_MDF[matrices, rows]
        factor = _as(gradient, room)
        torch.mul(step_MD[matrices, rows, None], factor_MF[matrices, None], out=factor)
        if group["weight_decay"]:
            weight.mul_(keep_M11[matrices])
        weight.addcmul_(gradient, factor)


def _move_statistics(
    gradient_MDF: Tensor, row_MD: Tensor, column_MF: Tensor, share: float, room: Tensor
) -> Tensor:
    """Add `share` of the gradient's mean squares to rows and columns.

    Returns each matrix's mean square of the update, as it is before the gradient's divisor.
    """
    _, num_rows, num_columns = gradient_MDF.shape
    in_one = num_rows * num_columns <= SLICE
    sum_MF = torch.zeros_like(column_MF)
    for matrices, rows in _slices(gradient_MDF):
        square = _square(gradient_MDF[matrices, rows], room)
        row = row_MD[matrices, rows].add_(square.sum(-1), alpha=share / num_columns)
        column_MF[matrices].add_(square.sum(-2), alpha=share / num_rows)
        if in_one:
            torch.bmm(row.reciprocal()[:, None], square, out=sum_MF[matrices, None])
    if not in_one:
        for matrices, rows in _slices(gradient_MDF):
            square = _square(gradient_MDF[matrices, rows], room)
            weight = row_MD[matrices, rows].reciprocal()
            sum_MF[matrices] += torch.bmm(weight[:, None], square)[:, 0]
    return (sum_MF / column_MF).sum(-1) * row_MD.mean(-1) / (num_rows * num_columns)


def _slice(size: int) -> int:
    """Return how many things of this size make a slice, at least one."""
    return max(SLICE // size, 1)


def _slices(stack_MDF: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield matrices and rows, from to: several whole matrices, or some rows of one."""
    num_matrices, num_rows, num_columns = stack_MDF.shape
    matrices, rows = _slice(num_rows * num_columns), _slice(num_columns)
    for matrix in range(0, num_matrices, matrices):
        for row in range(0, num_rows, rows):
            yield slice(matrix, matrix + matrices), slice(row, row + rows)


def _square(gradient: Tensor, room: Tensor) -> Tensor:
    return torch.mul(gradient, gradient, out=_as(gradient, room))


def _as(like: Tensor, room: Tensor) -> Tensor:
    """Return room for a slice, in its shape."""
    return room[: like.numel()].view(like.shape)


def _root(mean_square_M: Tensor, together: bool) -> Tensor:
    """Return the root mean square of each matrix, or of all together, one a matrix."""
    if together:
        mean_square_M = mean_square_M.mean().expand_as(mean_square_M)
    return mean_square_M.sqrt()
