"""Under torch.compile, and with fake tensors, the kernels compute the same as eagerly."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from switchlm.kernels import select
from switchlm.kernels.permute import combine_rows, gather_rows, sort_by_expert


def layer(
    x_ND: Tensor, gate_N: Tensor, expert_N: Tensor, up_EDF: Tensor, down_EFD: Tensor
) -> Tensor:
    order = sort_by_expert(expert_N, gate_N > 0.2, up_EDF.shape[0])
    x_RD = gather_rows(x_ND, order, 1)
    y_RD = select.expert_feedforward(x_RD, order.counts_E, up_EDF, down_EFD)
    return combine_rows(y_RD, torch.where(gate_N > 0.2, gate_N, 0.0), order, 1)


def make() -> tuple[Tensor, ...]:
    return (
        torch.randn(20, 8, requires_grad=True),
        torch.rand(20, requires_grad=True),
        torch.randint(0, 4, (20,)),
        torch.randn(4, 8, 16, requires_grad=True),
        torch.randn(4, 16, 8, requires_grad=True),
    )


def test_compiled_equals_eager() -> None:
    # aot_eager traces forward and backward as inductor does, without a minute of C++.
    inputs = make()
    wanted = [t for t in inputs if t.requires_grad]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=False)
    eager = layer(*inputs)
    traced = compiled(*inputs)
    torch.testing.assert_close(traced, eager)
    torch.testing.assert_close(
        torch.autograd.grad(traced.square().sum(), wanted),
        torch.autograd.grad(eager.square().sum(), wanted),
    )


def test_the_layer_is_one_graph() -> None:
    inputs = make()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), layer(*inputs))


@pytest.mark.slow
def test_inductor_equals_eager() -> None:
    inputs = make()
    wanted = [t for t in inputs if t.requires_grad]
    eager = layer(*inputs)
    traced = torch.compile(layer, fullgraph=False)(*inputs)
    torch.testing.assert_close(traced, eager)
    torch.testing.assert_close(
        torch.autograd.grad(traced.sum(), wanted), torch.autograd.grad(eager.sum(), wanted)
    )


@pytest.mark.parametrize("function", ["grouped_matmul", "grouped_matmul_backward"])
def test_the_operators_keep_pytorchs_rules(function: str) -> None:
    x_RD, weight_EDF = torch.randn(6, 4), torch.randn(3, 4, 5)
    counts_E = torch.tensor([2, 0, 3])
    operator = getattr(torch.ops.switchlm, function).default
    arguments = (x_RD, weight_EDF, counts_E)
    if function == "grouped_matmul":
        arguments = (x_RD.requires_grad_(), weight_EDF.requires_grad_(), counts_E)
    else:
        arguments = (torch.randn(6, 5), *arguments)
    torch.library.opcheck(operator, arguments)


def test_fake_tensors_get_shapes() -> None:
    with FakeTensorMode():
        inputs = make()
        y_ND = layer(*inputs)
        y_ND.sum().backward()
    assert y_ND.shape == (20, 8)
    assert inputs[3].grad is not None
    assert inputs[3].grad.shape == (4, 8, 16)
