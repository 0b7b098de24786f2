"""Compile the Triton kernels for a GPU that need not be there; print one JSON line a kernel.

    python compile_triton.py ARCHITECTURE (90 for Hopper) [all]

With `all` in every variant and configuration that the autotuner tries, otherwise each once. Run by
tests/kernels/gpu/test_compile.py, in a process of its own: here the interpreter is off.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from switchlm.kernels.gpu import backward, tiles
from switchlm.kernels.gpu import forward as kernels

FLOATS = ("weight_A", "scale_A", "dweight_CA")
LONGS = ("assignment_R", "first_T", "end_T", "end_E", "counts_E")
ODD = ("K", "num_tiles", "num_rows", "most")  # may be no multiples of 16


def jitted(kernel: Any) -> Any:
    """Return the function under the autotuner and the heuristics."""
    while not isinstance(kernel, triton.runtime.JITFunction):
        kernel = kernel.fn
    return kernel


def type_of(name: str, dtype: str) -> str:
    """Return the type of a kernel's parameter, by its name."""
    if name in FLOATS:
        return "*fp32"
    if name in LONGS:
        return "*i64"
    if name == "expert_T":
        return "*i32"
    shape = name.rpartition("_")[2]
    is_tensor = name in ("left", "right") or ("_" in name and shape.isupper())
    return f"*{dtype}" if is_tensor and not name.startswith("stride") else "i32"


def build(kernel: Any, config: triton.Config, dtype: str, known: dict[str, Any], target: GPUTarget):
    """Compile one kernel for one configuration, down to the machine's code."""
    function = jitted(kernel)
    known = {**config.kwargs, **known}
    signature = {
        name: "constexpr" if name in known else type_of(name, dtype) for name in function.arg_names
    }
    places = {name: (place,) for place, name in enumerate(function.arg_names)}
    aligned = {
        places[name]: [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind != "constexpr" and name not in ODD
    }
    constants = {places[name]: value for name, value in known.items() if name in places}
    source = ASTSource(function, signature, constants, aligned)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=target, options=options)


def cases(dtype: str) -> Iterator[tuple[Any, list[triton.Config], dict[str, Any]]]:
    """Yield each kernel, its configurations, and its other constants."""
    common = {"PRECISION": "tf32" if dtype == "fp32" else "ieee"}
    tiled = {**common, "ROWS": 128, "EVEN": True}
    yield tiles._lay_out, [triton.Config({})], {"EXPERTS": 64, "ROWS": 128}
    absent = dict.fromkeys(("linear_EVW", "inner_RW", "linear_RW"))
    plain = {**tiled, "ACTIVATION": "relu", "GATED": False}
    gated = {**tiled, "ACTIVATION": "gelu", "GATED": True}
    forward = kernels.MATMUL_CONFIGS
    yield kernels._hidden, forward, {**plain, **absent, "KEEP": False}
    yield kernels._hidden, forward[1:], {**gated, "KEEP": True}
    absent = dict.fromkeys(("more_RV", "more_EVW"))
    down = {**tiled, **absent, "SCALED": True, "TWO": False, "stride_W": 1}
    back = {**tiled, "SCALED": False, "TWO": True, "scale_A": None, "stride_V": 1}
    yield kernels._scatter, forward, down
    yield kernels._scatter, forward[1:], back
    configs = backward.HIDDEN_CONFIGS
    columns = {"BLOCK_W": backward.COLUMNS}
    absent = dict.fromkeys(("linear_RW", "middle_RW", "dlinear_RW"))
    yield backward._hidden_gradients, configs, {**plain, **columns, **absent, "KEPT": False}
    yield backward._hidden_gradients, configs, {**gated, **columns, "KEPT": True}
    configs = backward.WEIGHT_CONFIGS
    yield backward._weight_gradient, configs, {**common, "SCALED": True}
    yield backward._weight_gradient, configs, {**common, "SCALED": False, "scale_A": None}


def main() -> None:
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    every = sys.argv[2:] == ["all"]
    seen = set()
    for dtype in ("bf16", "fp32") if every else ("bf16",):
        for kernel, configs, known in cases(dtype):
            if not every and kernel in seen:
                continue
            seen.add(kernel)
            for config in configs if every else configs[:1]:
                built = build(kernel, config, dtype, known, target)
                line = {
                    "kernel": jitted(kernel).__name__,
                    "dtype": dtype,
                    "configuration": str(config),
                    "shared_bytes": built.metadata.shared,
                    "tensor_cores": built.asm["ptx"].count("mma"),
                    "bytes_of_code": len(built.asm["cubin"]),
                }
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
