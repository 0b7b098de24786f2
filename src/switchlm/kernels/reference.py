"""The obviously right grouped product: one matrix product an expert, in a loop.

Every fast kernel is tested against this one, gradients too. Shapes: R rows, D in, F out, E experts.
"""

import torch
from torch import Tensor


def grouped_matmul(x_RD: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """Multiply consecutive runs of rows with their expert's matrix.

    The first counts_E[0] rows belong to expert 0, the next counts_E[1] to expert 1, and so on. Rows
    past the sum of the counts (dropped tokens) give zeros.

    x_RD, weight_EDF: one floating dtype. counts_E: int64. Returns y_RF.
    """
    pieces = []
    start = 0
    for weight_DF, count in zip(weight_EDF.unbind(0), counts_E.tolist(), strict=True):
        pieces.append(x_RD[start : start + count] @ weight_DF)
        start += count
    pieces.append(x_RD.new_zeros(x_RD.shape[0] - start, weight_EDF.shape[2]))
    return torch.cat(pieces)
