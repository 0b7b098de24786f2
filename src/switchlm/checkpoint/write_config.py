"""ModelConfig to config.json, readable by transformers as far as it has the words."""

from typing import Any

from switchlm.checkpoint.config_fields import ARCHITECTURES, EXTRA_KEY, Extra, sparse_layers
from switchlm.checkpoint.names import Family
from switchlm.config import to_mapping
from switchlm.model.config import ModelConfig
from switchlm.model.semantics import SEMANTICS

NEVER_DROPS = 2**31 - 1  # transformers knows absolute capacities only


def write_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Return the content of config.json; see limits() for what it cannot say to transformers."""
    family = family_of(config)
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": "switch_transformers" if family == "switch" else "t5",
        "vocab_size": config.vocabulary_size,
        "d_model": config.d_model,
        "d_kv": config.d_kv,
        "d_ff": config.d_ff,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "num_heads": config.num_heads,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_distance,
        "dropout_rate": config.dropout,
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": config.tied_head,
        "is_encoder_decoder": True,
        "use_cache": True,
        "pad_token_id": config.pad_id,
        "eos_token_id": config.end_id,
        "decoder_start_token_id": config.pad_id,
        "dtype": dtype,
    }
    plain = "relu" if config.activation == "relu" else "gelu_new"
    gated = f"gated-{config.activation}"
    if family == "t5" or config.gated:
        values["feed_forward_proj"] = gated if config.gated else plain
    if family == "switch":
        values |= {"dense_act_fn": plain, **_switch_fields(config)}
    extra = Extra(
        sparse_step=config.sparse_step,
        decoder_sparse_step=config.decoder_sparse_step,
        attention_experts=config.attention_experts,
        initialisation=config.initialisation,
        expert_dropout=config.expert_dropout,
        router=config.router,
    )
    return {**values, EXTRA_KEY: to_mapping(extra)}


def _switch_fields(config: ModelConfig) -> dict[str, Any]:
    router = config.router
    values: dict[str, Any] = {
        "num_experts": config.num_experts,
        "expert_capacity": router.expert_capacity or NEVER_DROPS,
        "router_bias": False,
        "router_dtype": "float32",
        "router_ignore_padding_tokens": False,
        "router_jitter_noise": router.exploration_rate if router.exploration == "jitter" else 0.0,
        "router_aux_loss_coef": router.balance_weight if router.balance == "loss" else 0.0,
        "router_z_loss_coef": router.z_weight,
        "add_router_probs": False,
    }
    for stack in ("encoder", "decoder"):
        layers = stack_layers(config, stack)
        values[f"num_sparse_{stack}_layers"] = len(layers)
        # transformers computes a step from the number above unless the step itself is given.
        values[f"{stack}_sparse_step"] = transformers_step(config, stack)
    return values


def family_of(config: ModelConfig) -> Family:
    """Dense models are saved as T5, all others as Switch Transformers."""
    return "switch" if config.num_experts else "t5"


def stack_layers(config: ModelConfig, stack: str) -> frozenset[int]:
    """Return the sparse layers of that stack."""
    decoder = stack == "decoder"
    num_layers = config.num_decoder_layers if decoder else config.num_encoder_layers
    return frozenset(i for i in range(num_layers) if config.is_sparse(i, decoder=decoder))


def transformers_step(config: ModelConfig, stack: str) -> int | None:
    """Return the sparse step that gives transformers the same layers, None if there is none."""
    num_layers = config.num_decoder_layers if stack == "decoder" else config.num_encoder_layers
    wanted = stack_layers(config, stack)
    own = config.sparse_step_of(decoder=stack == "decoder")
    for step in (own, *range(num_layers + 2)):
        if sparse_layers(step, num_layers, SEMANTICS["hf"]) == wanted:
            return step
    return None
