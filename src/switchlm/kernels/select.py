"""Which kernel multiplies, and why.

Shapes: R rows in the order of their experts, D in (d_model), F out (d_ff), E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from switchlm.kernels import compiled, cpu, cpu_feedforward, reference, torch_grouped
from switchlm.kernels.cpu_feedforward import Activation

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]

KERNELS: dict[str, Kernel] = {
    "reference": reference.grouped_matmul,
    "cpu": cpu.grouped_matmul,
    "torch_grouped": torch_grouped.grouped_matmul,
    "compiled": compiled.grouped_matmul,
}


@dataclass(frozen=True)
class Choice:
    """The kernel's name, a key of KERNELS, and the reason in one sentence."""

    name: str
    reason: str


def explain(x_RD: Tensor, weight_EDF: Tensor) -> Choice:
    """Return the kernel that `grouped_matmul` takes for such tensors, now."""
    device = x_RD.device.type
    fits = torch_grouped.fits(x_RD, weight_EDF)
    if device == "cuda" and fits and x_RD.dtype == torch.bfloat16:
        return Choice("torch_grouped", "bfloat16 on a GPU: one launch, counts stay on the device")
    plain = type(x_RD) in (Tensor, nn.Parameter) and device != "meta"
    if torch.compiler.is_compiling() or not plain:
        return Choice("compiled", "traced: the counts have no values yet, so one opaque operator")
    if device == "cuda" and fits:
        return Choice("torch_grouped", f"{x_RD.dtype} on a GPU: counts stay on the device")
    if device == "cpu":
        return Choice("cpu", "main memory: one product an expert, results written once")
    return Choice("reference", f"no faster kernel for {x_RD.dtype} of these widths on {device}")


def grouped_matmul(x_RD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """Multiply consecutive runs of rows with their expert's matrix, by the fastest kernel.

    The first counts_E[0] rows belong to expert 0, the next counts_E[1] to expert 1, and so on. Rows
    past the sum of the counts give zeros, and have zero gradients. Under autocast, inputs are cast
    as nn.Linear casts them.

    x_RD, weight_EDF: one floating dtype. counts_E: int64. Returns y_RF.
    """
    x_RD, weight_EDF = _autocast(x_RD, weight_EDF)
    return KERNELS[explain(x_RD, weight_EDF).name](x_RD, weight_EDF, counts_E)


def expert_feedforward(
    x_RD: Tensor,
    counts_E: Tensor,
    up_EDF: Tensor,
    down_EFD: Tensor,
    activation: Activation = "relu",
    gate_EDF: Tensor | None = None,
) -> Tensor:
    """Apply to every row its expert: down(act(up(x))), gated: down(act(gate(x)) * up(x)).

    The same as products by `grouped_matmul` with the activation between, and one pass on a CPU.
    activation: `relu`, or `gelu` (the tanh form, as T5 v1.1). Rows past the counts give zeros.
    """
    if gate_EDF is None:
        x_RD, up_EDF, down_EFD = _autocast(x_RD, up_EDF, down_EFD)
    else:
        x_RD, up_EDF, down_EFD, gate_EDF = _autocast(x_RD, up_EDF, down_EFD, gate_EDF)
    if explain(x_RD, up_EDF).name == "cpu":
        return cpu_feedforward.expert_feedforward(
            x_RD, counts_E, up_EDF, down_EFD, activation, gate_EDF
        )
    hidden_RF = grouped_matmul(x_RD, up_EDF if gate_EDF is None else gate_EDF, counts_E)
    if activation == "relu":
        hidden_RF = nn.functional.relu(hidden_RF)
    else:
        hidden_RF = nn.functional.gelu(hidden_RF, approximate="tanh")
    if gate_EDF is not None:
        hidden_RF = hidden_RF * grouped_matmul(x_RD, up_EDF, counts_E)
    return grouped_matmul(hidden_RF, down_EFD, counts_E)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast casts the inputs of nn.Linear: floating tensors, but not float64."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)
