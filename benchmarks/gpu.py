"""A Switch layer and a Switch model on a GPU, compared with dense twins and other libraries.

    python benchmarks/gpu.py parity | layer | step | profile | decode  (all, and more: gpu.sh)

parity: the fused kernels against separate matmuls, output and gradients. layer: forward and
backward in bfloat16, D 1024, F 4096, N 65,536, against the dense FFN, other libraries, and the peak
rates of the GPU. step: a training step of switch-base-64 against its dense twin. profile: the time
of such a step by kernel, and the GPU's idle time. decode: greedy decoding of both, batch 1, 16 and
64. Each writes results/gpu_NAME.json and .md. Without a GPU the metrics are named, but nothing is
written.
"""

import argparse
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType

import harness
from gpu_peers import PEERS
from switchlm.data.batch import Batch
from switchlm.generation.decode import generate
from switchlm.kernels import autotune
from switchlm.kernels.permute import combine_rows, gather_rows, sort_by_expert
from switchlm.kernels.select import SWITCHES, explain_switch
from switchlm.model import count
from switchlm.model.config import ModelConfig, RouterConfig
from switchlm.model.layers import FeedForward
from switchlm.model.presets import preset
from switchlm.model.switch import SwitchFeedForward
from switchlm.model.transformer import SwitchTransformer
from switchlm.training.config import TrainingConfig
from switchlm.training.optimizer import build_optimizer
from switchlm.training.step import prepare_for_training, training_step

TOKENS, D_MODEL, D_FF, EXPERTS = 65536, 1024, 4096, (64, 256)
DROPLESS = RouterConfig(capacity_factor=None, evaluation_capacity_factor=None, exploration="argmax")
ROWS, INPUTS, TARGETS = 64, 512, 114  # of a training step
BATCHES, NEW_TOKENS = (1, 16, 64), 32  # of decoding
FIGURES = (
    "parity of the fused kernels, float32 and bfloat16",
    f"layer, N {TOKENS}, D {D_MODEL}, F {D_FF}, E 64 and 256: time against the dense FFN and peers",
    "fused kernels against separate products; share of router, sort and permutation",
    "largest rate of products and copies; the layer's part of it",
    "training step of switch-base-64 against dense-base: time, part of the rate, memory",
    "host synchronisation in a training step",
    "where a training step's time goes: kernels, launches, and the host",
    "greedy decoding of switch-base-64 against dense-base, batch 1, 16 and 64",
    "switchlm compare: 64 experts against the dense twin on python:site-packages",
    "tests marked gpu",
)
Case = Callable[[], object]


