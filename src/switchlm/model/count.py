"""Parameters and FLOPs of a model, from its configuration alone."""

import torch

from switchlm.model.config import ModelConfig


def parameters(config: ModelConfig) -> int:
    """Return the number of parameters, experts included."""
    return _parameters(config, experts_a_layer=config.num_experts)


def active_parameters(config: ModelConfig) -> int:
    """Return the parameters that one token uses: one expert a Switch layer (or top-k)."""
    return _parameters(config, experts_a_layer=config.router.experts_per_token)


def flops_per_token(config: ModelConfig, input_length: int, target_length: int) -> float:
    """Return forward FLOPs (2 a multiply-add) a token, over one row of inputs and targets.

    Counts matrix products: projections, attention scores and sums, FFNs, routers and the head.
    Multiply by 3 for forward and backward.
    """
    width = config.num_heads * config.d_kv
    project = 2 * config.d_model * width
    feedforward = 2 * config.d_model * config.d_ff * (3 if config.gated else 2)
    head = 2 * config.d_model * config.vocabulary_size

    def attention(queries: int, keys: int) -> int:
        """Queries and outputs, keys and values, then scores and weighted sums."""
        return queries * 2 * project + keys * 2 * project + queries * keys * 4 * width

    def feedforwards(num_layers: int, decoder: bool) -> int:
        sparse = sum(config.is_sparse(layer, decoder=decoder) for layer in range(num_layers))
        routers = sparse * 2 * config.d_model * config.num_experts
        chosen = config.router.experts_per_token
        return (num_layers - sparse + sparse * chosen) * feedforward + routers

    source, target = input_length, target_length
    encoder = config.num_encoder_layers * attention(source, source)
    encoder += source * feedforwards(config.num_encoder_layers, False)
    decoder = config.num_decoder_layers * (attention(target, target) + attention(target, source))
    decoder += target * (feedforwards(config.num_decoder_layers, True) + head)
    return (encoder + decoder) / (source + target)


def _parameters(config: ModelConfig, experts_a_layer: int) -> int:
    """Count on the meta device, then scale the experts: the model itself is the only source."""
    from switchlm.model.transformer import SwitchTransformer

    with torch.device("meta"):
        model = SwitchTransformer(config)
    total = 0
    for name, parameter in model.named_parameters():
        size = parameter.numel()
        if ".experts." in name:
            size = size // parameter.shape[0] * experts_a_layer
        total += size
    return total
