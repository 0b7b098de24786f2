"""A step of the optimizers, compared with copies of the bytes that it must move.

    python benchmarks/optimizer.py [--experts 256 --d-model 256 --d-ff 1024] [--repeats 7]

One step over the expert weights of a Switch layer in float32, set up as training does: `found_inf`
and `grad_scale` set, and the norm of the gradients measured before. A pass is all weights' bytes
once. AdamW must read weights, gradients and two moments, and write all but the gradients: 7 passes.
Adafactor, its moments factored, must read weights and gradients twice, since both root mean squares
of the whole stack are needed before the first weight is written, and write the weights: 5 passes; 3
where root mean squares are taken by expert, as one expert fits the cache. The norm: 1 pass. With
`grad_scale`, PyTorch's AdamW also writes the scaled gradients: an eighth pass, not counted.

The limit of n passes is n / 2 times the time of a copy, which reads once and writes once.
"""

import argparse
from collections.abc import Callable

import torch
from torch import nn

import harness
from switchlm.model.experts import FeedForwardExperts
from switchlm.training.config import TrainingConfig
from switchlm.training.monitor import global_norm
from switchlm.training.optimizer import build_optimizer, set_learning_rate

COPY = "copy"
NORM = "norm of the gradients"
# name: the settings, and the minimum passes over the bytes of all weights
OPTIMIZERS = {
    "AdamW, fused": (TrainingConfig(optimizer="adamw"), 7),
    "Adafactor": (TrainingConfig(optimizer="adafactor"), 5),
    "Adafactor, root mean squares by expert": (
        TrainingConfig(optimizer="adafactor", per_expert_rms=True),
        3,
    ),
}
SCALED = ", found_inf and grad_scale set"


class _Layer(nn.Module):
    """Has the weight names of a model, so that they are experts."""

    def __init__(self, experts: FeedForwardExperts) -> None:
        super().__init__()
        self.experts = experts


def stepping(layer: nn.Module, config: TrainingConfig, scaled: bool) -> Callable[[], object]:
    """Return one step; its learning rate is too small to change the magnitudes."""
    optimizer = build_optimizer(layer, config)
    set_learning_rate(optimizer, 1e-6)
    if scaled:
        optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
        optimizer.grad_scale = torch.ones(())  # type: ignore[attr-defined]
    return optimizer.step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--d-ff", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="optimizer", help="of the files in results/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    layer = _Layer(FeedForwardExperts(options.d_model, options.d_ff, options.experts))
    weights = list(layer.parameters())
    for weight in weights:
        nn.init.trunc_normal_(weight, std=0.02)
        weight.grad = torch.randn_like(weight) * 1e-3
    num_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
    targets = [torch.empty_like(weight) for weight in weights]

    def copy() -> None:
        for target, weight in zip(targets, weights, strict=True):
            target.copy_(weight.detach())

    def norm() -> object:
        return global_norm([weight.grad for weight in weights if weight.grad is not None])

    cases: dict[str, Callable[[], object]] = {COPY: copy, NORM: norm}
    passes = {COPY: 2, NORM: 1}
    for name, (config, least) in OPTIMIZERS.items():
        for scaled in (False, True):
            case = name + SCALED * scaled
            cases[case] = stepping(layer, config, scaled)
            passes[case] = least
    with torch.no_grad():
        seconds = harness.measure(cases, options.repeats)
    to_limit = {
        case: harness.ratio(times, [copied * passes[case] / 2 for copied in seconds[COPY]])
        for case, times in seconds.items()
    }
    record = {
        "environment": harness.environment(options.seed),
        "repeats": options.repeats,
        "clock": "wall",
        "experts": options.experts,
        "d_model": options.d_model,
        "d_ff": options.d_ff,
        "bytes_of_all_weights": num_bytes,
        "passes": passes,
        "seconds": seconds,
        "ratio_to_limit": to_limit,
    }
    copied = min(seconds[COPY])
    rows = []
    for case, times in seconds.items():
        found, ratio = harness.summary(times), to_limit[case]
        rows.append(
            [
                case,
                str(passes[case]),
                f"{found['median'] * 1e3:.1f}",
                f"{found['minimum'] * 1e3:.1f}",
                f"{passes[case] / 2 * copied * 1e3:.1f}",
                f"{ratio['median']:.2f} ({ratio['lower']:.2f} to {ratio['upper']:.2f})",
                f"{ratio['of_minima']:.2f}",
            ]
        )
    headers = [
        "a step",
        "passes",
        "median ms",
        "minimum ms",
        "limit ms",
        "to limit (quartiles)",
        "of minima",
    ]
    title = (
        f"## E {options.experts}, D {options.d_model}, F {options.d_ff}, "
        f"{num_bytes / 1e6:.0f} MB of weights\n\n"
    )
    speed = f"\n\nCopy: {2 * num_bytes / copied / 1e9:.1f} GB/s, read and written."
    harness.write(
        options.name,
        "A step of the optimizer against a copy of its bytes, float32",
        record,
        [title + harness.table(headers, rows) + speed],
    )


if __name__ == "__main__":
    main()
