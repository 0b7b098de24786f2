"""Matmul with weights of 8 or 4 bits; docs/guides/compress.md has the layout.

8 bits: each row is quantised too, and sums are of integers, so that a row's result is the same bit
for bit whatever the other rows. 4 bits: rows are rounded to bfloat16, sums are in float32.
PyTorch's operators for both are private, so they are tested once (`int8_matmul_works`,
`int4_matmul_works`). Few rows are multiplied by small_batch.py where it has a library.

Shapes: R rows, K inputs, N outputs, B blocks of 64 outputs, G inputs that share a scale.
"""

import time
from collections.abc import Callable
from functools import cache, reduce
from typing import Protocol

import torch
from torch import Tensor

from switchlm import _torch
from switchlm.kernels.cpu import small_batch, small_matmul

BLOCK = 64  # outputs whose codes of 4 bits are stored together
GROUP_SIZES = (256, 128, 64, 32)  # of the operator for 4 bits
MANY_ROWS = 96  # from which dequantising 4 bits first pays; measured at 768 x 3072
EXACT = 1024  # inputs that float32 sums without rounding: 1024 * 127^2 < 2^24
_FAILURES = (RuntimeError, AttributeError, NotImplementedError, TypeError)


class Matrix(Protocol):
    """A quantised weight: maps rows x_RK to y_RN, in the dtype of x.

    codes: in any order.
    """

    num_outputs: int
    codes: Tensor

    def __call__(self, x_RK: Tensor) -> Tensor: ...

    def dequantise(self) -> Tensor:
        """Return the weight, [N, K] float32."""
        ...


def matrix(codes: Tensor, scale: Tensor, num_outputs: int) -> Matrix:
    """Return a matrix over stored tensors: int8 codes, or uint8 pairs of 4 bits; nothing is copied.

    codes, scale: of one matrix, as in the layout; may be views of mapped files.
    """
    if codes.dtype == torch.int8:
        return Int8Matrix(codes, scale)
    return Int4Matrix(codes, scale, num_outputs)


class Int8Matrix:
    """Codes [N, K], int8.

    scale_N: float32, one per output. w = code * scale.
    """

    def __init__(self, codes_NK: Tensor, scale_N: Tensor) -> None:
        self.codes = codes_NK
        self.scale_N = scale_N
        self.num_outputs = codes_NK.shape[0]

    def __call__(self, x_RK: Tensor) -> Tensor:
        if small_batch.is_small(x_RK, small_batch.MOST_ROWS_OF_INT8):
            return small_batch.int8_matmul(x_RK, self.codes, self.scale_N)
        codes_RK, scale_R1 = quantise_rows(x_RK)
        if x_RK.device.type == "cpu" and int8_matmul_works():
            sums_RN = _torch.int8_matmul(codes_RK, self.codes.t()).float()
        else:
            parts = zip(codes_RK.split(EXACT, 1), self.codes.split(EXACT, 1), strict=True)
            sums_RN = reduce(torch.add, (x.float() @ codes.float().t() for x, codes in parts))
        return (sums_RN.mul_(self.scale_N)).mul_(scale_R1).to(x_RK.dtype)

    def dequantise(self) -> Tensor:
        return self.codes.float() * self.scale_N[:, None]


