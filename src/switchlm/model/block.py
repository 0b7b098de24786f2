"""One layer of the encoder or decoder: attention, cross-attention in decoders, feed-forward."""

from torch import Tensor, nn

from switchlm.model.attention import Attention, KeyValueStore, Memory, SwitchAttention
from switchlm.model.config import ModelConfig
from switchlm.model.layers import FeedForward, RMSNorm
from switchlm.model.routing import Routing
from switchlm.model.switch import SwitchFeedForward


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
        bias: Tensor,
        *,
        mask_BS: Tensor | None = None,
        memory: Memory | None = None,
        memory_bias: Tensor | None = None,
        store: KeyValueStore | None = None,
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """Return (x_BSD, the routing of this block's Switch layers).

        bias, memory_bias: added to the scores of self- and cross-attention.
        mask_BS: bool, false at padding.
        memory: the encoder's output, or its keys and values.
        store: a decoding cache.
        """
        x_BSD, routing = self.attend(
            x_BSD, bias, mask_BS=mask_BS, memory=memory, memory_bias=memory_bias, store=store
        )
        x_BSD, switch_routing = self.transform(x_BSD, mask_BS)
        return x_BSD, routing + switch_routing

    def attend(
        self,
        x_BSD: Tensor,
        bias: Tensor,
        *,
        mask_BS: Tensor | None = None,
        memory: Memory | None = None,
        memory_bias: Tensor | None = None,
        store: KeyValueStore | None = None,
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """Run the sublayers of attention; see forward."""
        y_BSD, routing = self.attention(
            self.attention_norm(x_BSD), bias, store=store, mask_BQ=mask_BS
        )
        x_BSD = x_BSD + self.dropout(y_BSD)
        if self.cross_attention is not None and self.cross_attention_norm is not None:
            y_BSD, _ = self.cross_attention(
                self.cross_attention_norm(x_BSD), memory_bias, memory=memory
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
