"""The fields of a Hugging Face config.json, as transformers and this package use them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from switchlm.checkpoint.names import Family
from switchlm.model.config import Initialisation, RouterConfig
from switchlm.model.semantics import Semantics

Report = Callable[[str], None]

EXTRA_KEY = "switchlm"
ARCHITECTURES: dict[Family, str] = {
    "switch": "SwitchTransformersForConditionalGeneration",
    "t5": "T5ForConditionalGeneration",
}


@dataclass(frozen=True, kw_only=True)
class Fields:
    """The fields of config.json that are read; the defaults are SwitchTransformersConfig's."""

    vocab_size: int = 32128
    d_model: int = 768
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 12
    num_decoder_layers: int | None = 12
    num_heads: int = 12
    num_experts: int = 8
    num_sparse_encoder_layers: int = 3
    num_sparse_decoder_layers: int = 3
    encoder_sparse_step: int | None = None
    decoder_sparse_step: int | None = None
    expert_capacity: int = 64
    router_bias: bool = False
    router_jitter_noise: float = 0.01
    router_z_loss_coef: float = 0.001
    router_aux_loss_coef: float = 0.001
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    dense_act_fn: str = "relu"
    feed_forward_proj: str | None = None
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool | None = None
    pad_token_id: int | None = 0
    eos_token_id: Any = 1
    decoder_start_token_id: int | None = None


@dataclass(frozen=True, kw_only=True)
class Extra:
    """What transformers has no field for, kept in config.json under the key `switchlm`."""

    sparse_step: int = 2
    decoder_sparse_step: int | None = None
    attention_experts: bool = False
    initialisation: Initialisation = field(default_factory=Initialisation)
    expert_dropout: float = 0.0
    router: RouterConfig = field(default_factory=RouterConfig)


def sparse_layers(step: int, num_layers: int, semantics: Semantics) -> frozenset[int]:
    """Return which layers are sparse under that step; 0 is none."""
    if step <= 0:
        return frozenset()
    return frozenset(range(semantics.first_sparse_layer(step), num_layers, step))
