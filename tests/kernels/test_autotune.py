"""A candidate is taken if it agrees and is clearly faster, and the reason says so."""

import re
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from switchlm.kernels import autotune


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    autotune.clear_choices()
    yield
    autotune.clear_choices()


def quick(x: Tensor, weight_EDF: Tensor) -> Tensor:
    return (x[None] @ weight_EDF).sum(0)


def slow(x: Tensor, weight_EDF: Tensor) -> Tensor:
    time.sleep(0.005)
    return quick(x, weight_EDF)


def wrong(x: Tensor, weight_EDF: Tensor) -> Tensor:
    return 1.1 * quick(x, weight_EDF)


def wrong_gradient(x: Tensor, weight_EDF: Tensor) -> Tensor:
    return quick(x.detach(), weight_EDF) + 0 * x.sum()


def not_a_number(x: Tensor, weight_EDF: Tensor) -> Tensor:
    return quick(x, weight_EDF) * float("nan")


def failing(x: Tensor, weight_EDF: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("no memory left\nand a long report")


def tensors() -> list[Tensor]:
    return [torch.randn(3, 4, requires_grad=True), torch.randn(2, 4, 4, requires_grad=True)]


@pytest.mark.parametrize(
    ("candidate", "default", "taken", "reason"),
    [
        (quick, slow, "candidate", "timed here: candidate .* ms, default .* ms"),
        (slow, quick, "default", "timed here: candidate .* ms, default .* ms"),
        (wrong, slow, "default", r"candidate is off by 10\.0% here"),
        (wrong_gradient, slow, "default", r"candidate is off by 100\.0% here"),
        (not_a_number, slow, "default", "candidate is off by nan% here"),
        (failing, slow, "default", "candidate failed here: OutOfMemoryError: no memory left$"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_choice_and_its_reason(candidate, default, taken: str, reason: str) -> None:
    assert autotune.cached_choice("key") is None
    choice = autotune.autotune("key", ("candidate", candidate), ("default", default), tensors())
    assert choice.name == taken
    assert autotune.cached_choice("key") == choice
    assert re.search(reason, choice.reason)


def test_the_tensors_are_left_alone() -> None:
    given = tensors()
    autotune.autotune("key", ("candidate", quick), ("default", slow), given)
    assert all(tensor.grad is None for tensor in given)


@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
def test_without_gradients_none_are_compared(quiet) -> None:
    with quiet():
        choice = autotune.autotune(
            "key", ("candidate", wrong_gradient), ("default", slow), tensors()
        )
    assert choice.name == "candidate"


def test_other_errors_are_not_hidden() -> None:
    def broken(x: Tensor, weight_EDF: Tensor) -> Tensor:
        raise KeyError("a mistake")

    with pytest.raises(KeyError, match="a mistake"):
        autotune.autotune("key", ("candidate", broken), ("default", slow), tensors())
