"""Greedy decoding on a CPU against transformers' `generate` on the same weights.

    python benchmarks/decode.py [--batch 1 16] [--new-tokens 32] [--variant int8=FOLDER ...]

The model has the shape of switch-base-8 and random weights, scaled so that outputs are varied,
unless --model names a folder. The time of a step is that of `new tokens` tokens after the first,
divided by their number, so that the encoder is excluded; the time of whole requests is given too.
The limit of a step is the bytes that it must read (the decoder's weights, with the routed experts
only, the head, and the keys and values) over the read bandwidth of `torch.sum` on as many threads.
Every variant is another folder; transformers is the baseline of all.
"""

import argparse
import dataclasses
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import harness
import switchlm
from few_tokens import read_bandwidth
from switchlm.generation.decode import generate
from switchlm.kernels.cpu.quantised import Matrix
from switchlm.model.presets import preset
from switchlm.model.quantised import QuantisedEmbedding, QuantisedExperts, QuantisedLinear
from switchlm.model.switch import SwitchFeedForward
from switchlm.model.transformer import SwitchTransformer

THEIRS = "transformers"


def random_model(seed: int) -> SwitchTransformer:
    """Return a model whose greedy output is varied: the layers outweigh the last token."""
    config = preset("switch-base-8")
    router = dataclasses.replace(config.router, mode="hf", expert_capacity=4096)
    with torch.device("meta"):
        model = SwitchTransformer(dataclasses.replace(config, router=router))
    model = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            # Stacked experts are [E, in, out], everything else is [out, in].
            fan_in = parameter.shape[1]
            scale = 1.0 if "embedding" in name else fan_in**-0.5
            if name.endswith("query.weight"):
                scale *= config.d_kv**-0.5
            if name.endswith(("output.weight", "down.weight", "down")):
                scale *= 4
            parameter.normal_(0.0, scale, generator=generator)
    return model


def step_bytes(model: SwitchTransformer, experts: float, rows: int, source: int, new: int) -> float:
    """Return the bytes that a step reads; experts: distinct routed ones, over all layers."""
    config = model.config
    dense, all_experts = 0, 0
    for name, part in model.decoder.named_modules():
        if ".experts" in name:
            all_experts += own_bytes(part)
        elif not name.endswith(CROSS):
            dense += own_bytes(part)
    dense += own_bytes(model.embedding if model.head is None else model.head)
    layers = sum(block.feedforward.__class__ is SwitchFeedForward for block in model.decoder.blocks)
    one_expert = all_experts / max(layers * config.num_experts, 1)
    numbers = torch.bfloat16 if model.embedding.weight.dtype == torch.bfloat16 else torch.float32
    places = rows * len(model.decoder.blocks) * (source + new / 2)
    kept = 2 * config.num_heads * config.d_kv * numbers.itemsize * places
    return dense + experts * one_expert + kept


def own_bytes(part: torch.nn.Module) -> int:
    """Return the bytes of a module's own parameters, without submodules, or of its codes."""
    tensors = list(part.parameters(recurse=False))
    if isinstance(part, QuantisedLinear | QuantisedEmbedding):
        tensors = stored(part.matrix)
    if isinstance(part, QuantisedExperts):
        kinds = [part.up, part.down] + ([] if part.gate is None else [part.gate])
        tensors = [tensor for kind in kinds for matrix in kind for tensor in stored(matrix)]
    return sum(t.numel() * t.element_size() for t in tensors)


def stored(matrix: Matrix) -> list[torch.Tensor]:
    """Return the codes and scales of a matrix."""
    return [value for value in vars(matrix).values() if isinstance(value, torch.Tensor)]


CROSS = ("cross_attention.key", "cross_attention.value")


def routed(model: SwitchTransformer, inputs_BS: torch.Tensor, new: int) -> float:
    """Return the mean number of distinct routed experts per step, over all layers."""
    found, decode = [], model.decode

    def watched(*arguments: Any, **options: Any) -> Any:
        output = decode(*arguments, **options)
        found.append(sum(int((layer.load_E > 0).sum()) for layer in output.decoder_routing))
        return output

    model.decode = watched  # type: ignore[method-assign]
    generate(model, inputs_BS, max_new_tokens=new)
    del model.decode  # type: ignore[method-assign]
    return statistics.mean(found)


def their_generate(model: Any, inputs_BS: torch.Tensor, new: int) -> torch.Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model.generate(
            input_ids=inputs_BS,
            attention_mask=torch.ones_like(inputs_BS),
            max_new_tokens=new,
            do_sample=False,
        )
    return found[:, 1:]


