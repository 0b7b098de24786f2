"""A Switch layer compared with the dense FFN of equal FLOPs, other implementations, and the limit.

    python benchmarks/layer.py [--tokens 4096 16384] [--experts 8 64 256] [--dtypes float32]
                               [--repeats 7] [--threads 2] [--no-peers] [--growth]

Forward and backward of the layer (router, sort, gather, expert matmuls, combine), with gradients of
the input and all weights. The load is uniform, or skewed as 1 / rank (Zipf), by constructing the
tokens; or random, with other tokens at every step, as in training. The limit is the dense FFN's
time plus that of moving the experts' bytes three times (read forwards, read backwards, gradients
written) at the bandwidth of a copy. All cases run in one process, which keeps freed memory as
training does; peak memory is that of a process with the one layer. --growth: instead, the cost of 8
to 512 experts.
"""

import argparse
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import harness
from peers import PEERS
from switchlm.kernels.cpu.memory import keep_freed_memory
from switchlm.model.config import RouterConfig
from switchlm.model.layers import FeedForward
from switchlm.model.switch import SwitchFeedForward, SwitchLayer

D_MODEL, D_FF = 256, 1024
GROWTH = (8, 16, 32, 64, 128, 256, 512)
DENSE, OURS, FORWARD, ZIPF = "dense FFN", "switch layer", ", forward alone", ", Zipf loads"
NEW_LOADS, NUM_NEW = ", new loads every step", 12
Step = Callable[[], None]


def router_config(capacity: float | None) -> RouterConfig:
    return RouterConfig(
        capacity_factor=capacity, evaluation_capacity_factor=capacity, exploration="argmax"
    )


class Ours(nn.Module):
    """Our layer without its routing record, like the others."""

    def __init__(self, num_experts: int, capacity: float | None = None) -> None:
        super().__init__()
        router = router_config(capacity)
        self.layer: SwitchLayer = SwitchFeedForward(D_MODEL, D_FF, num_experts, router=router)

    def forward(self, x_ND: Tensor) -> Tensor:
        y_ND, _ = self.layer(x_ND)
        return y_ND


