"""Products of numbers of 16 bits, on a processor that has no instructions for them.

There PyTorch multiplies one number after the other, twenty to a hundred times as slowly as in
float32. So the factors are widened first: their products and sums are then exact in float32, and
the result is rounded once, as processors do that can multiply them.
"""

from functools import cache

import torch
from torch import Tensor, nn

DTYPES = (torch.bfloat16, torch.float16)


@cache
def is_slow(dtype: torch.dtype) -> bool:
    """Whether PyTorch's products in this dtype are slow in main memory, on this machine."""
    names = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    if dtype not in names:
        return False
    try:
        return not getattr(torch.ops.mkldnn, names[dtype])()
    except (AttributeError, RuntimeError):  # another build, for another processor
        return False


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that nn.functional.linear would multiply x in, on a CPU."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def widens(x: Tensor) -> bool:
    """Whether `linear` is the faster one for x."""
    return x.is_cpu and is_slow(product_dtype(x)) and not torch.compiler.is_compiling()


def linear(x: Tensor, weight_NK: Tensor) -> Tensor:
    """Return nn.functional.linear(x, w), with gradients, by a product in float32."""
    dtype = product_dtype(x)
    with torch.autocast("cpu", enabled=False):
        wide = nn.functional.linear(x.to(dtype).float(), weight_NK.to(dtype).float())
        return wide.to(dtype)