class Int4Matrix:
    """Codes [B, K, 32], uint8, two in a byte.

    scale_GN2: bfloat16, scale and offset.

    w = (code - 8) * scale + offset.
    """

    def __init__(self, codes_BKJ: Tensor, scale_GN2: Tensor, num_outputs: int) -> None:
        self.codes = codes_BKJ
        self.scale_GN2 = scale_GN2
        self.num_outputs = num_outputs
        self.group_size = codes_BKJ.shape[1] // scale_GN2.shape[0]

    def __call__(self, x_RK: Tensor) -> Tensor:
        if small_batch.is_small(x_RK, small_batch.MOST_ROWS):
            y_RN = small_batch.int4_matmul(x_RK, self.codes, self.scale_GN2)
            return y_RN[:, : self.num_outputs]
        rounded_RK = x_RK.to(torch.bfloat16)
        if x_RK.device.type == "cpu" and x_RK.shape[0] < MANY_ROWS and int4_matmul_works():
            blocks, inputs, half = self.codes.shape
            y_RN = _torch.int4_matmul(
                rounded_RK,
                self.codes.view(blocks * 2 * half, inputs // 2),
                self.group_size,
                self.scale_GN2,
            )
        else:
            w_BKJ = self._dequantise_blocks(torch.bfloat16)
            if x_RK.device.type == "cpu" and small_matmul.is_slow(torch.bfloat16):
                rounded_RK, w_BKJ = rounded_RK.float(), w_BKJ.float()
            y_BRJ = rounded_RK @ w_BKJ
            y_RN = y_BRJ.transpose(0, 1).flatten(1)
        return y_RN[:, : self.num_outputs].to(x_RK.dtype)

    def dequantise(self) -> Tensor:
        w_NK = self._dequantise_blocks(torch.float32).transpose(1, 2).flatten(0, 1)
        return w_NK[: self.num_outputs].contiguous()

    def rows(self, index_I: Tensor) -> Tensor:
        """Return rows of the weight, [I, K] float32: for looking up embeddings."""
        place_I = index_I % BLOCK
        low_I1 = (place_I < BLOCK // 2)[:, None]
        pair_IK = self.codes[index_I // BLOCK, :, place_I % (BLOCK // 2)]
        code_IK = torch.where(low_I1, pair_IK & 15, pair_IK >> 4).float() - 8
        scale_IG, offset_IG = self.scale_GN2[:, index_I].float().permute(2, 1, 0)
        code_IGH = code_IK.unflatten(1, (scale_IG.shape[1], -1))
        return (code_IGH * scale_IG[..., None] + offset_IG[..., None]).flatten(1)

    def _dequantise_blocks(self, dtype: torch.dtype) -> Tensor:
        """Return the weight as [B, K, 64], outputs last."""
        codes_BKJ = torch.cat([self.codes & 15, self.codes >> 4], 2).to(dtype).sub_(8)
        scale_2GBJ = self.scale_GN2.to(dtype).unflatten(1, (-1, BLOCK)).permute(3, 0, 1, 2)
        scale_BGJ, offset_BGJ = scale_2GBJ.transpose(1, 2)
        w_BGHJ = codes_BKJ.unflatten(1, (scale_BGJ.shape[1], -1))
        return w_BGHJ.mul_(scale_BGJ.unsqueeze(2)).add_(offset_BGJ.unsqueeze(2)).flatten(1, 2)


def quantise_rows(x_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row as int8 codes and its scale [R, 1], float32: x is about code * scale."""
    scale_R1 = torch.linalg.vector_norm(x_RK, torch.inf, -1, keepdim=True, dtype=torch.float32)
    scale_R1 = scale_R1.div_(127).clamp_min_(torch.finfo(torch.float32).tiny)
    return (x_RK / scale_R1).round_().to(torch.int8), scale_R1


def pack_int4(codes_NK: Tensor) -> Tensor:
    """Return [B, K, 32] uint8 of codes 0..15: byte j holds the outputs j (low bits) and j + 32."""
    num_outputs = codes_NK.shape[0]
    padded = torch.nn.functional.pad(codes_NK.to(torch.uint8), (0, 0, 0, -num_outputs % BLOCK))
    low_BJK, high_BJK = padded.unflatten(0, (-1, 2, BLOCK // 2)).unbind(1)
    return (low_BJK | (high_BJK << 4)).transpose(1, 2).contiguous()


def group_size_of(inputs: int, most: int) -> int | None:
    """Return the largest group size up to `most` that divides the inputs; None if there is none."""
    return next((size for size in GROUP_SIZES if size <= most and inputs % size == 0), None)


def _extreme(rows: int, inputs: int) -> Tensor:
    """Return codes whose sums would overflow where a processor sums in 16 bits."""
    codes = torch.arange(rows * inputs, device="cpu").view(rows, inputs) % 3 - 1
    return (127 * codes.sign()).to(torch.int8).fill_diagonal_(127)


@cache
@torch.autocast("cpu", enabled=False)  # which may be on when a model is the first to ask
def int8_matmul_works() -> bool:
    """Whether torch._int_mm multiplies int8 exactly on this machine, and no slower than float32."""
    x, weight = _extreme(3, 64), _extreme(32, 64).abs()
    try:
        found = _torch.int8_matmul(x, weight.t())
    except _FAILURES:
        return False
    exact = torch.equal(found.long(), x.long() @ weight.long().t())
    # Thirty times as slow on processors without instructions for it.
    many, square = _extreme(64, 512), _extreme(512, 512)
    return exact and _seconds(lambda: _torch.int8_matmul(many, square.t())) < _seconds(
        lambda: many.float() @ square.float().t()
    )


def _seconds(work: Callable[[], Tensor]) -> float:
    """Return the shortest time of four."""
    taken = []
    for _ in range(4):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


@cache
@torch.autocast("cpu", enabled=False)
def int4_matmul_works() -> bool:
    """Whether PyTorch has the operator for 4 bits, and it reads this layout (AVX-512)."""
    codes_NK = (torch.arange(128 * 32, device="cpu").view(128, 32) * 7) % 16
    x = (torch.arange(2 * 32, device="cpu").view(2, 32) % 5).to(torch.bfloat16)
    scale_2 = torch.tensor([1.0, 8.0], dtype=torch.bfloat16, device="cpu")
    scale = scale_2.expand(1, 128, 2).contiguous()
    try:
        found = _torch.int4_matmul(x, pack_int4(codes_NK).view(128, 16), 32, scale)
    except _FAILURES:
        return False
    expected = x.float() @ codes_NK.float().t()
    return torch.allclose(found.float(), expected, rtol=0.01)