def timed(cases: dict[str, Case], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of every repeat, waiting for the device each time."""

    def waiting(run: Case) -> Case:
        return lambda: (run(), torch.cuda.synchronize())

    return harness.measure({name: waiting(run) for name, run in cases.items()}, repeats)


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(dtype).requires_grad_()


def limits(repeats: int) -> dict[str, float]:
    """Return the best rates of bfloat16 matmuls and of copies, read and written."""
    a, b = drawn(8192, 8192).detach(), drawn(8192, 8192).detach()
    source = torch.ones(1 << 28, device="cuda")
    target = torch.empty_like(source)
    cases: dict[str, Case] = {"mm": lambda: a @ b, "copy": lambda: target.copy_(source)}
    seconds = timed(cases, repeats)
    return {
        "flops_a_second": 2 * 8192**3 / min(seconds["mm"]),
        "bytes_a_second": 2 * source.nbytes / min(seconds["copy"]),
    }


def forward_backward(layer: nn.Module, x_ND: Tensor, dy_ND: Tensor) -> Case:
    """Return a forward and backward pass, with gradients of the input and all weights."""
    inputs = [x_ND, *layer.parameters()]

    def run() -> None:
        y_ND = layer(x_ND)
        y_ND = y_ND[0] if isinstance(y_ND, tuple) else y_ND
        torch.autograd.grad(y_ND, inputs, dy_ND, allow_unused=True)

    return run


def parts(layer: SwitchFeedForward, x_ND: Tensor, dy_ND: Tensor) -> dict[str, Case]:
    """Return the parts of the layer as separate cases, forward and backward."""
    up, down = layer.experts.up, layer.experts.down
    with torch.no_grad():
        routing = layer.router(x_ND, None, TOKENS, x_ND.dtype)
    order = sort_by_expert(routing.expert_A, routing.kept_A, up.shape[0])
    weight_A = routing.gate_A.clone().requires_grad_()

    def route() -> None:
        found = layer.router(x_ND, None, TOKENS, x_ND.dtype)
        sort_by_expert(found.expert_A, found.kept_A, up.shape[0])
        wanted = [x_ND, layer.router.weight]
        torch.autograd.grad(found.gate_A, wanted, torch.ones_like(found.gate_A))

    def permute() -> None:
        y_ND = combine_rows(gather_rows(x_ND, order, 1), weight_A, order, 1)
        torch.autograd.grad(y_ND, [x_ND, weight_A], dy_ND)

    def multiply(way: str) -> Case:
        def run() -> None:
            y_ND = SWITCHES[way](x_ND, weight_A, order, up, down, "relu", None)
            torch.autograd.grad(y_ND, [x_ND, weight_A, up, down], dy_ND)

        return run

    found: dict[str, Case] = {"router and sort": route, "permutation alone": permute}
    ways = [way for way in SWITCHES if way != "triton" or find_spec("triton")]
    return found | {f"experts, {way}": multiply(way) for way in ways}


def measure_layer(experts: int, repeats: int, bounds: dict[str, float]) -> tuple[dict, str]:
    """Measure one number of experts; return the record and a table."""
    x_ND, dy_ND = drawn(TOKENS, D_MODEL), drawn(TOKENS, D_MODEL).detach()
    shape = (D_MODEL, D_FF, experts)
    ours = SwitchFeedForward(*shape, router=DROPLESS).to("cuda", torch.bfloat16)
    paper = SwitchFeedForward(*shape).to("cuda", torch.bfloat16)
    layers: dict[str, nn.Module] = {
        "dense FFN": FeedForward(D_MODEL, D_FF).to("cuda", torch.bfloat16),
        "switch layer, dropless": ours,
        "switch layer, capacity 1.25 and jitter (paper)": paper,
    }
    missing = {}
    for name, peer in PEERS.items():
        try:
            layers[name] = peer(*shape).to("cuda", torch.bfloat16)
        except (ImportError, AssertionError) as error:  # a library or a dependency is missing
            missing[name] = f"not there: {error}"
    cases = {name: forward_backward(layer, x_ND, dy_ND) for name, layer in layers.items()}
    seconds = timed(cases | parts(ours, x_ND, dy_ND), repeats)
    dense, flops = seconds["dense FFN"], 12 * TOKENS * D_MODEL * D_FF
    rows = []
    for name, times in seconds.items():
        ratio = harness.ratio(times, dense)
        rate = flops / min(times) / bounds["flops_a_second"]
        multiplies = "router" not in name and "permutation" not in name
        rows.append(
            [
                name,
                f"{harness.summary(times)['median'] * 1e3:.2f}",
                f"{ratio['median']:.2f} ({ratio['lower']:.2f} to {ratio['upper']:.2f})",
                f"{rate:.0%}" if multiplies else "",
            ]
        )
    rows += [[name, why, "", ""] for name, why in missing.items()]
    choice = explain_switch(x_ND, TOKENS, experts, D_FF)
    record = {"experts": experts, "seconds": seconds, "missing": missing, "choice": vars(choice)}
    headers = ["forward + backward", "median ms", "to dense (quartiles)", "of the best rate"]
    table = harness.table(headers, rows)
    return record, f"## E {experts}\n\n{table}\n\nTaken: {choice.name} ({choice.reason})."


def layer(options: argparse.Namespace) -> tuple[dict, list[str]]:
    """Measure the layer."""
    bounds = limits(options.repeats)
    found = [measure_layer(experts, options.repeats, bounds) for experts in EXPERTS]
    said = (
        f"bfloat16, N {TOKENS}, D {D_MODEL}, F {D_FF}. Best rates here: products "
        f"{bounds['flops_a_second'] / 1e12:.0f} TFLOP/s (8192^3), copies "
        f"{bounds['bytes_a_second'] / 1e9:.0f} GB/s."
    )
    return {"limits": bounds, "layers": [r for r, _ in found]}, [said, *(t for _, t in found)]


def parity(options: argparse.Namespace) -> tuple[dict, list[str]]:
    """Compare the fused kernels with the reference path, in relative norms."""
    errors: dict[str, dict[str, float]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for activation, gated, per_token in (("relu", False, 1), ("gelu", True, 2)):
            experts, tokens, d_model, d_ff = 16, 3001, 256, 512
            x_ND = drawn(tokens, d_model, dtype=dtype)
            expert_A = torch.randint(0, experts - 1, (tokens * per_token,), device="cuda")
            kept_A = torch.rand(expert_A.shape, device="cuda") > 0.1
            weight_A = torch.rand(expert_A.shape, device="cuda").mul(kept_A).requires_grad_()
            order = sort_by_expert(expert_A, kept_A, experts)
            up, gate = (drawn(experts, d_model, d_ff, dtype=dtype, scale=0.06) for _ in range(2))
            down = drawn(experts, d_ff, d_model, dtype=dtype, scale=0.04)
            leaves = [x_ND, weight_A, up, down] + [gate] * gated
            results = []
            for way in ("triton", "separate"):
                y_ND = SWITCHES[way](
                    x_ND, weight_A, order, up, down, activation, gate if gated else None
                )
                results.append((y_ND, *torch.autograd.grad(y_ND, leaves, x_ND.detach())))
            names = ("y", "dx", "dweight", "dup", "ddown", "dgate")
            errors[f"{dtype}, {activation}, gated {gated}, K {per_token}"] = {
                name: float((a - b).detach().float().norm() / b.detach().float().norm())
                for name, a, b in zip(names, *results, strict=False)
            }
    rows = [[n, ", ".join(f"{k} {v:.1e}" for k, v in e.items())] for n, e in errors.items()]
    return {"errors": errors}, [harness.table(["case", "relative error"], rows)]


def make_step(config: ModelConfig) -> tuple[Case, SwitchTransformer]:
    """Return a training step in selective precision with Adafactor, the paper's optimizer."""
    training = TrainingConfig(precision="selective", optimizer="adafactor")
    with torch.device("meta"):
        model = SwitchTransformer(config)
    model.to_empty(device="cuda")
    for parameter in model.parameters():
        nn.init.ones_(parameter) if parameter.dim() == 1 else nn.init.normal_(parameter, std=0.02)
    with torch.device("cuda"):
        inputs_BS = torch.randint(3, config.vocabulary_size, (ROWS, INPUTS))
        targets_BT = torch.randint(3, config.vocabulary_size, (ROWS, TARGETS))
        source_B = torch.zeros(ROWS, dtype=torch.int32)
    prepare_for_training(model, training.precision)
    optimizer = build_optimizer(model, training)
    batch = Batch(
        inputs_BS=inputs_BS,
        targets_BT=targets_BT,
        input_segments_BS=None,
        target_segments_BT=None,
        source_B=source_B,
    )
    return lambda: training_step(model, optimizer, [batch], gradient_clip=1.0), model


def waits(run: Case) -> str:
    """Return the synchronisations of the host in a step, as PyTorch detects them."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "nothing"


def step(options: argparse.Namespace) -> tuple[dict, list[str]]:
    """Measure a training step, one model after the other, since both do not fit."""
    bounds = limits(options.repeats)
    record: dict[str, Any] = {"limits": bounds}
    rows, seconds = [], {}
    for name in ("dense-base", "switch-base-64"):
        config = preset(name)
        run, model = make_step(config)
        torch.cuda.reset_peak_memory_stats()
        seconds[name] = timed({name: run}, options.repeats)[name]
        waited = waits(run)
        tokens = ROWS * (INPUTS + TARGETS)
        flops = 3 * count.flops_per_token(config, INPUTS, TARGETS) * tokens
        rate = flops / min(seconds[name]) / bounds["flops_a_second"]
        memory = torch.cuda.max_memory_allocated()
        record[name] = {"seconds": seconds[name], "rate": rate, "memory": memory, "waits": waited}
        ratio = harness.ratio(seconds[name], seconds["dense-base"])["median"]
        median = harness.summary(seconds[name])["median"]
        rows.append(
            [name, f"{median * 1e3:.0f}", f"{ratio:.2f}", f"{rate:.0%}", f"{memory / 1e9:.0f}",
             waited]
        )  # fmt: skip
        del run, model
        torch.cuda.empty_cache()
    record["choices"] = [vars(choice) for choice in autotune.choices()]
    headers = ["model", "median ms", "to dense", "of the best rate", "GB", "host waits for"]
    said = f"{ROWS} rows of {INPUTS} inputs and {TARGETS} targets, bfloat16, Adafactor."
    return record, [said, harness.table(headers, rows)]


def profile(options: argparse.Namespace) -> tuple[dict, list[str]]:
    """Measure the time of a training step by kernel, and the utilisation of the GPU."""
    record: dict[str, Any] = {}
    tables = []
    for name in ("dense-base", "switch-base-64"):
        run, model = make_step(preset(name))
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        issued = time.perf_counter() - started
        torch.cuda.synchronize()
        wall = time.perf_counter() - started
        with torch.profiler.profile() as seen:
            run()
            torch.cuda.synchronize()
        kernels = [e for e in seen.key_averages() if e.device_type == DeviceType.CUDA]
        busy = sum(kernel.self_device_time_total for kernel in kernels) / 1e6
        launches = sum(kernel.count for kernel in kernels)
        kernels.sort(key=lambda kernel: -kernel.self_device_time_total)
        found = {
            kernel.key[:80]: (kernel.self_device_time_total / 1e6, kernel.count)
            for kernel in kernels[:25]
        }
        record[name] = {
            "wall": wall, "issued": issued, "busy": busy, "launches": launches, "kernels": found,
        }  # fmt: skip
        said = (
            f"{name}: {wall * 1e3:.0f} ms, of which the host took {issued * 1e3:.0f} ms to issue "
            f"{launches:,} launches, and kernels ran for {busy * 1e3:.0f} ms (under the profiler)."
        )
        rows = [
            [f"`{key}`", f"{seconds * 1e3:.1f}", f"{count:,}"]
            for key, (seconds, count) in found.items()
        ]
        tables += [said, harness.table(["kernel", "ms", "launches"], rows)]
        del run, model
        torch.cuda.empty_cache()
    return record, tables


def decode(options: argparse.Namespace) -> tuple[dict, list[str]]:
    """Measure greedy decoding in bfloat16, one model after the other."""
    record: dict[str, Any] = {"limits": limits(options.repeats)}
    rows, seconds = [], {}
    for name in ("dense-base", "switch-base-64"):
        _, model = make_step(preset(name))
        model = model.to(torch.bfloat16).eval()
        for batch in BATCHES:
            inputs_BS = torch.randint(3, model.config.vocabulary_size, (batch, 64), device="cuda")
            case = f"{name}, batch {batch}"
            seconds |= timed(
                {case: lambda m=model, x=inputs_BS: generate(m, x, max_new_tokens=NEW_TOKENS)},
                options.repeats,
            )
            dense = seconds[f"dense-base, batch {batch}"]
            median = harness.summary(seconds[case])["median"]
            ratio = harness.ratio(seconds[case], dense)["median"]
            rate = batch * NEW_TOKENS / median
            rows.append([case, f"{median / NEW_TOKENS * 1e3:.2f}", f"{rate:,.0f}", f"{ratio:.2f}"])
        del model
        torch.cuda.empty_cache()
    record["seconds"] = seconds
    headers = ["model", "median ms per step", "tokens per second", "time to dense"]
    said = f"64 inputs, {NEW_TOKENS} new tokens, greedy, bfloat16, random weights."
    return record, [said, harness.table(headers, rows)]


SECTIONS = {
    "parity": parity, "layer": layer, "step": step, "profile": profile, "decode": decode,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", choices=SECTIONS, nargs="?", default="layer")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(harness.table(["on a GPU", ""], [[figure, "not measured"] for figure in FIGURES]))
        sys.exit()
    torch.manual_seed(options.seed)
    record, tables = SECTIONS[options.section](options)
    record |= {
        "environment": harness.environment(options.seed),
        "repeats": options.repeats,
        "clock": "wall",
    }
    harness.write(f"gpu_{options.section}", f"On a GPU: {options.section}", record, tables)


if __name__ == "__main__":
    main()
