"""The expert assignment of one text: each token's expert in every Switch layer.

Shapes: S source, T target, A assignments, K experts per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import DataError
from switchlm.generation.decode import (
    check_finite,
    check_vocabulary,
    encode_prompts,
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


TokenTexts = tuple[list[int], list[str]]  # ids of tokens, and their texts


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
    source = encoder_tokens(text, tokenizer, config.end_id)
    check_vocabulary(max(source[0]), config.vocabulary_size)
    if output is None:
        generated = generate(
            model,
            torch.tensor([source[0]], device=model.embedding.weight.device),
            max_new_tokens=max_new_tokens,
            encoder_capacity=enforce_capacity,
        )
        ids = generated.rows(config.end_ids)[0]
        tokens = ids, texts_of_tokens(ids, tokenizer)
        target = decoder_tokens(tokens, tokenizer, config.first_id)
    else:
        target = decoder_tokens(tokens_of_text(output, tokenizer), tokenizer, config.start_id)
    return route_tokens(model, source, target, enforce_capacity)


def encoder_tokens(text: str, tokenizer: Tokenizer, end_id: int) -> TokenTexts:
    """Return the encoder's inputs for a text; raises DataError for an empty one."""
    ids, texts = tokens_of_text(text, tokenizer)
    if not ids:
        raise DataError("The text is empty: there is nothing to route.")
    before, after = (
        [name_of(token, tokenizer) for token in tokens]
        for tokens in (tokenizer.before, tokenizer.after)
    )
    return tokenizer.complete(ids, end_id), [*before, *texts, *after, "</s>"]


def decoder_tokens(output: TokenTexts, tokenizer: Tokenizer, start_id: int) -> TokenTexts:
    """Return the decoder's inputs for the tokens of an output."""
    ids, texts = output
    return [start_id, *ids], [*texts_of_tokens([start_id], tokenizer), *texts]


def route_tokens(
    model: SwitchTransformer, source: TokenTexts, target: TokenTexts, enforce_capacity: bool
) -> RoutedText:
    """Return what `route` does, for the inputs of the encoder and of the decoder."""
    (source_ids, source_texts), (target_ids, target_texts) = source, target
    check_vocabulary(max(*source_ids, *target_ids), model.config.vocabulary_size)
    device = model.embedding.weight.device
    with evaluation_mode(model, drop=enforce_capacity):
        routed = model(
            torch.tensor([source_ids], device=device), torch.tensor([target_ids], device=device)
        )
    check_finite(routed.logits_BTV)
    return RoutedText(
        num_experts=model.config.num_experts,
        encoder=RoutedTokens(
            tokens=source_texts,
            layers=_layers(model.encoder, routed.encoder_routing, len(source_ids)),
        ),
        decoder=RoutedTokens(
            tokens=target_texts,
            layers=_layers(model.decoder, routed.decoder_routing, len(target_ids)),
        ),
    )


def encode_alone(model: SwitchTransformer, ids: Sequence[int]) -> Tensor:
    """Return encoded_SD of a prompt, end token included, with the capacity of the encoder."""
    with evaluation_mode(model):
        inputs_BS = torch.tensor([ids], device=model.embedding.weight.device)
        return encode_prompts(model, inputs_BS, None, enforce_capacity=True)[0]


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
