"""The Triton kernels equal the reference: output and all gradients, whatever the loads.

Without a GPU they run in Triton's interpreter (tests/conftest.py switches it on), program by
program; with one, the same tests run compiled.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from switchlm.kernels import reference
from switchlm.kernels.permute import ExpertOrder, sort_by_expert
from switchlm.kernels.reference import Activation

# Older interpreters take no loops whose length is a loaded number; a GPU needs none.
pytest.importorskip(
    "triton", None if torch.cuda.is_available() else "3.7", reason="needs the extra `triton`"
)
from switchlm.kernels.gpu.feedforward import switch_feedforward

HAS_GPU = torch.cuda.is_available()
D, F = 24, 40  # no multiples of any block


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(HAS_GPU, reason="compiled for the GPU here")),
        pytest.param(
            "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")]
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Fill allocated memory with NaN, so that unwritten results are noticed."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield request.param
    torch.use_deterministic_algorithms(False)


@dataclass
class Case:
    """Tensors of one layer, and which assignments are kept; gate_EDF is None if not gated."""

    x_ND: Tensor
    weight_A: Tensor
    kept_A: Tensor
    order: ExpertOrder
    up_EDF: Tensor
    down_EFD: Tensor
    gate_EDF: Tensor | None

    @property
    def leaves(self) -> list[Tensor]:
        tensors = (self.x_ND, self.weight_A, self.up_EDF, self.down_EFD, self.gate_EDF)
        return [t for t in tensors if t is not None]

    def arguments(self) -> tuple:
        weight_A = torch.where(self.kept_A, self.weight_A, 0.0)
        return self.x_ND, weight_A, self.order, self.up_EDF, self.down_EFD


def make(
    loads: list[int],
    dropped: int,
    device: str,
    *,
    per_token: int = 1,
    gated: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Assign `loads` and `dropped` to tokens at random."""
    generator = torch.Generator().manual_seed(sum(loads) + dropped)
    expert_A = torch.arange(len(loads)).repeat_interleave(torch.tensor(loads))
    kept_A = torch.tensor([True] * len(expert_A) + [False] * dropped)
    expert_A = torch.cat([expert_A, torch.zeros(dropped, dtype=torch.long)])
    shuffled = torch.randperm(len(expert_A), generator=generator)
    expert_A, kept_A = expert_A[shuffled].to(device), kept_A[shuffled].to(device)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=generator) * scale
        return drawn.to(device, dtype).requires_grad_()

    experts = len(loads)
    return Case(
        x_ND=draw(len(expert_A) // per_token, D),
        weight_A=torch.rand(len(expert_A), generator=generator).to(device).requires_grad_(),
        kept_A=kept_A,
        order=sort_by_expert(expert_A, kept_A, experts),
        up_EDF=draw(experts, D, F, scale=D**-0.5),
        down_EFD=draw(experts, F, D, scale=F**-0.5),
        gate_EDF=draw(experts, D, F, scale=D**-0.5) if gated else None,
    )


def slow(
    x_ND: Tensor,
    weight_A: Tensor,
    order: ExpertOrder,
    up_EDF: Tensor,
    down_EFD: Tensor,
    activation: Activation,
    gate_EDF: Tensor | None,
) -> Tensor:
    """Compute the same with the reference, one step after the other."""
    per_token = weight_A.shape[0] // x_ND.shape[0]
    x_RD = x_ND[order.assignment_R // per_token]
    inner_EDF = up_EDF if gate_EDF is None else gate_EDF
    hidden_RF = reference.grouped_matmul(x_RD, inner_EDF, order.counts_E)
    if activation == "relu":
        hidden_RF = hidden_RF.relu()
    else:
        hidden_RF = torch.nn.functional.gelu(hidden_RF, approximate="tanh")
    if gate_EDF is not None:
        hidden_RF = hidden_RF * reference.grouped_matmul(x_RD, up_EDF, order.counts_E)
    y_AD = reference.grouped_matmul(hidden_RF, down_EFD, order.counts_E)[order.row_A]
    return (y_AD * weight_A[:, None].to(y_AD.dtype)).unflatten(0, (-1, per_token)).sum(1)


def both(case: Case, activation: Activation) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the results of the kernels and of the reference, output and gradients."""
    dy_ND = torch.linspace(-1, 1, case.x_ND.numel(), device=case.x_ND.device)
    dy_ND = dy_ND.view(case.x_ND.shape).to(case.x_ND.dtype)
    results = []
    for function in (switch_feedforward, slow):
        y_ND = function(*case.arguments(), activation, case.gate_EDF)
        results.append((y_ND, *torch.autograd.grad(y_ND, case.leaves, dy_ND)))
    return zip(*results, strict=True)


def check(case: Case, activation: Activation) -> None:
    for ours, theirs in both(case, activation):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        if ours.dtype == torch.float32 and case.x_ND.dtype == torch.float32:
            torch.testing.assert_close(ours, theirs)
        else:  # roundings differ element by element, not in the whole
            error = (ours.float() - theirs.float()).norm()
            assert error <= 2e-2 * theirs.float().norm()


@pytest.mark.parametrize("per_token", [1, 2])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_equals_the_reference(
    activation: Activation, gated: bool, per_token: int, device: str
) -> None:
    check(make([9, 0, 21, 3], 5, device, per_token=per_token, gated=gated), activation)


@pytest.mark.parametrize(
    ("activation", "gated", "per_token"), [("relu", False, 1), ("gelu", True, 2)]
)
def test_equals_the_reference_in_bfloat16(
    activation: Activation, gated: bool, per_token: int, device: str
) -> None:
    case = make([9, 0, 21, 3], 5, device, per_token=per_token, gated=gated, dtype=torch.bfloat16)
    check(case, activation)


@pytest.mark.parametrize(
    ("loads", "dropped"),
    [
        ([16, 32], 0),  # full tiles
        ([0, 0, 50, 0, 1], 0),  # skewed, and experts without rows
        ([1], 0),
        ([3, 0], 40),  # most are dropped: tiles of dropped rows only
        ([0, 0], 7),  # all are
    ],
)
def test_any_loads(loads: list[int], dropped: int, device: str) -> None:
    check(make(loads, dropped, device), "relu")


def test_dropped_tokens_are_zeros_in_output_and_gradients(device: str) -> None:
    case = make([4, 9], 20, device)
    y_ND = switch_feedforward(*case.arguments())
    dx_ND, dweight_A = torch.autograd.grad(y_ND.sum(), (case.x_ND, case.weight_A))
    for tensor in (y_ND, dx_ND, dweight_A):
        assert torch.equal(tensor[~case.kept_A], torch.zeros_like(tensor[~case.kept_A]))
        assert (tensor[case.kept_A] != 0).any()


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_without_gradients_the_bits_are_the_same(gated: bool, device: str) -> None:
    case = make([9, 12], 3, device, gated=gated)
    y_ND = switch_feedforward(*case.arguments(), "gelu", case.gate_EDF)
    with torch.inference_mode():
        assert torch.equal(switch_feedforward(*case.arguments(), "gelu", case.gate_EDF), y_ND)


def test_frozen_tensors_get_no_gradient(device: str) -> None:
    case = make([9, 12], 3, device)
    case.up_EDF.requires_grad_(False)
    case.x_ND.requires_grad_(False)
    for function in (switch_feedforward, slow):
        function(*case.arguments(), "relu", None).square().sum().backward()
        assert case.up_EDF.grad is None
        assert case.x_ND.grad is None
    ours_and_theirs = case.down_EFD.grad
    case.down_EFD.grad = None
    slow(*case.arguments(), "relu", None).square().sum().backward()
    torch.testing.assert_close(ours_and_theirs, 2 * case.down_EFD.grad)


def test_inputs_may_be_strided(device: str) -> None:
    plain = make([9, 12], 3, device)
    case = make([9, 12], 3, device)
    case.x_ND = plain.x_ND.detach().T.contiguous().T.requires_grad_()
    case.up_EDF = plain.up_EDF.detach().mT.contiguous().mT.requires_grad_()
    case.down_EFD = plain.down_EFD.detach().mT.contiguous().mT.requires_grad_()
    for (ours, _), (theirs, _) in zip(both(case, "relu"), both(plain, "relu"), strict=True):
        torch.testing.assert_close(ours, theirs)


class NothingAsked(TorchDispatchMode):
    """Refuses operators whose result the host would have to wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert torch.Tag.data_dependent_output not in func.tags, func
        assert torch.Tag.dynamic_output_shape not in func.tags, func
        return func(*args, **(kwargs or {}))


def test_no_kernel_launch_depends_on_the_loads(device: str) -> None:
    case = make([9, 12], 3, device, gated=True)
    with NothingAsked():
        y_ND = switch_feedforward(*case.arguments(), "gelu", case.gate_EDF)
        torch.autograd.grad(y_ND, case.leaves, torch.ones_like(y_ND))
    with NothingAsked(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        int(case.order.counts_E[0])
