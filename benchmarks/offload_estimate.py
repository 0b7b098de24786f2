"""Estimate bytes read, seconds and memory of a model with offloaded experts.

Uniform load is assumed, the worst case: n tokens then need E (1 - (1 - 1/E)^n) of E experts. The
hit rate is the share of experts in memory, as with any policy if all are equally likely.

Reading and the matmuls of experts overlap; the rest of the model (attention, dense layers, the
vocabulary) does not, nor, in the decoder, do experts that were not predicted.
"""

import math
from dataclasses import dataclass

from switchlm.errors import ConfigError
from switchlm.huggingface.names import Entry
from switchlm.huggingface.quantised import Quantisation, first_entries, parts
from switchlm.model.config import ModelConfig

FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Rates per second: bytes from the disk, bytes from main memory, and FLOPs of matmuls."""

    disk: float
    memory: float = 20e9
    flops: float = 200e9


@dataclass(frozen=True, kw_only=True)
class OffloadPlan:
    """Bytes, experts and seconds; encoding and decoding are those of the batch.

    expert_bytes: of one. experts: in all layers. dense_bytes: of everything else, which is resident
    beside `budget`. encoded_experts: touched by encoding. decoded_experts: read by all steps.
    """

    num_parameters: int
    expert_bytes: int
    experts: int
    dense_bytes: int
    budget: int
    encoded_experts: float
    encode_seconds: float
    decoded_experts: float
    decode_seconds: float
    tokens_a_second: float

    @property
    def file_bytes(self) -> int:
        return self.dense_bytes + self.experts * self.expert_bytes

    @property
    def encode_bytes(self) -> float:
        return self.encoded_experts * self.expert_bytes

    @property
    def decode_bytes(self) -> float:
        return self.decoded_experts * self.expert_bytes

    @property
    def memory_bytes(self) -> int:
        """Resident memory: everything but the experts, and their budget."""
        return self.dense_bytes + self.budget


def plan_offload(
    config: ModelConfig,
    machine: Machine,
    *,
    budget: int,
    input_tokens: int,
    new_tokens: int,
    batch: int = 1,
    dtype: str = "bfloat16",
    quantisation: Quantisation | None = None,
) -> OffloadPlan:
    """Return the estimate for encoding a batch and generating from it, with nothing cached.

    input_tokens, new_tokens: per row.
    dtype: of parameters that are not quantised, in files and memory.

    Raises ConfigError for a model without experts, or a budget that one does not fit.
    """
    if not config.num_experts:
        raise ConfigError(
            "The model is dense (model.num_experts is 0): no expert could be on disk."
        )
    kinds = list(first_entries(config, "switch"))
    number_bytes = FLOAT_BYTES[dtype]
    dense = dict.fromkeys(("encoder", "decoder", ""), 0)
    expert_numbers = 0
    layers: dict[str, set[str]] = {"encoder": set(), "decoder": set()}
    sizes: dict[str, int] = {}
    for kind in kinds:
        stack = kind.name.partition(".")[0]
        numbers = math.prod(kind.shape)
        if kind.expert is None:
            dense[stack if stack in layers else ""] += numbers
            continue
        layer = kind.name.rpartition(".")[0]
        layers[stack].add(layer)
        expert_numbers += numbers
        sizes[layer] = sizes.get(layer, 0) + _bytes(kind, config, number_bytes, quantisation)
    largest = max(sizes.values())
    if budget < largest:
        raise ConfigError(f"The budget is {budget:,} bytes, but one expert takes {largest:,}.")

    numbers_touched = expert_numbers // len(sizes)
    tokens = batch * input_tokens
    per_layer = _touched(tokens, config)
    encoded = per_layer * len(layers["encoder"])
    active = dense["encoder"] + numbers_touched * len(layers["encoder"])
    encode_seconds = max(
        encoded * largest / machine.disk + 2 * tokens * dense["encoder"] / machine.flops,
        2 * tokens * active / machine.flops,
    )

    slots, decoder_experts = budget // largest, len(layers["decoder"]) * config.num_experts
    wanted = _touched(batch, config) * len(layers["decoder"])
    held = read = 0.0
    for _ in range(new_tokens):
        missed = wanted * (1 - held / max(decoder_experts, 1))
        read += missed
        held = min(held + missed, slots, decoder_experts)
    step_bytes = (dense["decoder"] + dense[""]) * number_bytes + wanted * largest
    decode_seconds = read * largest / machine.disk + new_tokens * step_bytes / machine.memory
    return OffloadPlan(
        num_parameters=sum(dense.values()) + expert_numbers * config.num_experts,
        expert_bytes=largest,
        experts=len(sizes) * config.num_experts,
        dense_bytes=sum(dense.values()) * number_bytes,
        budget=budget,
        encoded_experts=encoded,
        encode_seconds=encode_seconds,
        decoded_experts=read,
        decode_seconds=decode_seconds,
        tokens_a_second=batch * new_tokens / decode_seconds,
    )


def _touched(tokens: int, config: ModelConfig) -> float:
    """Return the expected number of experts of a layer with at least one of the tokens."""
    choices = tokens * config.router.experts_per_token
    return config.num_experts * (1 - (1 - 1 / config.num_experts) ** choices)


def _bytes(
    kind: Entry, config: ModelConfig, number_bytes: int, quantisation: Quantisation | None
) -> int:
    """Return the bytes of a matrix of one expert."""
    if quantisation is None:
        return math.prod(kind.shape) * number_bytes
    stored = parts(kind, config.num_experts, quantisation)
    size = sum(math.prod(part.shape) * part.dtype.itemsize for part in stored if part.dtype)
    return size // config.num_experts
