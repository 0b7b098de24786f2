"""Autotuning: time two implementations of the same function once per shape, and keep the faster.

Which one is faster depends on the GPU, the shapes and the versions. So the first call with a shape
computes with both, compares the results, times them and caches the choice for this process. The
candidate is taken if it agrees and is clearly faster; if it fails, it is not taken, and the reason
says why. The first call waits for the device, later ones do not.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

REPEATS = 5
CLEARLY_FASTER = 0.97  # of the default's time; smaller gains are noise
TOLERANCE = 2e-2  # of the norm: rounding of bfloat16 and TF32 is below, a wrong kernel above

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Choice:
    """The name of the implementation that is used, and the reason in one sentence."""

    name: str
    reason: str


_choices: dict[Hashable, Choice] = {}


def cached_choice(key: Hashable) -> Choice | None:
    """Return the choice for this key, None if it was not timed yet."""
    return _choices.get(key)


def clear_choices() -> None:
    """Forget all choices."""
    _choices.clear()


def autotune(
    key: Hashable,
    candidate: tuple[str, Function],
    default: tuple[str, Function],
    tensors: Sequence[Tensor],
) -> Choice:
    """Time both on `tensors`, with gradients if they are enabled, and cache the choice."""
    (ours, run_candidate), (theirs, run_default) = candidate, default
    expected = _run(run_default, tensors)
    taken = theirs
    try:
        error = _error(_run(run_candidate, tensors, expected[0]), expected)
        del expected
        if error <= TOLERANCE:
            fast, slow = _best_seconds((run_candidate, run_default), tensors)
            taken = ours if fast < CLEARLY_FASTER * slow else theirs
            reason = f"timed here: {ours} {fast * 1e3:.3g} ms, {theirs} {slow * 1e3:.3g} ms"
        else:
            reason = f"{ours} is off by {error:.1%} here"
    except _failures() as failure:
        lines = str(failure).strip().splitlines() or [""]
        reason = f"{ours} failed here: {type(failure).__name__}: {lines[0]}"
    _choices[key] = choice = Choice(taken, reason)
    return choice


def _failures() -> tuple[type[Exception], ...]:
    """Return the exceptions of a kernel that does not suit this device, or runs out of memory."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return (RuntimeError,)
    return (RuntimeError, TritonError)


def _run(
    function: Function, tensors: Sequence[Tensor], gradient: Tensor | None = None
) -> list[Tensor]:
    """Return the output and the gradients, those of stacked weights summed over their last dim.

    gradient: of the output; None takes the output itself.
    """
    learning = torch.is_grad_enabled()
    leaves = [t.detach().requires_grad_(learning and t.requires_grad) for t in tensors]
    wanted = [t for t in leaves if t.requires_grad]
    y = function(*leaves)
    gradient = y.detach() if gradient is None else gradient
    gradients = torch.autograd.grad(y, wanted, gradient) if wanted else ()
    found = [y.detach(), *gradients]
    return [t.sum(-1, dtype=torch.float32) if t.dim() == 3 else t for t in found]


def _error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest relative difference of norms; NaN if there is one."""
    errors = [
        (ours.float() - theirs.float()).norm() / theirs.float().norm().clamp(min=1e-30)
        for ours, theirs in zip(actual, expected, strict=True)
    ]
    return float(torch.stack(errors).max())


def _best_seconds(functions: Sequence[Function], tensors: Sequence[Tensor]) -> list[float]:
    """Return the shortest time of each function, run alternately."""
    device = tensors[0].device
    best = [float("inf")] * len(functions)
    for _ in range(REPEATS):
        for index, function in enumerate(functions):
            _wait(device)
            started = time.perf_counter()
            _run(function, tensors)
            _wait(device)
            best[index] = min(best[index], time.perf_counter() - started)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