def cases_of(
    ours: dict[str, SwitchTransformer], theirs: Any, inputs_BS: torch.Tensor, new: int
) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the cases of every model, for one token and for `new` more."""
    cases: dict[str, Callable[[], torch.Tensor]] = {}
    for tokens in (1, new + 1):
        cases[f"{THEIRS} {tokens}"] = lambda t=tokens: their_generate(theirs, inputs_BS, t)
        for name, model in ours.items():
            cases[f"{name} {tokens}"] = lambda m=model, t=tokens: (
                generate(m, inputs_BS, max_new_tokens=t).tokens_BT
            )
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder that both load; random weights if left out")
    parser.add_argument("--variant", action="append", default=[], help="name=FOLDER, ours alone")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--input-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="decode", help="of the files in results/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        place = options.model or str(Path(folder) / "model")
        if options.model is None:
            switchlm.save(random_model(options.seed), None, place)
        kind = transformers.SwitchTransformersForConditionalGeneration
        theirs = kind.from_pretrained(place, dtype="auto").eval()
        ours = {"switchlm": switchlm.load(place)[0]}
        for variant in options.variant:
            name, _, variant_place = variant.partition("=")
            ours[name] = switchlm.load(variant_place)[0]
    read = read_bandwidth()
    generator = torch.Generator().manual_seed(options.seed)
    vocabulary = ours["switchlm"].config.vocabulary_size
    found = []
    for batch in options.batch:
        shape = (batch, options.input_tokens)
        inputs_BS = torch.randint(3, vocabulary - 200, shape, generator=generator)
        found.append(measured(ours, theirs, inputs_BS, options.new_tokens, options.repeats, read))
    record = {
        "environment": {
            **harness.environment(options.seed),
            "transformers": transformers.__version__,
        },
        "repeats": options.repeats,
        "clock": "wall",
        "input_tokens": options.input_tokens,
        "new_tokens": options.new_tokens,
        "read_bandwidth_bytes_a_second": read,
        "cases": [case for cases in found for case in cases],
    }
    title = "Greedy decoding against transformers on the same weights"
    note = (
        f"\n\n{options.input_tokens} input tokens, {options.new_tokens} new ones after the first; "
        f"transformers {transformers.__version__}. Read (a sum): {read / 1e9:.1f} GB/s."
    )
    harness.write(options.name, title, record, [harness.table(HEADERS, rows_of(record)) + note])


def measured(
    ours: dict[str, SwitchTransformer],
    theirs: Any,
    inputs_BS: torch.Tensor,
    new: int,
    repeats: int,
    read: float,
) -> list[dict[str, Any]]:
    """Return a record per model for this batch."""
    batch = inputs_BS.shape[0]
    cases = cases_of(ours, theirs, inputs_BS, new)
    # These runs are the warm-up, too.
    said = {name: cases[f"{name} {new + 1}"]() for name in (THEIRS, *ours)}
    experts = {name: routed(model, inputs_BS, new + 1) for name, model in ours.items()}
    seconds = harness.measure(cases, repeats, warmup=0)
    steps = {
        name: [
            (long - short) / new
            for long, short in zip(seconds[f"{name} {new + 1}"], seconds[f"{name} 1"], strict=True)
        ]
        for name in (THEIRS, *ours)
    }
    records = []
    for name, times in steps.items():
        whole = seconds[f"{name} {new + 1}"]
        case: dict[str, Any] = {
            "batch": batch,
            "model": name,
            "step_seconds": times,
            "whole_seconds": whole,
            "summary": harness.summary(times),
            "step_ratio": harness.ratio(steps[THEIRS], times),
            "whole_ratio": harness.ratio(seconds[f"{THEIRS} {new + 1}"], whole),
        }
        # The baseline reads the same bytes as our model of the same weights.
        same = name if name in ours else "switchlm"
        needed = step_bytes(ours[same], experts[same], batch, inputs_BS.shape[1], new)
        case |= {
            "distinct_experts_a_step": experts[same],
            "different_tokens": said[name].unique().numel(),
            "equal_tokens": torch.equal(said[name], said[THEIRS]),
            "bytes_a_step": needed,
            "limit_seconds": needed / read,
        }
        records.append(case)
    return records


HEADERS = [
    "batch, model",
    "ms per step (quartiles)",
    "tokens per second",
    "times theirs (quartiles)",
    "whole request, times theirs",
    "experts per step",
    "limit ms",
    "of the limit",
    "same tokens",
]


def rows_of(record: dict[str, Any]) -> list[list[str]]:
    rows = []
    for case in record["cases"]:
        times, ratio = case["summary"], case["step_ratio"]
        rows.append(
            [
                f"{case['batch']}, {case['model']}",
                f"{times['median'] * 1e3:.1f} ({times['lower'] * 1e3:.1f} "
                f"to {times['upper'] * 1e3:.1f})",
                f"{case['batch'] / times['median']:.1f}",
                f"{ratio['median']:.2f} ({ratio['lower']:.2f} to {ratio['upper']:.2f})",
                f"{case['whole_ratio']['median']:.2f}",
                f"{case['distinct_experts_a_step']:.1f}",
                f"{case['limit_seconds'] * 1e3:.1f}",
                f"{case['limit_seconds'] / times['median']:.0%}",
                "yes" if case["equal_tokens"] else "no",
            ]
        )
    return rows


if __name__ == "__main__":
    main()
