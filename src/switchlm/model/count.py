"""Parameters and FLOPs of a model, from its configuration alone."""

import torch

from switchlm.model.config import ModelConfig


def parameters(config: ModelConfig) -> int:
    """Return the number of parameters, experts included."""
    return _parameters(config, experts_per_layer=config.num_experts)


def active_parameters(config: ModelConfig) -> int:
    """Return the parameters that one token uses: one expert per Switch layer (or top-k)."""
    return _parameters(config, experts_per_layer=config.router.experts_per_token)


def flops_per_token(config: ModelConfig, input_length: int, target_length: int) -> float:
    """Return forward FLOPs (2 per multiply-add) per token, over one row of inputs and targets.

    Counts matmuls: projections, attention scores and sums, FFNs, routers and the head.
    Multiply by 3 for forward and backward.
    """
    width = config.num_heads * config.d_kv
    project = 2 * config.d_model * width
    feedforward = 2 * config.d_model * config.d_ff * (3 if config.gated else 2)
    router = 2 * config.d_model * config.num_experts
    chosen = config.router.experts_per_token
    head = 2 * config.d_model * config.vocabulary_size

    def attend(queries: int, keys: int) -> int:
        """Scores and weighted sums."""
        return queries * keys * 4 * width

    def self_attention(tokens: int, sparse: bool) -> int:
        if sparse and config.attention_experts:
            # Queries, shared keys and values: a Switch layer each; outputs.
            return tokens * (2 * (router + chosen * project) + project) + attend(tokens, tokens)
        return tokens * 4 * project + attend(tokens, tokens)

    def stack(tokens: int, decoder: bool) -> int:
        total = 0
        for layer in range(config.num_decoder_layers if decoder else config.num_encoder_layers):
            sparse = config.is_sparse(layer, decoder=decoder)
            total += self_attention(tokens, sparse)
            total += tokens * (router + chosen * feedforward if sparse else feedforward)
        return total

    source, target = input_length, target_length
    cross = target * 2 * project + source * 2 * project + attend(target, source)
    decoder = stack(target, True) + config.num_decoder_layers * cross + target * head
    return (stack(source, False) + decoder) / (source + target)


def _parameters(config: ModelConfig, experts_per_layer: int) -> int:
    """Count the parameters of the model itself, on the meta device, and scale the experts."""
    from switchlm.model.transformer import SwitchTransformer

    with torch.device("meta"):
        model = SwitchTransformer(config)
    total = 0
    for name, parameter in model.named_parameters():
        size = parameter.numel()
        if ".experts." in name:
            size = size // parameter.shape[0] * experts_per_layer
        total += size
    return total
