"""Who goes to which expert: for every Switch layer, counts by expert, token class and token.

Shapes: B batch, S source, T target, N tokens, K experts a token, A assignments, E experts.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from switchlm.data.batch import Batch
from switchlm.data.tokenizer import Tokenizer
from switchlm.generation.inference import evaluation_mode
from switchlm.model.router import Router
from switchlm.model.routing import Routing
from switchlm.model.transformer import SwitchTransformer, shift_right

SPECIAL = re.compile(r"<pad>|</s>|<extra_id_\d+>|<id \d+>")


@dataclass(frozen=True, kw_only=True)
class LayerRouting:
    """What one Switch layer did with a text; padding is left out everywhere.

    name: the module, such as `encoder.blocks.1.feedforward`. load_E: assignments to each expert,
    before dropping. class_load: the same for each class of tokens (see token_class). top_tokens:
    for each expert its most frequent tokens as (text, count). dropped: the share of assignments
    that capacity dropped. gate: the mean gate.
    """

    name: str
    load_E: tuple[int, ...]
    class_load: dict[str, tuple[int, ...]]
    top_tokens: tuple[tuple[tuple[str, int], ...], ...]
    dropped: float
    gate: float


def switch_layers(model: SwitchTransformer) -> list[str]:
    """Return the names of the Switch layers, in the order of `ModelOutput.routing`."""
    return [
        name.removesuffix(".router")
        for name, module in model.named_modules()
        if isinstance(module, Router)
    ]


def routing_statistics(
    model: SwitchTransformer, batches: Iterable[Batch], tokenizer: Tokenizer, top: int = 8
) -> list[LayerRouting]:
    """Return a record for every Switch layer, in layer order; none for a dense model.

    Encoder layers see the inputs, decoder layers the targets shifted right. Capacity is as
    configured for evaluation.
    """
    names = switch_layers(model)
    tallies = [_Tally(model.config.num_experts, model.config.vocabulary_size) for _ in names]
    if not names:
        return []
    device = model.embedding.weight.device
    with evaluation_mode(model):
        for batch in batches:
            batch = batch.to(device)
            decoder_inputs_BT = shift_right(
                batch.targets_BT, batch.target_segments_BT, model.config.pad_id
            )
            segments = (batch.input_segments_BS, batch.target_segments_BT)
            output = model(batch.inputs_BS, decoder_inputs_BT, *segments)
            for index, routing in enumerate(output.routing):
                in_encoder = index < len(output.encoder_routing)
                tokens = batch.inputs_BS if in_encoder else decoder_inputs_BT
                tallies[index].add(routing, tokens, segments[0 if in_encoder else 1])
    return [tally.summary(name, tokenizer, top) for name, tally in zip(names, tallies, strict=True)]


@dataclass
class _Tally:
    """Running counts of one layer."""

    num_experts: int
    vocabulary_size: int
    counts: Counter[int] = field(default_factory=Counter)  # of expert * vocabulary_size + token
    kept: int = 0
    gate_sum: float = 0.0

    def add(self, routing: Routing, tokens: Tensor, segments: Tensor | None) -> None:
        token_N = tokens.flatten()
        num_assignments = routing.expert_A.numel()
        token_A = routing.token_A
        if token_A is None:
            places = torch.arange(num_assignments, device=token_N.device)
            token_A = places // (num_assignments // token_N.numel())
            wanted_A = torch.ones_like(routing.kept_A)
        else:
            # Experts chose: what they did not keep, they did not want.
            wanted_A = routing.kept_A
        if segments is not None:
            wanted_A = wanted_A & (segments.flatten() != 0)[token_A]
        pair_A = routing.expert_A * self.vocabulary_size + token_N[token_A]
        pairs, numbers = pair_A[wanted_A].unique(return_counts=True)
        self.counts.update(dict(zip(pairs.tolist(), numbers.tolist(), strict=True)))
        self.kept += int((routing.kept_A & wanted_A).sum())
        self.gate_sum += float(routing.gate_A[wanted_A].double().sum())

    def summary(self, name: str, tokenizer: Tokenizer, top: int) -> LayerRouting:
        load_E = [0] * self.num_experts
        class_load: dict[str, list[int]] = defaultdict(lambda: [0] * self.num_experts)
        top_tokens: list[list[tuple[str, int]]] = [[] for _ in load_E]
        for pair, number in self.counts.most_common():
            expert, token = divmod(pair, self.vocabulary_size)
            text = token_text(tokenizer, token)
            load_E[expert] += number
            class_load[token_class(text)][expert] += number
            if len(top_tokens[expert]) < top:
                top_tokens[expert].append((text, number))
        total = max(sum(load_E), 1)
        return LayerRouting(
            name=name,
            load_E=tuple(load_E),
            class_load={key: tuple(value) for key, value in sorted(class_load.items())},
            top_tokens=tuple(map(tuple, top_tokens)),
            dropped=1 - self.kept / total if self.counts else 0.0,
            gate=self.gate_sum / total,
        )


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return how a token reads; padding, end token and ids without a meaning have names."""
    if token == tokenizer.pad_id:
        return "<pad>"
    if token == tokenizer.end_id:
        return "</s>"
    return tokenizer.decode([token]) or f"<id {token}>"


def token_class(text: str) -> str:
    """Return what kind of token a text is.

    `special` (sentinels, start, end), `space`, `word`, `number`, `punctuation`, `byte` (part of a
    character) or `mixed`.
    """
    bare = text.strip()
    if not bare:
        return "space"
    if SPECIAL.fullmatch(bare):
        return "special"
    if "\ufffd" in bare:
        return "byte"
    if bare.isalpha():
        return "word"
    if bare.isnumeric():
        return "number"
    if all(unicodedata.category(character)[0] in "PS" for character in bare):
        return "punctuation"
    return "mixed"
