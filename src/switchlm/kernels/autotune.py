"""Choose between two ways to compute the same by trying both, once for each shape.

Which is faster depends on the GPU, the shapes and the versions, and no table written elsewhere
knows all of them. So the first call of a shape computes with both, compares the results, times
them, and the process remembers. The candidate is taken if it agrees and is clearly faster; a
candidate that fails is not taken, and the reason says why. The first call waits for the device,
later ones do not.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

REPEATS = 5
CLEARLY_FASTER = 0.97  # of the time; below noise nothing is gained
TOLERANCE = 2e-2  # of the norm: bfloat16 and TF32 round so, a wrong kernel is off by more

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Choice:
    """The name of what is taken, and the reason in one sentence."""

    name: str
    reason: str


_choices: dict[Hashable, Choice] = {}


def remembered(key: Hashable) -> Choice | None:
    """Return what was chosen for this key, None if it was not tried yet."""
    return _choices.get(key)


def choices() -> list[Choice]:
    """Return all that was chosen so far."""
    return list(_choices.values())


def forget() -> None:
    """Try anew."""
    _choices.clear()


def autotune(
    key: Hashable,
    candidate: tuple[str, Function],
    default: tuple[str, Function],
    tensors: Sequence[Tensor],
) -> Choice:
    """Try both on `tensors`, with gradients if they are wanted now, and remember the choice."""
    (ours, candidate_way), (theirs, default_way) = candidate, default
    expected = _run(default_way, tensors)
    taken = theirs
    try:
        error = _error(_run(candidate_way, tensors, expected[0]), expected)
        del expected
        if error <= TOLERANCE:
            fast, slow = _best_seconds((candidate_way, default_way), tensors)
            taken = ours if fast < CLEARLY_FASTER * slow else theirs
            reason = f"timed here: {ours} {fast * 1e3:.3g} ms, {theirs} {slow * 1e3:.3g} ms"
        else:
            reason = f"{ours} is off by {error:.1%} here"
    except _failures() as failure:
        said = str(failure).strip().splitlines() or [""]
        reason = f"{ours} failed here: {type(failure).__name__}: {said[0]}"
    _choices[key] = choice = Choice(taken, reason)
    return choice


def _failures() -> tuple[type[Exception], ...]:
    """Return what a kernel that does not suit this device raises; to run out of memory too."""
    try:
        from triton.errors import TritonError
    except ImportError:
        return (RuntimeError,)
    return (RuntimeError, TritonError)


def _run(
    function: Function, tensors: Sequence[Tensor], gradient: Tensor | None = None
) -> list[Tensor]:
    """Return the output and the gradients, stacks of weights summed over their last dim.

    gradient: of the output; the output itself if there is none.
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
    """Return the least time of each function, taking turns."""
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
