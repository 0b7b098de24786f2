"""The encoder-decoder: T5 with Switch layers.

Shapes: B batch, S source, T target, M memory (cached positions), D d_model, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from switchlm.data.batch import Batch
from switchlm.kernels.select import linear
from switchlm.model.attention import (
    Attention,
    KeysValues,
    KeyValueStore,
    Memory,
    RelativeBias,
    SwitchAttention,
    masked,
    segment_mask,
)
from switchlm.model.config import ModelConfig
from switchlm.model.initialise import Initialiser
from switchlm.model.layers import FeedForward, Linear, RMSNorm
from switchlm.model.precision import Precision, computing
from switchlm.model.routing import ModelOutput, Routing
from switchlm.model.switch import SwitchFeedForward


class DecodingCache(Protocol):
    """The KV cache of decoding (see generation/decode.py).

    self_attention: a store per layer.
    cross_attention: the encoder's keys and values per layer.
    """

    self_attention: list[KeyValueStore]
    cross_attention: list[KeysValues]

    def positions(self, num_new: int) -> tuple[Tensor, Tensor]:
        """Return the int64 positions of new tokens, [T] or [B, T], and of all cached keys, [M]."""
        ...


@dataclass(frozen=True, kw_only=True)
class StackInputs:
    """The input of the first block of a stack, and what all of its blocks share.

    x_BSD: the embedded tokens.
    bias, memory_bias: added to the scores of self- and cross-attention; very low where attention is
        not allowed.
    mask_BS: bool, false at padding; None where all tokens are real.
    """

    x_BSD: Tensor
    bias: Tensor
    mask_BS: Tensor | None
    memory_bias: Tensor | None = None


class Block(nn.Module):
    """Pre-norm residual sublayers; the feed-forward one is a Switch layer in sparse blocks."""

    def __init__(self, config: ModelConfig, *, sparse: bool, decoder: bool) -> None:
        super().__init__()
        norm = (config.d_model, config.norm_epsilon)
        attention = (config.d_model, config.num_heads, config.d_kv, config.dropout)
        self.attention_norm = RMSNorm(*norm)
        self.attention: Attention | SwitchAttention = (
            SwitchAttention(config, causal=decoder)
            if sparse and config.attention_experts
            else Attention(*attention)
        )
        self.cross_attention_norm: RMSNorm | None = RMSNorm(*norm) if decoder else None
        self.cross_attention: Attention | None = Attention(*attention) if decoder else None
        self.feedforward_norm = RMSNorm(*norm)
        self.feedforward: FeedForward | SwitchFeedForward
        if sparse:
            self.feedforward = SwitchFeedForward(
                config.d_model,
                config.d_ff,
                config.num_experts,
                router=config.router,
                activation=config.activation,
                gated=config.gated,
                expert_dropout=config.expert_dropout,
                initialisation=config.initialisation,
                causal=decoder,
            )
        else:
            self.feedforward = FeedForward(
                config.d_model, config.d_ff, config.activation, config.gated, config.dropout
            )
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x_BSD: Tensor,
        inputs: StackInputs,
        *,
        memory: Memory | None = None,
        store: KeyValueStore | None = None,
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """Return (y_BSD, the routing of this block's Switch layers).

        x_BSD: the output of the block before.
        inputs: what all blocks of the stack share; its x_BSD is not read.
        memory: the encoder's output, or its keys and values.
        store: a decoding cache.
        """
        x_BSD, routing = self.attend(x_BSD, inputs, memory=memory, store=store)
        x_BSD, switch_routing = self.transform(x_BSD, inputs.mask_BS)
        return x_BSD, routing + switch_routing

    def attend(
        self,
        x_BSD: Tensor,
        inputs: StackInputs,
        *,
        memory: Memory | None = None,
        store: KeyValueStore | None = None,
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """Run the sublayers of attention; see forward."""
        y_BSD, routing = self.attention(
            self.attention_norm(x_BSD), inputs.bias, store=store, mask_BQ=inputs.mask_BS
        )
        x_BSD = x_BSD + self.dropout(y_BSD)
        if self.cross_attention is not None and self.cross_attention_norm is not None:
            y_BSD, _ = self.cross_attention(
                self.cross_attention_norm(x_BSD), inputs.memory_bias, memory=memory
            )
            x_BSD = x_BSD + self.dropout(y_BSD)
        return x_BSD, routing

    def transform(
        self, x_BSD: Tensor, mask_BS: Tensor | None = None
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """Run the feed-forward sublayer; see forward."""
        y_BSD = self.feedforward_norm(x_BSD)
        if isinstance(self.feedforward, SwitchFeedForward):
            y_BSD, routing = self.feedforward(y_BSD, mask_BS)
            return x_BSD + self.dropout(y_BSD), (routing,)
        return x_BSD + self.dropout(self.feedforward(y_BSD)), ()


class Stack(nn.Module):
    """The blocks of an encoder or decoder with their shared relative bias and final norm."""

    def __init__(self, config: ModelConfig, *, decoder: bool) -> None:
        super().__init__()
        num_layers = config.num_decoder_layers if decoder else config.num_encoder_layers
        self.relative_bias = RelativeBias(
            config.relative_buckets, config.num_heads, config.relative_distance, not decoder
        )
        self.blocks = nn.ModuleList(
            Block(config, sparse=config.is_sparse(layer, decoder=decoder), decoder=decoder)
            for layer in range(num_layers)
        )
        self.final_norm = RMSNorm(config.d_model, config.norm_epsilon)
        self.dropout = nn.Dropout(config.dropout)
        self.activation_checkpointing = False

    @property
    def layers(self) -> list[Block]:
        """The blocks, with their type."""
        return [cast(Block, block) for block in self.blocks]

    def memories(self, encoded_BSD: Tensor) -> list[KeysValues]:
        """Return the keys and values of the encoder's output for each block of a decoder."""
        attentions = [block.cross_attention for block in self.layers]
        return [a.keys_values(encoded_BSD) for a in attentions if a is not None]

    def forward(
        self,
        inputs: StackInputs,
        memory_BSD: Tensor | None = None,
        cache: DecodingCache | None = None,
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """Return (y_BSD, the routing of all Switch layers).

        Recomputes the activations of each block in the backward pass if so configured.

        memory_BSD: the encoder's output, for a decoder.
        cache: the KV cache of decoding; memory_BSD is not read then.
        """
        x_BSD = inputs.x_BSD
        routing: tuple[Routing, ...] = ()
        for output_BSD, block_routing in self.block_outputs(inputs, memory_BSD, cache):
            x_BSD = output_BSD
            routing += block_routing
        return self.dropout(self.final_norm(x_BSD)), routing

    def block_outputs(
        self,
        inputs: StackInputs,
        memory_BSD: Tensor | None = None,
        cache: DecodingCache | None = None,
    ) -> Iterator[tuple[Tensor, tuple[Routing, ...]]]:
        """Yield what each block returns, before the final norm; see forward."""
        x_BSD = inputs.x_BSD
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for layer, block in enumerate(self.blocks):
            run = partial(checkpoint, block, use_reentrant=False) if recompute else block
            x_BSD, routing = run(
                x_BSD,
                inputs,
                memory=memory_BSD if cache is None else cache.cross_attention[layer],
                store=None if cache is None else cache.self_attention[layer],
            )
            yield x_BSD, routing


class SwitchTransformer(nn.Module):
    """A sparse or dense T5-style encoder-decoder language model.

    Build under `torch.device("meta")` for shapes alone; elsewhere parameters are initialised as
    configured (section 2.4). `project` multiplies the decoder's output with the vocabulary, x and
    weight to logits; parallelism over the vocabulary replaces it. `precision` is that of batches,
    see `set_precision`. `metadata` is what the model's folder holds beside it
    (huggingface/metadata.py); copies keep it.
    """

    def __init__(self, config: ModelConfig, metadata: Any = None) -> None:
        super().__init__()
        self.config = config
        self.precision: Precision = "float32"
        self.metadata = metadata
        self.embedding = nn.Embedding(config.vocabulary_size, config.d_model)
        self.encoder = Stack(config, decoder=False)
        self.decoder = Stack(config, decoder=True)
        self.head = None if config.tied_head else Linear(config.d_model, config.vocabulary_size)
        self.project: Callable[[Tensor, Tensor], Tensor] = linear
        if self.embedding.weight.device.type != "meta":
            Initialiser.of(config).fill(self)

    def forward(
        self,
        inputs_BS: Tensor,
        decoder_inputs_BT: Tensor,
        input_segments_BS: Tensor | None = None,
        target_segments_BT: Tensor | None = None,
    ) -> ModelOutput:
        """Return logits for every target position, and the routing.

        inputs_BS: int64.
        decoder_inputs_BT: int64, the targets shifted right (`shift_right`).
        input_segments_BS, target_segments_BT: int, 0 at padding; None where rows are full and hold
            one example.
        """
        encoded_BSD, encoder_routing = self.encode(inputs_BS, input_segments_BS)
        output = self.decode(
            decoder_inputs_BT,
            encoded_BSD,
            input_segments_BS=input_segments_BS,
            target_segments_BT=target_segments_BT,
        )
        return dataclasses.replace(output, encoder_routing=encoder_routing)

    def encode(
        self, inputs_BS: Tensor, segments_BS: Tensor | None = None
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """Return encoded_BSD and the encoder's routing."""
        encoded_BSD, routing = self.encoder(self.encoder_inputs(inputs_BS, segments_BS))
        return encoded_BSD, routing

    def embed(self, inputs: Tensor) -> Tensor:
        """Return the embeddings of token ids; what is floating is one already, [..., D]."""
        return inputs if inputs.is_floating_point() else self.embedding(inputs)

    def encoder_inputs(self, inputs_BS: Tensor, segments_BS: Tensor | None = None) -> StackInputs:
        """Return the inputs of the encoder, from ids or from embeddings."""
        stack = self.encoder
        position_S = torch.arange(inputs_BS.shape[1], device=inputs_BS.device)
        bias = stack.relative_bias(position_S, position_S)
        mask_BS = None
        if segments_BS is not None:
            bias = masked(bias, segment_mask(segments_BS, segments_BS))
            mask_BS = segments_BS != 0
        x_BSD = stack.dropout(self.embed(inputs_BS))
        return StackInputs(x_BSD=x_BSD, bias=bias, mask_BS=mask_BS)

    def decode(
        self,
        decoder_inputs_BT: Tensor,
        encoded_BSD: Tensor,
        *,
        input_segments_BS: Tensor | None = None,
        target_segments_BT: Tensor | None = None,
        cache: DecodingCache | None = None,
    ) -> ModelOutput:
        """Return the logits of the decoder and its routing.

        With a cache the tokens follow those already in it.
        """
        inputs = self.decoder_inputs(
            decoder_inputs_BT,
            input_segments_BS=input_segments_BS,
            target_segments_BT=target_segments_BT,
            cache=cache,
        )
        x_BTD, routing = self.decoder(inputs, encoded_BSD, cache)
        return ModelOutput(
            logits_BTV=self.logits(x_BTD), encoder_routing=(), decoder_routing=routing
        )

    def decoder_inputs(
        self,
        decoder_inputs_BT: Tensor,
        *,
        input_segments_BS: Tensor | None = None,
        target_segments_BT: Tensor | None = None,
        cache: DecodingCache | None = None,
    ) -> StackInputs:
        """Return the inputs of the decoder, without the encoder's output.

        decoder_inputs_BT: ids or embeddings.
        target_segments_BT: with a cache, of all its places, [B, M].
        """
        stack = self.decoder
        if cache is None:
            query_positions = key_positions = torch.arange(
                decoder_inputs_BT.shape[1], device=decoder_inputs_BT.device
            )
        else:
            query_positions, key_positions = cache.positions(decoder_inputs_BT.shape[1])
        allowed = (key_positions <= query_positions[..., None]).unsqueeze(-3)
        mask_BT = None
        if target_segments_BT is not None:
            new_segments_BT = target_segments_BT
            if cache is not None:
                new_segments_BT = target_segments_BT[:, query_positions]
            allowed = allowed & segment_mask(new_segments_BT, target_segments_BT)
            target_segments_BT = new_segments_BT
            mask_BT = target_segments_BT != 0
        return StackInputs(
            x_BSD=stack.dropout(self.embed(decoder_inputs_BT)),
            bias=masked(stack.relative_bias(query_positions, key_positions), allowed),
            mask_BS=mask_BT,
            memory_bias=_memory_bias(input_segments_BS, target_segments_BT),
        )

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Return logits_BTV of the decoder's output."""
        if self.head is None or self.config.scaled_head:
            x_BTD = x_BTD * self.config.d_model**-0.5
        weight = self.embedding.weight if self.head is None else self.head.weight
        return self.project(x_BTD, weight)


def forward_batch(model: nn.Module, batch: Batch) -> ModelOutput:
    """Return the output of a SwitchTransformer for a batch, in the model's precision.

    The decoder reads earlier targets.
    """
    about = cast(SwitchTransformer, model)
    decoder_inputs_BT = shift_right(
        batch.targets_BT, batch.target_segments_BT, about.config.start_id
    )
    with computing(about.precision, batch.inputs_BS.device):
        output: ModelOutput = model(
            batch.inputs_BS, decoder_inputs_BT, batch.input_segments_BS, batch.target_segments_BT
        )
    return output


def shift_right(targets_BT: Tensor, segments_BT: Tensor | None, start_id: int) -> Tensor:
    """Return the decoder's inputs: targets one place later, each segment led by `start_id`."""
    shifted_BT = torch.nn.functional.pad(targets_BT, (1, 0), value=start_id)[:, :-1]
    if segments_BT is None:
        return shifted_BT
    starts_BT = torch.nn.functional.pad(segments_BT, (1, 0))[:, :-1] != segments_BT
    return shifted_BT.masked_fill(starts_BT, start_id)


def _memory_bias(input_segments: Tensor | None, target_segments: Tensor | None) -> Tensor | None:
    """Return the bias of cross-attention; None where every target may see every input."""
    if input_segments is None:
        return None
    if target_segments is None:
        # One example per row: every target belongs to the row's only segment.
        allowed = (input_segments != 0)[:, None, None, :]
    else:
        allowed = segment_mask(target_segments, input_segments)
    return masked(torch.zeros((), device=allowed.device), allowed)
