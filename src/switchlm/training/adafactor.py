"""Adafactor (Shazeer & Stern 2018) as T5 uses it: sublinear memory, steps relative to the weights.

The second moment of a large matrix is kept as the mean over its rows and over its columns. Decay is
1 - t^-0.8, updates are clipped to a root mean square of 1, and the learning rate is multiplied by
the parameter's root mean square. T5's relative step size, min(0.01, 1 / sqrt(t)), is a schedule:
learning_rate 0.01, inverse_sqrt, no warm-up, decay_steps 10000.

Stacked experts [E, D, F] are factored for each expert over D and F, as in T5 (the two largest dims)
if E is smaller than D and F. So experts share no statistics, an expert with few tokens still takes
steps of full size, and sharded experts are updated equally.

`_update` works out of place, so that it supports sharded tensors (DTensor) and steps can be
skipped. `update_in_place` gives the same result but for rounding, for factored float32 tensors in
main memory: a slice of a few experts at a time, whose squares stay in the cache while rows, columns
and the update's norm are summed. Since root mean squares are those of the full stack, weights and
gradients are read twice.

Shapes: M matrices (experts, or one plain matrix), D rows, F columns.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

DECAY_EXPONENT = -0.8
SQUARE_FLOOR = 1e-30  # added to squared gradients
SCALE_FLOOR = 1e-3  # minimum of the root mean square of a parameter
SLICE = 2**19  # elements; a slice and its squares fit the caches of two cores


class Adafactor(Optimizer):
    """Adafactor without momentum.

    lr: learning rate of the step.
    scale_by_parameter: multiply it by the parameter's root mean square.
    factor_from: minimum size of both last dims to factor them (T5: 128).
    per_expert_rms: root mean squares (of updates and parameters) are those of each expert, not of
        the stack.
    clip: largest root mean square of an update.

    As in torch's fused optimizers, `found_inf` (a float32 scalar, 1 to skip the step) and
    `grad_scale` (a divisor of the gradients) may be set before `step`.
    """

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        *,
        weight_decay: float = 0.0,
        scale_by_parameter: bool = True,
        factor_from: int = 128,
        per_expert_rms: bool = False,
        clip: float = 1.0,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "weight_decay": weight_decay,
                "scale_by_parameter": scale_by_parameter,
                "factor_from": factor_from,
                "per_expert_rms": per_expert_rms,
                "clip": clip,
            },
        )
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = initial_state(parameter, group["factor_from"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "Adafactor takes one gradient per step"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                tensors = parameter, parameter.grad, self.state[parameter]
                if not can_update_in_place(*tensors):
                    self._update(*tensors, group)
                elif self.found_inf is None or not self.found_inf:
                    update_in_place(*tensors, group, self.grad_scale)

    def _update(
        self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        gradient = gradient.float()
        if self.grad_scale is not None:
            gradient = gradient / self.grad_scale
        step = state["step"] + 1
        decay = 1 - step**DECAY_EXPONENT
        square = gradient.square() + SQUARE_FLOOR
        new = {"step": step}
        if "row" in state:
            new["row"] = state["row"] * decay + _mean(square, -1) * (1 - decay)
            new["column"] = state["column"] * decay + _mean(square, -2) * (1 - decay)
            row_factor = (new["row"] / _mean(new["row"], -1, keepdim=True)).rsqrt()
            update = gradient * row_factor.unsqueeze(-1) * new["column"].rsqrt().unsqueeze(-2)
        else:
            new["square"] = state["square"] * decay + square * (1 - decay)
            update = gradient * new["square"].rsqrt()

        per_expert = group["per_expert_rms"] and parameter.dim() == 3
        update = update / (_rms(update, per_expert) / group["clip"]).clamp(min=1.0)
        value = parameter.float()
        rate: float | Tensor = group["lr"]
        if group["scale_by_parameter"]:
            rate = _rms(value, per_expert).clamp(min=SCALE_FLOOR) * rate
        new_value = value - rate * (update + group["weight_decay"] * value)

        if self.found_inf is None:
            skip = torch.zeros((), dtype=torch.bool, device=parameter.device)
        else:
            skip = self.found_inf != 0
        keep_where(skip, parameter, new_value.to(parameter.dtype))
        for name, tensor in new.items():
            keep_where(skip, state[name], tensor)


def initial_state(parameter: Tensor, factor_from: int) -> dict[str, Tensor]:
    """Return float32 zeros: `step`, and `row` and `column` if factored, else `square`."""
    value = parameter.detach().float()
    state = {"step": torch.zeros((), device=parameter.device)}
    if parameter.dim() >= 2 and min(parameter.shape[-2:]) >= factor_from:
        state["row"] = torch.zeros_like(_mean(value, -1))
        state["column"] = torch.zeros_like(_mean(value, -2))
    else:
        state["square"] = torch.zeros_like(value)
    return state


def keep_where(skip: Tensor, old: Tensor, new: Tensor) -> None:
    """Overwrite `old` with `new` in place unless the bool scalar `skip`.

    By `where`, not by a product with 0 or 1: zero times infinity is NaN.
    """
    old.copy_(torch.where(skip, old, new))


def _mean(x: Tensor, *dims: int, keepdim: bool = False) -> Tensor:
    """Return the mean over `dims`; of a sharded tensor the mean over all shards."""
    mean = x.mean(dims, keepdim=keepdim)
    if isinstance(mean, DTensor):
        from torch.distributed.tensor import Replicate

        reduced = [Replicate() if one.is_partial() else one for one in mean.placements]
        mean = mean.redistribute(placements=reduced)
    return mean


def _rms(x: Tensor, per_expert: bool) -> Tensor:
    """Return the root mean square of x, or of every x[e], shaped to broadcast with x."""
    dims = tuple(range(1 if per_expert else 0, x.dim()))
    return _mean(x.square(), *dims, keepdim=per_expert).sqrt()


def can_update_in_place(parameter: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> bool:
    """Whether all are plain, float32, contiguous and in main memory, and the state is factored."""
    return "row" in state and all(
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and tensor.is_contiguous()
        for tensor in (parameter, gradient)
    )


def update_in_place(
    parameter: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    group: dict[str, Any],
    grad_scale: Tensor | None,
) -> None:
    """Do what `Adafactor._update` does; `group` has the optimizer's settings."""
    state["step"] += 1
    new = float(state["step"]) ** DECAY_EXPONENT
    scale = 1.0 if grad_scale is None else float(grad_scale)
    num_rows, num_columns = parameter.shape[-2:]
    weight_MDF = parameter.view(-1, num_rows, num_columns)
    gradient_MDF = gradient.view(-1, num_rows, num_columns)
    row_MD, column_MF = state["row"].view(-1, num_rows), state["column"].view(-1, num_columns)
    per_expert = group["per_expert_rms"] and parameter.dim() == 3
    workspace = parameter.new_empty(min(max(SLICE, num_columns), parameter.numel()))

    row_MD.mul_(1 - new).add_(new * SQUARE_FLOOR)
    column_MF.mul_(1 - new).add_(new * SQUARE_FLOOR)
    mean_square_M = _add_statistics(gradient_MDF, row_MD, column_MF, new / scale**2, workspace)
    rate_M = torch.full_like(mean_square_M, group["lr"])
    if group["scale_by_parameter"]:
        norm_MD = torch.linalg.vector_norm(weight_MDF, dim=-1)
        size_M = norm_MD.square_().mean(-1) / weight_MDF.shape[2]
        rate_M *= _root(size_M, per_expert).clamp_(min=SCALE_FLOOR)
    clip_M = (_root(mean_square_M, per_expert) / (scale * group["clip"])).clamp_(min=1.0)
    keep_M11 = (1 - rate_M * group["weight_decay"])[:, None, None]
    step_MD = (row_MD.mean(-1, keepdim=True) / row_MD).sqrt_()
    step_MD *= (rate_M / (clip_M * -scale))[:, None]
    factor_MF = column_MF.rsqrt()
    for matrices, rows in _slices(weight_MDF):
        weight, gradient = weight_MDF[matrices, rows], gradient_MDF[matrices, rows]
        factor = workspace[: gradient.numel()].view(gradient.shape)
        torch.mul(step_MD[matrices, rows, None], factor_MF[matrices, None], out=factor)
        if group["weight_decay"]:
            weight.mul_(keep_M11[matrices])
        weight.addcmul_(gradient, factor)


