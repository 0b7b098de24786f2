"""A training step, compared with transformers and with the dense twin.

    python benchmarks/step.py [--experts 8 64] [--presets tiny] [--repeats 5]
    python benchmarks/step.py --experts 256 --presets --routers dropless --name step_256
    python benchmarks/step.py --experts --presets small --routers dropless --name step_small

Against transformers: d_model 256, 4 + 4 layers, 8 heads of 32, d_ff 1024, every second layer
sparse, 32 rows of 256 inputs and 64 targets, float32. Presets: as they are, with 64 experts, and
their dense twins. A step is forward, backward with the balance loss, and fused AdamW; ours also
clips gradients and guards against bad batches. Random weights and tokens, no dropout. All run in
one process, which keeps freed memory as our training does (transformers benefits too); 256 experts,
and `small`, need 20 GB. The share of the machine's matrix peak is the model's FLOPs (three times
those of a forward pass) over those of the best matmul.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import harness
from switchlm.data.batch import Batch
from switchlm.kernels.cpu.memory import keep_freed_memory
from switchlm.model import count
from switchlm.model.config import ModelConfig, RouterConfig
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer
from switchlm.training.config import TrainingConfig
from switchlm.training.optimizer import build_optimizer
from switchlm.training.step import training_step

DENSE, THEIRS = "switchlm, dense twin", "transformers Switch"
# rows, inputs, targets of a step of each preset
SIZES = {"tiny": (64, 64, 24), "small": (16, 256, 64)}
SHAPE = {"d_model": 256, "d_ff": 1024, "d_kv": 32, "num_heads": 8}
ROUTERS = {
    "dropless": RouterConfig(capacity_factor=None, evaluation_capacity_factor=None),
    "capacity 1.25": RouterConfig(),
}


def ours(config: ModelConfig, inputs_BS: Tensor, targets_BT: Tensor) -> Callable[[], None]:
    """Return a step of switchlm."""
    model = SwitchTransformer(config).train()
    training = TrainingConfig(learning_rate=1e-4, gradient_clip=1.0)
    optimizer = build_optimizer(model, training)
    batch = Batch(
        inputs_BS=inputs_BS,
        targets_BT=targets_BT,
        input_segments_BS=None,
        target_segments_BT=None,
        source_B=torch.zeros(inputs_BS.shape[0], dtype=torch.int32),
    )

    def run() -> None:
        training_step(model, optimizer, [batch], gradient_clip=training.gradient_clip)

    return run


def theirs(model: nn.Module, inputs_BS: Tensor, targets_BT: Tensor) -> Callable[[], None]:
    """Return a step of a transformers model."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    routes = "router_aux_loss_coef" in model.config.to_dict()
    extra = {"output_router_logits": True} if routes else {}

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=inputs_BS, labels=targets_BT, **extra).loss.backward()
        optimizer.step()

    return run


def model_of_shape(vocabulary: int, experts: int, router: RouterConfig) -> ModelConfig:
    return ModelConfig(
        **SHAPE,
        vocabulary_size=vocabulary,
        num_encoder_layers=4,
        num_decoder_layers=4,
        num_experts=experts,
        sparse_step=2,
        router=router,
    )


