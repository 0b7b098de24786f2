"""The forward pass of a Switch layer for 1 to 64 tokens, as in decoding.

    python benchmarks/few_tokens.py [--tokens 1 4 16 64] [--experts 64] [--repeats 32]

Inference mode, dropless, without router losses. The limit is the time to read the weights of the
routed experts once: their bytes over the read bandwidth of `torch.sum` over a large tensor on as
many threads. Every repeat has other tokens, and so other experts, whose weights are in no cache:
all experts together are much larger.
"""

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch

import harness
from switchlm.model.config import RouterConfig
from switchlm.model.switch import SwitchFeedForward

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DROPLESS = RouterConfig(capacity_factor=None, evaluation_capacity_factor=None, exploration="argmax")
INPUTS = 32  # different ones, taken in turn


def read_bandwidth(megabytes: int = 512, repeats: int = 5) -> float:
    """Return bytes per second that a sum reads from main memory, the best of `repeats`."""
    source = torch.ones(megabytes << 18)
    best = min(harness.measure({"read": source.sum}, repeats)["read"])
    return source.numel() * source.element_size() / best


def routed_experts(layer: SwitchFeedForward, x_ND: torch.Tensor) -> int:
    return int((layer(x_ND)[1].load_E > 0).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--d-ff", type=int, default=3072)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="few_tokens", help="of the files in results/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    read, copied = read_bandwidth(), harness.copy_bandwidth()
    found: list[dict[str, Any]] = []
    with torch.inference_mode():
        for name, dtype in DTYPES.items():
            layer = SwitchFeedForward(
                options.d_model, options.d_ff, options.experts, router=DROPLESS
            )
            layer = layer.eval().to(dtype)
            layer.router.measures = False
            expert_bytes = 2 * options.d_model * options.d_ff * dtype.itemsize
            for tokens in options.tokens:
                inputs = [torch.randn(tokens, options.d_model, dtype=dtype) for _ in range(INPUTS)]
                routed = [routed_experts(layer, x_ND) for x_ND in inputs]
                seconds = harness.measure({"layer": _turns(layer, inputs)}, options.repeats)[
                    "layer"
                ]
                experts = sum(routed) / len(routed)
                limit = experts * expert_bytes / read
                found.append(
                    {
                        "dtype": name,
                        "tokens": tokens,
                        "routed_experts": experts,
                        "limit_seconds": limit,
                        "seconds": seconds,
                        "summary": harness.summary(seconds),
                    }
                )
            del layer
    record = {
        "environment": harness.environment(options.seed),
        "repeats": options.repeats,
        "clock": "wall",
        "d_model": options.d_model,
        "d_ff": options.d_ff,
        "experts": options.experts,
        "read_bandwidth_bytes_a_second": read,
        "copy_bandwidth_bytes_a_second": copied,
        "cases": found,
    }
    rows = []
    for case in found:
        times, limit = case["summary"], case["limit_seconds"]
        rows.append(
            [
                f"{case['dtype']}, {case['tokens']} tokens",
                f"{case['routed_experts']:.1f}",
                f"{times['median'] * 1e3:.2f} ({times['lower'] * 1e3:.2f} "
                f"to {times['upper'] * 1e3:.2f})",
                f"{limit * 1e3:.2f}",
                f"{limit / times['median']:.0%}",
            ]
        )
    headers = ["forward", "experts routed", "median ms (quartiles)", "limit ms", "of the bandwidth"]
    text = (
        f"\n\nE {options.experts}, D {options.d_model}, F {options.d_ff}. Read (a sum): "
        f"{read / 1e9:.1f} GB/s; copy, read and written: {copied / 1e9:.1f} GB/s."
    )
    harness.write(
        options.name,
        "The Switch layer for few tokens against reading the routed experts once",
        record,
        [harness.table(headers, rows) + text],
    )


def _turns(layer: SwitchFeedForward, inputs: list[torch.Tensor]) -> Callable[[], object]:
    """Return a forward pass of the next input."""
    turn = itertools.cycle(inputs)
    return lambda: layer(next(turn))


if __name__ == "__main__":
    main()