class NoExperts(nn.Module):
    """Identity in place of experts: only the router and the two permutations remain."""

    num_experts = 0

    def forward(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        return x_RD


@dataclass(frozen=True)
class Tokens:
    """Tokens of known experts: each is near the direction_ED of its expert."""

    x_ND: Tensor
    dy_ND: Tensor
    direction_ED: Tensor

    @staticmethod
    def make(number: int, num_experts: int, dtype: torch.dtype, skewed: bool = False) -> "Tokens":
        direction_ED = nn.functional.normalize(torch.randn(num_experts, D_MODEL), dim=1)
        share_E = 1 / torch.arange(1, num_experts + 1) if skewed else torch.ones(num_experts)
        edge_E = (share_E.cumsum(0) / share_E.sum() * number).round().long()
        expert_N = torch.searchsorted(edge_E, torch.arange(number), right=True)
        return Tokens.of(expert_N[torch.randperm(number)], direction_ED, dtype)

    @staticmethod
    def of(expert_N: Tensor, direction_ED: Tensor, dtype: torch.dtype) -> "Tokens":
        """Return tokens that are routed to these experts."""
        x_ND = torch.randn(len(expert_N), D_MODEL) / 4 + 8 * direction_ED[expert_N]
        return Tokens(
            x_ND.to(dtype).requires_grad_(), torch.randn_like(x_ND).to(dtype), direction_ED
        )

    def drawn(self) -> "Tokens":
        """Return as many tokens, each routed to a random expert."""
        expert_N = torch.randint(len(self.direction_ED), (len(self.x_ND),))
        return Tokens.of(expert_N, self.direction_ED, self.x_ND.dtype)

    def steer(self, layer: nn.Module) -> nn.Module:
        """Set the directions as weights of the layer's router."""
        for name, parameter in layer.named_parameters():
            if "router" in name:
                parameter.data.copy_(self.direction_ED)
        return layer


def step(layer: nn.Module, tokens: Tokens) -> Step:
    """Return one forward and backward pass."""

    def run() -> None:
        layer.zero_grad(set_to_none=True)
        tokens.x_ND.grad = None
        layer(tokens.x_ND).backward(tokens.dy_ND)

    return run


def in_turn(layer: nn.Module, batches: list[Tokens]) -> Step:
    """Return one forward and backward pass, of the next batch every time."""
    steps = cycle([step(layer, tokens) for tokens in batches])
    return lambda: next(steps)()


def forward(layer: nn.Module, tokens: Tokens) -> Step:
    """Return a forward pass without gradients."""

    def run() -> None:
        with torch.no_grad():
            layer(tokens.x_ND)

    return run


def layers(num_experts: int, peers: bool) -> dict[str, Callable[[], nn.Module]]:
    """Return a constructor of each layer that is compared."""
    made: dict[str, Callable[[], nn.Module]] = {DENSE: partial(FeedForward, D_MODEL, D_FF)}
    for capacity in (None, 1.25, 1.0):
        name = f"{OURS}, {'dropless' if capacity is None else f'capacity {capacity}'}"
        made[name] = partial(Ours, num_experts, capacity)
    if peers:
        made |= {name: partial(peer, D_MODEL, D_FF, num_experts) for name, peer in PEERS.items()}
    return made


def one_shape(number: int, num_experts: int, dtype: torch.dtype, options: Any) -> dict[str, Any]:
    """Measure all layers of one shape."""
    torch.manual_seed(options.seed)
    tokens = Tokens.make(number, num_experts, dtype)
    makers = layers(num_experts, options.peers)
    made = {name: tokens.steer(make().to(dtype)) for name, make in makers.items()}
    cases = {name: step(layer, tokens) for name, layer in made.items()}
    skewed = Tokens.make(number, num_experts, dtype, skewed=True)
    ours = f"{OURS}, dropless"
    cases[ours + ZIPF] = step(skewed.steer(Ours(num_experts).to(dtype)), skewed)
    drawn = [tokens.drawn() for _ in range(NUM_NEW)]
    cases[ours + NEW_LOADS] = in_turn(tokens.steer(Ours(num_experts).to(dtype)), drawn)
    cases |= {name + FORWARD: forward(made[name], tokens) for name in (DENSE, ours)}
    seconds = harness.measure(cases, options.repeats, clock=options.clock)
    memory = {}
    if options.memory:
        memory = {
            name: peak_memory(make, number, num_experts, dtype) for name, make in makers.items()
        }
    return _record(number, num_experts, dtype, seconds) | {"peak_bytes": memory}


def _record(
    number: int, num_experts: int, dtype: torch.dtype, seconds: dict[str, list[float]]
) -> dict[str, Any]:
    bandwidth = harness.copy_bandwidth()
    moved = 2 * num_experts * D_MODEL * D_FF * dtype.itemsize / bandwidth
    limit, limit_forward = min(seconds[DENSE]) + 3 * moved, min(seconds[DENSE + FORWARD]) + moved
    of_limit = {
        name: min(times) / (limit_forward if name.endswith(FORWARD) else limit)
        for name, times in seconds.items()
    }
    return {
        "tokens": number,
        "d_model": D_MODEL,
        "d_ff": D_FF,
        "experts": num_experts,
        "dtype": str(dtype).removeprefix("torch."),
        "copy_bandwidth_bytes_a_second": bandwidth,
        "dense_flops_a_second": 12 * number * D_MODEL * D_FF / min(seconds[DENSE]),
        "limit_ratio": limit / min(seconds[DENSE]),
        "limit_ratio_forward": limit_forward / min(seconds[DENSE + FORWARD]),
        "seconds": seconds,
        "summary": {name: harness.summary(times) for name, times in seconds.items()},
        "ratio_to_dense": {
            name: harness.ratio(times, seconds[DENSE + FORWARD * name.endswith(FORWARD)])
            for name, times in seconds.items()
        },
        "ratio_to_limit": of_limit,
    }


def peak_memory(
    make: Callable[[], nn.Module], number: int, num_experts: int, dtype: torch.dtype
) -> int:
    """Return the peak memory of three steps in a separate process, in bytes."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    arguments = (there, make, number, num_experts, dtype)
    process = context.Process(target=_measure_memory, args=arguments)
    process.start()
    try:
        return int(here.recv())
    finally:
        process.join()


def _measure_memory(
    there: Any,
    make: Callable[[], nn.Module],
    number: int,
    num_experts: int,
    dtype: torch.dtype,
) -> None:
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # the libraries' own memory
    before = _status("VmRSS")
    tokens = Tokens.make(number, num_experts, dtype)
    run = step(tokens.steer(make().to(dtype)), tokens)
    for _ in range(3):
        run()
    there.send(_status("VmHWM") - before)


def _status(field: str) -> int:
    """Return a memory counter of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise SystemExit(f"/proc/self/status has no {field}: peak memory needs Linux; try --no-memory.")


def as_table(found: dict[str, Any]) -> str:
    """Return one shape's results as Markdown."""
    rows = []
    for name, times in found["summary"].items():
        ratio, peak = found["ratio_to_dense"][name], found["peak_bytes"].get(name)
        rows.append(
            [
                name,
                f"{times['median'] * 1e3:.1f}",
                f"{times['minimum'] * 1e3:.1f}",
                f"{ratio['median']:.2f} ({ratio['lower']:.2f} to {ratio['upper']:.2f})",
                f"{ratio['of_minima']:.2f}",
                f"{found['ratio_to_limit'][name]:.2f}",
                "" if peak is None else f"{peak / 2**20:,.0f}",
            ]
        )
    rows.append(["limit", "", "", "", f"{found['limit_ratio']:.2f}", "1.00", ""])
    rows.append(
        ["limit, forward alone", "", "", "", f"{found['limit_ratio_forward']:.2f}", "1.00", ""]
    )
    title = "## {dtype}, N {tokens}, D {d_model}, F {d_ff}, E {experts}".format(**found)
    headers = [
        "forward + backward", "median ms", "minimum ms", "to dense (quartiles)", "of minima",
        "to the limit", "peak MiB",
    ]  # fmt: skip
    speed = (
        f"Dense: {found['dense_flops_a_second'] / 1e9:.0f} GFLOP/s at best. "
        f"Copy: {found['copy_bandwidth_bytes_a_second'] / 1e9:.1f} GB/s."
    )
    return f"{title}\n\n{harness.table(headers, rows)}\n\n{speed}"


def growth(number: int, dtype: torch.dtype, options: Any) -> tuple[list[dict[str, Any]], str]:
    """Measure how the cost grows with the experts at equal FLOPs per token."""
    found, rows = [], []
    for num_experts in GROWTH:
        torch.manual_seed(options.seed)
        tokens = Tokens.make(number, num_experts, dtype)
        dense, ours = FeedForward(D_MODEL, D_FF).to(dtype), Ours(num_experts).to(dtype)
        bare = Ours(num_experts)
        bare.layer.experts = NoExperts()
        cases = {
            DENSE: step(dense, tokens),
            DENSE + FORWARD: forward(dense, tokens),
            OURS: step(tokens.steer(ours), tokens),
            "router and permutations": step(tokens.steer(bare.to(dtype)), tokens),
        }
        seconds = harness.measure(cases, options.repeats, clock=options.clock)
        record = _record(number, num_experts, dtype, seconds)
        record["routing_share"] = min(seconds["router and permutations"]) / min(seconds[OURS])
        parameters = sum(parameter.numel() for parameter in ours.parameters())
        del dense, ours, bare, cases
        peak = peak_memory(partial(Ours, num_experts), number, num_experts, dtype)
        record |= {"parameters": parameters, "peak_bytes": peak}
        found.append(record)
        ratio = record["ratio_to_dense"][OURS]
        rows.append(
            [
                f"{num_experts}",
                f"{parameters / 1e6:.1f}",
                f"{ratio['median']:.2f} ({ratio['lower']:.2f} to {ratio['upper']:.2f})",
                f"{record['limit_ratio']:.2f}",
                f"{record['ratio_to_limit'][OURS]:.2f}",
                f"{record['routing_share']:.1%}",
                f"{peak / parameters:.1f}",
            ]
        )
    headers = [
        "experts", "million parameters", "to dense (quartiles)", "the limit", "to the limit",
        "router and permutations, of the layer", "peak bytes per parameter",
    ]  # fmt: skip
    title = f"## {str(dtype).removeprefix('torch.')}, N {number}, D {D_MODEL}, F {D_FF}, dropless"
    return found, f"{title}\n\n{harness.table(headers, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=harness.CLOCKS, default="wall")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--name", help="of the files in results/; layer, or layer_growth")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    tables, found = [], []
    for name in options.dtypes:
        dtype = getattr(torch, name)
        for number in options.tokens:
            if options.growth:
                records, text = growth(number, dtype, options)
                found += records
                tables.append(text)
                continue
            for num_experts in options.experts:
                found.append(one_shape(number, num_experts, dtype, options))
                tables.append(as_table(found[-1]))
    record = {
        "environment": harness.environment(options.seed),
        "repeats": options.repeats,
        "clock": options.clock,
        "shapes": found,
    }
    name = options.name or ("layer_growth" if options.growth else "layer")
    title = "The Switch layer against the dense FFN of equal FLOPs"
    harness.write(name, title, record, tables)


if __name__ == "__main__":
    main()
