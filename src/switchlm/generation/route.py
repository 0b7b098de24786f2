"""The expert assignment of one text: each token's expert in every Switch layer.

Shapes: S source, T target, A assignments, K experts per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import DataError
from switchlm.generation.decode import (
    check_finite,
    check_vocabulary,
    evaluation_mode,
    generate,
)
from switchlm.generation.text_stream import name_of, texts_of_tokens, tokens_of_text
from switchlm.model.router import Router
from switchlm.model.routing import Routing
from switchlm.model.transformer import Stack, SwitchTransformer

NO_EXPERT = -1  # of a token that no expert chose, with expert choice


@dataclass(frozen=True, kw_only=True)
class RoutedLayer:
    """The routing of one Switch layer.

    layer: the index of its block.
    part: its module in the block: `feedforward` or, with experts in attention, `attention.query`
        and `attention.key_value`.
    expert, gate, kept: of each token's first choice; with expert choice, the expert is -1 for a
        token that none chose.
    load: the number of tokens assigned to each expert, before dropping.
    """

    layer: int
    part: str
    expert: list[int]
    gate: list[float]
    kept: list[bool]
    load: list[int]


@dataclass(frozen=True, kw_only=True)
class RoutedTokens:
    """The input tokens of a stack, as text, and its Switch layers; none in a dense stack."""

    tokens: list[str]
    layers: list[RoutedLayer]


@dataclass(frozen=True, kw_only=True)
class RoutedText:
    """The routing of a text and of an output; num_experts: 0 if dense."""

    num_experts: int
    encoder: RoutedTokens
    decoder: RoutedTokens


def route(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    text: str,
    output: str | None = None,
    *,
    max_new_tokens: int = 64,
    enforce_capacity: bool = False,
) -> RoutedText:
    """Return the expert of each token of `text` and `output`.

    output: None: the greedy output of the model.
    enforce_capacity: drop tokens beyond the configured capacity for evaluation, with all of the
        output in one batch, as in training; false: drop none, as in serving.

    The encoder's tokens are the text and `</s>`, and what else the tokenizer puts around a text;
    the decoder's are the start token and the output: inputs, not predictions.

    Raises DataError for an empty text, and for tokens that the model's vocabulary lacks.
    """
    config = model.config
    source_ids, source_texts = tokens_of_text(text, tokenizer)
    if not source_ids:
        raise DataError("The text is empty: there is nothing to route.")
    check_vocabulary(max(source_ids), config.vocabulary_size)
    device = model.embedding.weight.device
    completed = tokenizer.complete(source_ids, config.end_id)
    names = [name_of(token, tokenizer) for token in (*tokenizer.before, *tokenizer.after)]
    before = len(tokenizer.before)
    source_texts = [*names[:before], *source_texts, *names[before:], "</s>"]
    inputs_BS = torch.tensor([completed], device=device)
    start_id = config.start_id
    if output is None:
        start_id = config.first_id
        generated = generate(
            model,
            inputs_BS,
            max_new_tokens=max_new_tokens,
            encoder_capacity=enforce_capacity,
        )
        target_ids = generated.rows(config.end_ids)[0]
        target_texts = texts_of_tokens(target_ids, tokenizer)
    else:
        target_ids, target_texts = tokens_of_text(output, tokenizer)
        check_vocabulary(max(target_ids, default=0), config.vocabulary_size)
    decoder_inputs_BT = torch.tensor([[start_id, *target_ids]], device=device)

    with evaluation_mode(model, drop=enforce_capacity):
        routed = model(inputs_BS, decoder_inputs_BT)
    check_finite(routed.logits_BTV)
    return RoutedText(
        num_experts=config.num_experts,
        encoder=RoutedTokens(
            tokens=source_texts,
            layers=_layers(model.encoder, routed.encoder_routing, len(completed)),
        ),
        decoder=RoutedTokens(
            tokens=[*texts_of_tokens([start_id], tokenizer), *target_texts],
            layers=_layers(model.decoder, routed.decoder_routing, len(target_ids) + 1),
        ),
    )


def _layers(stack: Stack, routings: tuple[Routing, ...], num_tokens: int) -> list[RoutedLayer]:
    # Named `blocks.3.feedforward.router`; modules are in the order in which they run.
    names = [name.split(".") for name, part in stack.named_modules() if isinstance(part, Router)]
    return [
        _layer(int(name[1]), ".".join(name[2:-1]), routing, num_tokens)
        for name, routing in zip(names, routings, strict=True)
    ]


def _layer(layer: int, part: str, routing: Routing, num_tokens: int) -> RoutedLayer:
    expert_A, gate_A, kept_A = routing.expert_A, routing.gate_A, routing.kept_A
    if routing.token_A is None:
        choices = expert_A.numel() // num_tokens
        first = slice(None, None, choices)
        expert, gate, kept = expert_A[first], gate_A[first], kept_A[first]
    else:
        expert, gate, kept = _strongest(routing.token_A, expert_A, gate_A, kept_A, num_tokens)
    return RoutedLayer(
        layer=layer,
        part=part,
        expert=expert.tolist(),
        gate=gate.tolist(),
        kept=kept.tolist(),
        load=routing.load_E.tolist(),
    )


def _strongest(
    token_A: Tensor, expert_A: Tensor, gate_A: Tensor, kept_A: Tensor, num_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each token the expert of the largest gate among those that chose it."""
    expert_N = torch.full((num_tokens,), NO_EXPERT, device=expert_A.device)
    gate_N = torch.zeros(num_tokens, device=gate_A.device)
    for token, expert, gate, kept in zip(
        token_A.tolist(), expert_A.tolist(), gate_A.tolist(), kept_A.tolist(), strict=True
    ):
        if kept and gate > gate_N[token]:
            expert_N[token], gate_N[token] = expert, gate
    return expert_N, gate_N, expert_N != NO_EXPERT
