"""One product of an expert, on one thread: PyTorch's, or native/products.c where rows are few.

Libraries for large products pack their factors first, which costs as much as it saves where one
factor has some ten to a hundred rows. The plain twins are `torch.mm` and `addmm_`.

Shapes: M x K times K x N.
"""

import torch
from torch import Tensor

from switchlm.kernels import half_precision
from switchlm.kernels.native import native

# Tokens of an expert; measured at 256 x 1,024, on an EPYC with AVX-512 and on one without.
MOST_ROWS = 256 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32
_WIDTH = 16  # whole vectors on every processor


def mm(
    a_MK: Tensor, b_KN: Tensor, out_MN: Tensor, *, add: bool = False, large: bool = False
) -> Tensor:
    """Write the product into `out_MN`, or add it, and return that.

    large: the result is more than the cache holds, and nobody reads it soon.
    """
    if a_MK.is_cpu and half_precision.is_slow(a_MK.dtype):
        wide_MN = torch.empty(out_MN.shape)
        mm(a_MK.float(), b_KN.float(), wide_MN)
        return out_MN.add_(wide_MN) if add else out_MN.copy_(wide_MN)
    if _fits(a_MK, b_KN, out_MN):
        _multiply(a_MK, b_KN, out_MN, add, large)
        return out_MN
    if add:
        return out_MN.addmm_(a_MK, b_KN)
    return torch.mm(a_MK, b_KN, out=out_MN)


def _fits(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor) -> bool:
    (rows, inputs), outputs = a_MK.shape, b_KN.shape[1]
    transposed = a_MK.stride(1) != 1  # of a gradient of weights, whose inputs are tokens
    return (
        (inputs if transposed else rows) <= MOST_ROWS
        and a_MK.dtype == torch.float32
        and a_MK.is_cpu
        and out_MN.stride(1) == 1
        and (
            (b_KN.stride(1) == 1 and outputs % _WIDTH == 0)
            or (b_KN.stride(0) == 1 and not transposed and inputs % _WIDTH == 0)
        )
        and not torch._C._len_torch_dispatch_stack()
        and native().library is not None
    )


def _multiply(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor, add: bool, large: bool) -> None:
    library = native().library
    assert library is not None
    (rows, inputs), outputs = a_MK.shape, b_KN.shape[1]
    a, b, y = a_MK.data_ptr(), b_KN.data_ptr(), out_MN.data_ptr()
    shape, y_row = (rows, inputs, outputs), out_MN.stride(0)
    if b_KN.stride(1) == 1 and outputs % _WIDTH == 0:
        a_row, a_column = a_MK.stride()
        library.product(a, a_row, a_column, b, b_KN.stride(0), y, y_row, *shape, add, large)
    else:
        a_row, b_column = a_MK.stride(0), b_KN.stride(1)
        library.product_of_columns(a, a_row, b, b_column, y, y_row, *shape, add)