def against_transformers(experts: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure both libraries' sparse and dense models of one shape."""
    data = tokens(options.vocabulary, 32, 256, 64)
    shape = {
        **SHAPE,
        "vocab_size": options.vocabulary,
        "num_layers": 4,
        "num_decoder_layers": 4,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
    }
    switch = SwitchTransformersConfig(
        **shape, num_experts=experts, num_sparse_encoder_layers=2, num_sparse_decoder_layers=2
    )
    models = {
        f"switchlm, {name}": model_of_shape(options.vocabulary, experts, ROUTERS[name])
        for name in options.routers
    }
    models[DENSE] = model_of_shape(options.vocabulary, 0, RouterConfig())
    cases = {name: ours(model, *data) for name, model in models.items()}
    cases[THEIRS] = theirs(SwitchTransformersForConditionalGeneration(switch), *data)
    cases["transformers T5"] = theirs(T5ForConditionalGeneration(T5Config(**shape)), *data)
    title = f"d_model 256, 4 + 4 layers, 32 x 256 inputs, 64 targets, E {experts}"
    return measured(title, cases, models, (32, 256, 64), options)


def of_preset(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a preset with 64 experts, as it is and dropless, and its dense twin."""
    rows, inputs, targets = SIZES[name]
    sparse = dataclasses.replace(preset(name), num_experts=64)
    models = {
        f"switchlm, {kind}": dataclasses.replace(sparse, router=ROUTERS[kind])
        for kind in options.routers
    }
    models[DENSE] = sparse.dense_twin()
    data = tokens(sparse.vocabulary_size, rows, inputs, targets)
    cases = {kind: ours(model, *data) for kind, model in models.items()}
    title = f"preset {name}, {rows} x {inputs} inputs, {targets} targets, E 64"
    return measured(title, cases, models, SIZES[name], options)


def tokens(vocabulary: int, rows: int, inputs: int, targets: int) -> tuple[Tensor, Tensor]:
    return (
        torch.randint(3, vocabulary, (rows, inputs)),
        torch.randint(3, vocabulary, (rows, targets)),
    )


def measured(
    title: str,
    cases: dict[str, Callable[[], None]],
    models: dict[str, ModelConfig],
    size: tuple[int, int, int],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Return the seconds of all cases, their ratios, and the share of the matrix peak."""
    rows, inputs, targets = size
    seconds = harness.measure(cases, options.repeats, clock=options.clock)
    peak = harness.matrix_peak()
    flops = {
        name: 3 * rows * (inputs + targets) * count.flops_per_token(model, inputs, targets)
        for name, model in models.items()
    }
    return {
        "title": title,
        "seconds": seconds,
        "summary": {name: harness.summary(times) for name, times in seconds.items()},
        "ratio_to_dense": {
            name: harness.ratio(times, seconds[DENSE]) for name, times in seconds.items()
        },
        "times_as_fast_as_transformers_switch": {
            name: harness.ratio(seconds[THEIRS], times)
            for name, times in seconds.items()
            if THEIRS in seconds
        },
        "matrix_peak_flops_a_second": peak,
        "part_of_peak": {name: flops[name] / min(seconds[name]) / peak for name in flops},
        "tokens_a_second": {
            name: rows * (inputs + targets) / min(times) for name, times in seconds.items()
        },
    }


def as_table(found: dict[str, Any]) -> str:
    """Return one shape's results as Markdown."""
    rows = []
    for name, times in found["summary"].items():
        dense = found["ratio_to_dense"][name]
        faster = found["times_as_fast_as_transformers_switch"].get(name)
        part = found["part_of_peak"].get(name)
        rows.append(
            [
                name,
                f"{times['median']:.3f}",
                f"{times['minimum']:.3f}",
                f"{dense['median']:.2f} ({dense['lower']:.2f} to {dense['upper']:.2f})",
                ""
                if faster is None
                else f"{faster['median']:.2f} ({faster['lower']:.2f} to {faster['upper']:.2f})",
                f"{found['tokens_a_second'][name]:,.0f}",
                "" if part is None else f"{part:.0%}",
            ]
        )
    headers = [
        "one step", "median s", "minimum s", "to the dense twin (quartiles)",
        "times as fast as transformers Switch (quartiles)", "tokens per second",
        "of the matrix peak",
    ]  # fmt: skip
    peak = f"Matrix peak, measured: {found['matrix_peak_flops_a_second'] / 1e9:.0f} GFLOP/s."
    return f"## {found['title']}\n\n{harness.table(headers, rows)}\n\n{peak}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, nargs="*", default=[8, 64])
    parser.add_argument("--presets", nargs="*", choices=SIZES, default=["tiny"])
    parser.add_argument("--routers", nargs="+", choices=ROUTERS, default=list(ROUTERS))
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=harness.CLOCKS, default="wall")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="step", help="of the files in results/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    keep_freed_memory()
    found = [against_transformers(experts, options) for experts in options.experts]
    found += [of_preset(name, options) for name in options.presets]
    record = {
        "environment": harness.environment(options.seed),
        "repeats": options.repeats,
        "clock": options.clock,
        "vocabulary": options.vocabulary,
        "shapes": found,
    }
    title = "A whole training step, float32"
    harness.write(options.name, title, record, [as_table(shape) for shape in found])


if __name__ == "__main__":
    main()
