"""Run a stack, and return what transformers returns of it: states, attention, router logits.

Shapes: B batch, S positions of the stack, M positions attended to, D d_model, E experts, H heads,
K head width.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from switchlm.errors import ConfigError
from switchlm.model.attention import Attention, SwitchAttention
from switchlm.model.router import Router
from switchlm.model.routing import Routing
from switchlm.model.switch import SwitchLayer
from switchlm.model.transformer import DecodingCache, Stack, StackInputs


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to return besides the last state."""

    hidden_states: bool = False
    attentions: bool = False
    router_logits: bool = False


@dataclass(frozen=True, kw_only=True)
class StackOutput:
    """What a stack computed; None where it was not wanted.

    last_hidden_state: y_BSD, after the final norm.
    routing: of all Switch layers.
    hidden_states: the input of every block, and y_BSD.
    attentions, cross_attentions: the weights of every block, [B, H, S, M].
    router_logits: of every Switch layer, [B, S, E], float32.
    """

    last_hidden_state: Tensor
    routing: tuple[Routing, ...]
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None
    cross_attentions: tuple[Tensor, ...] | None
    router_logits: tuple[Tensor, ...] | None


def run_stack(
    stack: Stack,
    inputs: StackInputs,
    wanted: Wanted,
    memory_BSD: Tensor | None = None,
    cache: DecodingCache | None = None,
) -> StackOutput:
    """Run a stack as Stack.forward does.

    Raises ConfigError where the wanted attention weights would not survive, since activations are
    recomputed.
    """
    if wanted.attentions and stack.activation_checkpointing and torch.is_grad_enabled():
        raise ConfigError(
            "output_attentions keeps what gradient checkpointing recomputes: call "
            "gradient_checkpointing_disable(), or leave output_attentions out."
        )
    # Not restored: what is recomputed in the backward pass must be the same.
    for router in _routers(stack):
        router.keeps_logits = wanted.router_logits
    x_BSD = inputs.x_BSD
    states, routing = [x_BSD], list[Routing]()
    with recorded(stack) if wanted.attentions else nullcontext() as weights:
        for output_BSD, block_routing in stack.block_outputs(inputs, memory_BSD, cache):
            x_BSD = output_BSD
            routing += block_routing
            if wanted.hidden_states:
                states.append(x_BSD)
    y_BSD = stack.dropout(stack.final_norm(x_BSD))
    states[-1] = y_BSD
    own, cross = weights if weights is not None else (None, None)
    return StackOutput(
        last_hidden_state=y_BSD,
        routing=tuple(routing),
        hidden_states=tuple(states) if wanted.hidden_states else None,
        attentions=None if own is None else tuple(own),
        cross_attentions=None if cross is None else tuple(cross),
        router_logits=_by_row(routing, x_BSD) if wanted.router_logits else None,
    )


def _by_row(routing: list[Routing], x_BSD: Tensor) -> tuple[Tensor, ...]:
    logits = [layer.logits_NE for layer in routing]
    return tuple(one.view(*x_BSD.shape[:2], -1) for one in logits if one is not None)


def _routers(stack: Stack) -> Iterator[Router]:
    for block in stack.layers:
        if isinstance(block.attention, SwitchAttention):
            yield block.attention.query.router
            yield block.attention.key_value.router
        if isinstance(block.feedforward, SwitchLayer):
            yield block.feedforward.router


@contextmanager
def recorded(stack: Stack) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield two lists, to which attention adds its weights meanwhile: self and cross."""
    own: list[Tensor] = []
    cross: list[Tensor] = []
    changed: list[tuple[Attention | SwitchAttention, list[Tensor]]] = []
    for block in stack.layers:
        changed.append((block.attention, own))
        if block.cross_attention is not None:
            changed.append((block.cross_attention, cross))
    before = [layer.attend for layer, _ in changed]
    for layer, weights in changed:
        layer.attend = partial(_attend, weights)
    try:
        yield own, cross
    finally:
        for (layer, _), attend in zip(changed, before, strict=True):
            layer.attend = attend


def _attend(
    weights: list[Tensor],
    query_BHQK: Tensor,
    key_BHMK: Tensor,
    value_BHMK: Tensor,
    bias: Tensor | None,
    dropout: float,
) -> Tensor:
    """The slow twin of kernels.select.attention, which keeps the weights."""
    scores_BHQM = query_BHQK @ key_BHMK.mT
    if bias is not None:
        scores_BHQM = scores_BHQM + bias.to(scores_BHQM.dtype)
    weights_BHQM = nn.functional.dropout(scores_BHQM.softmax(-1), dropout, dropout > 0)
    weights.append(weights_BHQM)
    return (weights_BHQM @ value_BHMK).transpose(1, 2).flatten(2)
