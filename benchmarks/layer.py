"""How long a Switch layer takes against the dense FFN of equal FLOPs, and against its peers.

    python benchmarks/layer.py [--shapes paper laptop] [--repeats 7] [--threads 2] [--no-peers]

Forward and backward of the whole layer: router, sort, gather, expert products, combine; gradients
to the input and to all weights. The limit is the dense FFN's time plus that of moving the experts'
bytes three times (read forwards, read backwards, gradients written) at the bandwidth of a copy.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import harness
from peers import PEERS
from switchlm.model.config import RouterConfig
from switchlm.model.feedforward import FeedForward
from switchlm.model.switch import SwitchFeedForward

# name: tokens, d_model, d_ff, experts
SHAPES = {
    "paper": [(16384, 256, 1024, 8), (16384, 256, 1024, 64), (16384, 256, 1024, 256)],
    "laptop": [(12288, 32, 128, 16), (2560, 32, 128, 16)],
}
DROPLESS = RouterConfig(capacity_factor=None, evaluation_capacity_factor=None, exploration="argmax")


class _Ours(nn.Module):
    def __init__(self, d_model: int, d_ff: int, num_experts: int, router: RouterConfig) -> None:
        super().__init__()
        self.layer = SwitchFeedForward(d_model, d_ff, num_experts, router=router)

    def forward(self, x_ND: Tensor) -> Tensor:
        y_ND, _ = self.layer(x_ND)
        return y_ND


def step(layer: nn.Module, x_ND: Tensor, dy_ND: Tensor) -> Callable[[], None]:
    """Return one forward and backward pass."""

    def run() -> None:
        layer.zero_grad(set_to_none=True)
        x_ND.grad = None
        layer(x_ND).backward(dy_ND)

    return run


def one_shape(
    tokens: int, d_model: int, d_ff: int, experts: int, repeats: int, clock: str, peers: bool
) -> dict[str, Any]:
    """Measure all layers of one shape."""
    x_ND = torch.randn(tokens, d_model, requires_grad=True)
    dy_ND = torch.randn(tokens, d_model)
    dense = FeedForward(d_model, d_ff)
    ours = {
        "switch layer, dropless": _Ours(d_model, d_ff, experts, DROPLESS),
        "switch layer, capacity 1.25 and jitter (paper)": _Ours(
            d_model, d_ff, experts, RouterConfig()
        ),
    }
    layers: dict[str, nn.Module] = {"dense FFN": dense, **ours}
    if peers:
        layers |= {name: peer(d_model, d_ff, experts) for name, peer in PEERS.items()}
    seconds = harness.measure(
        {name: step(layer, x_ND, dy_ND) for name, layer in layers.items()}, repeats, clock=clock
    )
    bandwidth = harness.copy_bandwidth()
    expert_bytes = 2 * experts * d_model * d_ff * 4
    dense_minimum = min(seconds["dense FFN"])
    return {
        "tokens": tokens,
        "d_model": d_model,
        "d_ff": d_ff,
        "experts": experts,
        "copy_bandwidth_bytes_a_second": bandwidth,
        "dense_flops_a_second": 12 * tokens * d_model * d_ff / dense_minimum,
        "limit_ratio": 1 + 3 * expert_bytes / bandwidth / dense_minimum,
        "seconds": seconds,
        "summary": {name: harness.summary(times) for name, times in seconds.items()},
        "ratio_to_dense": {
            name: harness.ratio(times, seconds["dense FFN"]) for name, times in seconds.items()
        },
    }


def as_table(found: dict[str, Any]) -> str:
    """Return one shape's results as Markdown."""
    rows = []
    for name, times in found["summary"].items():
        ratio = found["ratio_to_dense"][name]
        rows.append(
            [
                name,
                f"{times['median'] * 1e3:.1f}",
                f"{times['minimum'] * 1e3:.1f}",
                f"{ratio['median']:.2f} ({ratio['lower']:.2f} to {ratio['upper']:.2f})",
                f"{ratio['of_minima']:.2f}",
            ]
        )
    rows.append(["limit", "", "", "", f"{found['limit_ratio']:.2f}"])
    title = "## N {tokens}, D {d_model}, F {d_ff}, E {experts}".format(**found)
    headers = ["forward + backward", "median ms", "minimum ms", "to dense (quartiles)", "of minima"]
    speed = (
        f"Dense: {found['dense_flops_a_second'] / 1e9:.0f} GFLOP/s at best. "
        f"Copy: {found['copy_bandwidth_bytes_a_second'] / 1e9:.1f} GB/s."
    )
    return f"{title}\n\n{harness.table(headers, rows)}\n\n{speed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=harness.CLOCKS, default="wall")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--name", default="layer", help="of the files in results/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    found = [
        one_shape(*shape, options.repeats, options.clock, peers=not options.no_peers)
        for group in options.shapes
        for shape in SHAPES[group]
    ]
    record = {
        "environment": harness.environment(options.seed),
        "repeats": options.repeats,
        "clock": options.clock,
        "shapes": found,
    }
    harness.write(
        options.name,
        "The Switch layer against the dense FFN of equal FLOPs, float32",
        record,
        [as_table(shape) for shape in found],
    )


if __name__ == "__main__":
    main()