def _add_statistics(
    gradient_MDF: Tensor, row_MD: Tensor, column_MF: Tensor, share: float, workspace: Tensor
) -> Tensor:
    """Add `share` times the gradient's mean squares to rows and columns.

    Returns the mean square of the update of each matrix, before division by `grad_scale`.
    """
    _, num_rows, num_columns = gradient_MDF.shape
    one_slice = num_rows * num_columns <= SLICE
    sum_MF = torch.zeros_like(column_MF)
    for matrices, rows in _slices(gradient_MDF):
        square = _square(gradient_MDF[matrices, rows], workspace)
        row = row_MD[matrices, rows].add_(square.sum(-1), alpha=share / num_columns)
        column_MF[matrices].add_(square.sum(-2), alpha=share / num_rows)
        if one_slice:
            torch.bmm(row.reciprocal()[:, None], square, out=sum_MF[matrices, None])
    if not one_slice:
        for matrices, rows in _slices(gradient_MDF):
            square = _square(gradient_MDF[matrices, rows], workspace)
            weight = row_MD[matrices, rows].reciprocal()
            sum_MF[matrices] += torch.bmm(weight[:, None], square)[:, 0]
    return (sum_MF / column_MF).sum(-1) * row_MD.mean(-1) / (num_rows * num_columns)


def _slices(stack_MDF: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield slices of matrices and of rows: several full matrices, or some rows of one."""
    num_matrices, num_rows, num_columns = stack_MDF.shape
    matrices = max(SLICE // (num_rows * num_columns), 1)
    rows = max(SLICE // num_columns, 1)
    for matrix in range(0, num_matrices, matrices):
        for row in range(0, num_rows, rows):
            yield slice(matrix, matrix + matrices), slice(row, row + rows)


def _square(gradient: Tensor, workspace: Tensor) -> Tensor:
    return torch.mul(gradient, gradient, out=workspace[: gradient.numel()].view(gradient.shape))


def _root(mean_square_M: Tensor, per_expert: bool) -> Tensor:
    """Return the root mean square of each matrix, or that of all of them, for each matrix."""
    if not per_expert:
        mean_square_M = mean_square_M.mean().expand_as(mean_square_M)
    return mean_square_M.sqrt()
