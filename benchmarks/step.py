"""How long a whole training step takes against transformers, and against the dense twins of both.

    python benchmarks/step.py [--experts 64] [--repeats 5] [--threads 2] [--clock cpu]

d_model 256, 4 + 4 layers, 8 heads of 32, d_ff 1024, every second layer sparse, 32 rows of 256
inputs and 64 targets, float32. A step is forward, backward with the balance loss, and fused AdamW;
ours also clips gradients and guards against bad batches. Random weights and tokens, no dropout.
"""

import argparse
from collections.abc import Callable

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
from switchlm.model.config import ModelConfig, RouterConfig
from switchlm.model.transformer import SwitchTransformer
from switchlm.training.config import TrainingConfig
from switchlm.training.optimizer import build_optimizer
from switchlm.training.step import training_step

SHAPE = {"d_model": 256, "d_ff": 1024, "d_kv": 32, "num_heads": 8}
ROUTERS = {
    "dropless": RouterConfig(capacity_factor=None, evaluation_capacity_factor=None),
    "capacity 1.25": RouterConfig(),
}


def ours(
    inputs_BS: Tensor, targets_BT: Tensor, vocabulary: int, experts: int, router: RouterConfig
) -> Callable[[], None]:
    """Return a step of switchlm."""
    model = SwitchTransformer(
        ModelConfig(
            **SHAPE,
            vocabulary_size=vocabulary,
            num_encoder_layers=4,
            num_decoder_layers=4,
            num_experts=experts,
            sparse_step=2,
            router=router,
        )
    ).train()
    config = TrainingConfig(learning_rate=1e-4, gradient_clip=1.0)
    optimizer = build_optimizer(model, config)
    batch = Batch(
        inputs_BS=inputs_BS,
        targets_BT=targets_BT,
        input_segments_BS=None,
        target_segments_BT=None,
        source_B=torch.zeros(inputs_BS.shape[0], dtype=torch.int32),
    )

    def run() -> None:
        training_step(model, optimizer, [batch], gradient_clip=config.gradient_clip)

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


def cases(options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Build the models that are compared."""
    inputs_BS = torch.randint(3, options.vocabulary, (32, 256))
    targets_BT = torch.randint(3, options.vocabulary, (32, 64))
    shape = {
        **SHAPE,
        "vocab_size": options.vocabulary,
        "num_layers": 4,
        "num_decoder_layers": 4,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
    }
    switch = SwitchTransformersConfig(
        **shape, num_experts=options.experts, num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=2,
    )  # fmt: skip
    data = (inputs_BS, targets_BT)
    sparse = {
        f"switchlm, {name}": ours(*data, options.vocabulary, options.experts, router)
        for name, router in ROUTERS.items()
    }
    return {
        **sparse,
        "switchlm, dense twin": ours(*data, options.vocabulary, 0, RouterConfig()),
        "transformers Switch": theirs(SwitchTransformersForConditionalGeneration(switch), *data),
        "transformers T5": theirs(T5ForConditionalGeneration(T5Config(**shape)), *data),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=harness.CLOCKS, default="wall")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="step", help="of the files in results/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    seconds = harness.measure(cases(options), options.repeats, clock=options.clock)
    baseline = seconds["transformers Switch"]
    found = {name: harness.summary(times) for name, times in seconds.items()}
    faster = {name: harness.ratio(baseline, times) for name, times in seconds.items()}
    rows = [
        [
            name,
            f"{times['median']:.2f}",
            f"{times['minimum']:.2f}",
            f"{faster[name]['median']:.2f} ({faster[name]['lower']:.2f} to "
            f"{faster[name]['upper']:.2f})",
            f"{faster[name]['of_minima']:.2f}",
        ]
        for name, times in found.items()
    ]
    record = {
        "environment": harness.environment(options.seed),
        "repeats": options.repeats,
        "clock": options.clock,
        "experts": options.experts,
        "vocabulary": options.vocabulary,
        "seconds": seconds,
        "summary": found,
        "times_as_fast_as_transformers_switch": faster,
    }
    headers = [
        f"one step, E {options.experts}",
        "median s",
        "minimum s",
        "times as fast as transformers Switch (quartiles)",
        "by minima",
    ]
    title = "A whole training step against transformers, float32"
    harness.write(options.name, title, record, [harness.table(headers, rows)])


if __name__ == "__main__":
    main()
