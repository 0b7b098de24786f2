"""Which kernel multiplies, and why."""

from torch import Tensor

from switchlm.kernels import cpu, reference


def grouped_matmul(x_RD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """Multiply consecutive runs of rows with their expert's matrix: see reference.py."""
    if x_RD.device.type == "cpu":
        return cpu.grouped_matmul(x_RD, weight_EDF, counts_E)
    return reference.grouped_matmul(x_RD, weight_EDF, counts_E)
