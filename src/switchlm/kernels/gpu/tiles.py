"""What the Triton kernels share: tiles of rows, laid out on the device.

The host does not know the number of rows per expert, and would have to wait for the GPU. So the
number of programs is the largest that may be needed, and each looks up the rows and the expert of
its tile. Dropped rows are those of one more expert, whose results are zeros; the tiles after it
have no rows.

Shapes: R rows in the order of their experts, E experts, T tiles.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
import triton.testing
from torch import Tensor

from switchlm.kernels.gpu import allows_tf32

# Without a GPU, Triton's interpreter runs the kernels program by program: small tiles, no tuning.
INTERPRETED: bool = triton.knobs.runtime.interpret
_UPCAST = tl.constexpr(INTERPRETED)
LARGEST_TILE, SMALLEST_TILE = 128, 16  # rows; a tensor core multiplies no fewer
GROUPED_TILES = tl.constexpr(8)


def configs(
    names: tuple[str, ...], tried: list[tuple[int, ...]], interpreted: tuple[int, ...]
) -> list[triton.Config]:
    """Return what the autotuner tries.

    names: of block sizes.
    tried: for each configuration the block sizes, then warps and stages.
    interpreted: the configuration where kernels are interpreted.
    """
    return [
        triton.Config(dict(zip(names, sizes, strict=True)), num_warps=warps, num_stages=stages)
        for *sizes, warps, stages in ([interpreted] if INTERPRETED else tried)
    ]


def _is_even(known: dict[str, Any]) -> bool:
    """Whether blocks divide the matrix, so that no mask is needed."""
    return all(known[size] % known[f"BLOCK_{size}"] == 0 for size in ("V", "W"))


even = triton.heuristics({"EVEN": _is_even})


def autotune(configs: list[triton.Config], key: list[str]) -> Callable[[Any], Any]:
    """Return the decorator that compiles and times the configurations once for each key.

    Timings stay on disk beside Triton's compiled kernels, for the next process.
    """
    return triton.autotune(
        configs=configs,
        key=key,
        prune_configs_by={"early_config_prune": worth_compiling},
        do_bench=_bench,
        cache_results=True,
    )


def worth_compiling(
    configs: Sequence[triton.Config], arguments: dict[str, Any], **known: Any
) -> list[triton.Config]:
    """Return the configurations that can be the best: no block wider than the matrix needs.

    Compiling takes most of the tuning. Without tensor cores, float32 matmul unrolls into so much
    code that only the last configuration, that of the smallest tiles, is compiled.
    """
    values = {**arguments, **known}
    tensors = [value for value in values.values() if isinstance(value, Tensor)]
    if values["PRECISION"] == "ieee" and all(t.dtype != torch.bfloat16 for t in tensors):
        return [configs[-1]]
    found = list(configs)
    for block, size in (("BLOCK_V", "V"), ("BLOCK_W", "W")):
        widths = [config.kwargs[block] for config in found if block in config.kwargs]
        if widths:
            widest = max(triton.next_power_of_2(values[size]), min(widths))
            found = [config for config in found if config.kwargs[block] <= widest]
    return found


def _bench(call: Callable[[], None], quantiles: Sequence[float]) -> Any:
    return triton.testing.do_bench(call, warmup=10, rep=40, quantiles=quantiles)


@dataclass(frozen=True)
class Tiles:
    """The rows of every tile: [first, end) of an expert; E means dropped, E + 1 no rows.

    expert_T: int32.
    first_T, end_T: int64.
    end_E: int64, where each expert's rows end.
    rows: the size of a full tile.
    """

    expert_T: Tensor
    first_T: Tensor
    end_T: Tensor
    end_E: Tensor
    rows: int

    @property
    def number(self) -> int:
        return self.expert_T.shape[0]

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """The arguments of kernels: expert_T, first_T, end_T and the number of tiles."""
        return self.expert_T, self.first_T, self.end_T, self.number


def lay_out(counts_E: Tensor, num_rows: int) -> Tiles:
    """Cut the rows of every expert into tiles, no larger than the mean load of an expert."""
    num_experts = counts_E.shape[0]
    rows = LARGEST_TILE
    while rows > SMALLEST_TILE and (INTERPRETED or num_rows < rows * num_experts):
        rows //= 2
    most = num_rows // rows + num_experts + 1
    expert_T = counts_E.new_empty(most, dtype=torch.int32)
    first_T, end_T = counts_E.new_empty(2, most).unbind()
    end_E = torch.empty_like(counts_E)
    with torch.cuda.device_of(counts_E):
        _lay_out[(num_experts + 1,)](
            counts_E,
            expert_T,
            first_T,
            end_T,
            end_E,
            num_rows,
            most,
            num_experts,
            EXPERTS=triton.next_power_of_2(num_experts),
            ROWS=rows,
        )
    return Tiles(expert_T, first_T, end_T, end_E, rows)


@triton.jit
def _lay_out(
    counts_E, expert_T, first_T, end_T, end_E, num_rows, most, E,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program per expert writes its tiles; the last writes the dropped and the empty ones."""
    expert = tl.program_id(0)
    lane = tl.arange(0, EXPERTS)
    count_E = tl.load(counts_E + lane, mask=lane < E, other=0)
    before_E = tl.where(lane < expert, count_E, 0)
    first = tl.sum(before_E)
    end = first + tl.sum(tl.where(lane == expert, count_E, 0))
    end = tl.where(expert == E, num_rows, end)
    tl.store(end_E + expert, end, mask=expert < E)
    first_tile = tl.sum((before_E + ROWS - 1) // ROWS)
    end_tile = first_tile + (end - first + ROWS - 1) // ROWS
    last = tl.where(expert == E, most, end_tile)
    for start in range(first_tile, last, EXPERTS):
        tile = start + lane
        here = tile < last
        row = first + (tile - first_tile) * ROWS
        tl.store(expert_T + tile, tl.where(tile < end_tile, expert, E + 1), mask=here)
        tl.store(first_T + tile, row, mask=here)
        tl.store(end_T + tile, end, mask=here)


@triton.jit
def tile_and_column(program, num_tiles, num_columns):
    """Return the tile and column of a program; neighbouring programs share rows and weights."""
    group_size = GROUPED_TILES * num_columns
    first = program // group_size * GROUPED_TILES
    size = tl.minimum(num_tiles - first, GROUPED_TILES)
    within = program % group_size
    return first + within % size, within // size


@triton.jit
def rows_of_tile(first, end, ROWS: tl.constexpr):
    """Return the index of each row from the tile's first, int32, and which rows exist.

    Past the last row, its index is repeated: loads there are valid, and nothing is stored. int32
    takes half the registers of int64.
    """
    number = (end - first).to(tl.int32)
    row = tl.arange(0, ROWS)
    return tl.minimum(row, number - 1), row < number


@triton.jit
def load(pointers, mask, EVEN: tl.constexpr):
    """Load, without a mask where all sizes are multiples of the blocks."""
    if EVEN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def add_matmul(a, b, sum, PRECISION: tl.constexpr):
    """Return sum + a @ b, in float32.

    The interpreter multiplies bfloat16 as if its bits were integers, so there it is upcast first,
    which is exact.
    """
    if _UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sum)
    else:
        return tl.dot(a, b, sum, input_precision=PRECISION)


@triton.jit
def activate(inner, ACTIVATION: tl.constexpr):
    """Return the activated values, float32: ReLU, or GELU in the tanh form."""
    if ACTIVATION == "relu":
        return tl.maximum(inner, 0.0)
    else:
        return inner * _gate(inner)


@triton.jit
def activate_backward(inner, ACTIVATION: tl.constexpr):
    """Return the derivative of the activation, float32; of ReLU also from its output."""
    if ACTIVATION == "relu":
        return tl.where(inner > 0, 1.0, 0.0)
    else:
        gate = _gate(inner)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * inner * inner)
        return gate + inner * gate * (1.0 - gate) * slope


@triton.jit
def _gate(x):
    """(1 + tanh(u)) / 2 = sigmoid(2 u), with u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


def precision(like: Tensor) -> str:
    """Return the precision of float32 matmul: that of PyTorch's setting."""
    return "tf32" if like.is_cuda and allows_tf32() else "ieee"
