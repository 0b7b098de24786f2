"""Adafactor (Shazeer & Stern 2018) as T5 uses it: sublinear memory, steps relative to the weights.

The second moment of a large matrix is kept as the mean over its rows and over its columns. Decay is
1 - t^-0.8, updates are clipped to a root mean square of 1, and the learning rate is multiplied by
the parameter's root mean square. T5's relative step size, min(0.01, 1 / sqrt(t)), is a schedule:
learning_rate 0.01, inverse_sqrt, no warm-up, decay_steps 10000.

Stacked experts [E, D, F] are factored expert by expert over D and F. This is what T5's rule, the
two largest dims, means wherever E is smaller than D and F; it keeps experts from sharing
statistics, so that one that few tokens reach still takes steps of full size; and it works alike
when the experts are sharded over machines.

All arithmetic here is out of place, so that sharded tensors (DTensor) work and a step can be
skipped without a trace. On a CPU plain factored tensors are updated in place instead, to the same
result but for rounding: adafactor_in_place.py.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from switchlm.training import adafactor_in_place
from switchlm.training.adafactor_in_place import DECAY_EXPONENT, SCALE_FLOOR, SQUARE_FLOOR
from switchlm.training.guard import keep_where


class Adafactor(Optimizer):
    """Adafactor without momentum.

    lr: the step's learning rate, set from outside. scale_by_parameter: multiply it by the
    parameter's root mean square. factor_from: the size from which both dims are factored (T5: 128).
    per_expert_rms: take root mean squares (of updates and parameters) expert by expert rather than
    over the whole stack. clip: the largest root mean square of an update.

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
        assert closure is None, "Adafactor takes one gradient a step"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                now = parameter, parameter.grad, self.state[parameter]
                if not adafactor_in_place.fits(*now):
                    self._update(*now, group)
                elif self.found_inf is None or not self.found_inf:
                    adafactor_in_place.update(*now, group, self.grad_scale)

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
    """Return zeros: `step`, and `row` and `column` where the last two dims are factored.

    Else `square`, of the parameter's shape. All float32.
    """
    value = parameter.detach().float()
    state = {"step": torch.zeros((), device=parameter.device)}
    if parameter.dim() >= 2 and min(parameter.shape[-2:]) >= factor_from:
        state["row"] = torch.zeros_like(_mean(value, -1))
        state["column"] = torch.zeros_like(_mean(value, -2))
    else:
        state["square"] = torch.zeros_like(value)
    return state


def _mean(x: Tensor, *dims: int, keepdim: bool = False) -> Tensor:
    """Return the mean over `dims`; of a sharded tensor the mean over all shards."""
    mean = x.mean(dims, keepdim=keepdim)
    if isinstance(mean, DTensor):
        from torch.distributed.tensor import Replicate

        settled = [Replicate() if spot.is_partial() else spot for spot in mean.placements]
        mean = mean.redistribute(placements=settled)
    return mean


def _rms(x: Tensor, per_expert: bool) -> Tensor:
    """Return the root mean square of x, or of every x[e], shaped to broadcast with x."""
    dims = tuple(range(1 if per_expert else 0, x.dim()))
    return _mean(x.square(), *dims, keepdim=per_expert).sqrt()
