"""Convert config.json to ModelConfig and back.

Missing fields have the defaults of transformers. Where config.json and the weights disagree on
layers, sparse layers, experts, gating or the head, the weights decide and the repair is reported.
Nothing in the file is imported or run: `auto_map` is ignored.
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from switchlm.config import from_mapping, to_mapping
from switchlm.errors import CheckpointError, ConfigError
from switchlm.files import Report
from switchlm.huggingface.match import Architecture
from switchlm.huggingface.metadata import token_ids
from switchlm.huggingface.names import STACKS, Family
from switchlm.model.config import (
    Initialisation,
    ModelConfig,
    RouterConfig,
    upgrade_model_section,
)
from switchlm.model.semantics import SEMANTICS, Semantics

EXTRA_KEY = "switchlm"
MODEL_TYPES: dict[str, Family] = {"switch_transformers": "switch", "t5": "t5", "mt5": "t5"}
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
    model_type: str = ""
    transformers_version: str | None = None
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool | None = None
    pad_token_id: Any = 0
    eos_token_id: Any = 1
    bos_token_id: Any = None
    decoder_start_token_id: Any = None

    @property
    def decoder_layers(self) -> int:
        return self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers


@dataclass(frozen=True, kw_only=True)
class Extra:
    """Fields of ModelConfig that transformers does not have, under the key `switchlm`."""

    sparse_step: int = 2
    decoder_sparse_step: int | None = None
    attention_experts: bool = False
    initialisation: Initialisation = field(default_factory=Initialisation)
    expert_dropout: float = 0.0
    router: RouterConfig = field(default_factory=RouterConfig)


def sparse_layers(step: int, num_layers: int, semantics: Semantics) -> frozenset[int]:
    """Return the sparse layers for a sparse step; step 0: none."""
    if step <= 0:
        return frozenset()
    return frozenset(range(semantics.first_sparse_layer(step), num_layers, step))


_T5_DEFAULTS: dict[str, Any] = {
    "d_model": 512,
    "num_heads": 8,
    "num_layers": 6,
    "num_decoder_layers": None,
    "num_experts": 0,
}
_MT5_DEFAULTS: dict[str, Any] = {
    "vocab_size": 250112,
    "d_ff": 1024,
    "num_layers": 8,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
    "tie_word_embeddings": False,
}
_DEFAULTS = {"t5": _T5_DEFAULTS, "mt5": _T5_DEFAULTS | _MT5_DEFAULTS}
# transformers calls the tanh approximation, which T5 uses, gelu_new.
_ACTIVATIONS: dict[str, Literal["relu", "gelu"]] = {
    "relu": "relu",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
}


def read_config(
    values: Mapping[str, Any],
    found: Architecture,
    head_differs: Callable[[], bool],
    report: Report,
    generation: Mapping[str, Any] | None = None,
) -> tuple[ModelConfig, Family]:
    """Return the configuration and the family of a model.

    values: the content of config.json.
    found: the architecture inferred from the weights.
    head_differs: returns whether the head in the weights differs from the embedding.
    report: called with a message for every repair.
    generation: the content of generation_config.json, which decides where outputs begin and end.

    Raises CheckpointError for a model that is not supported.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise CheckpointError(
            f"config.json has model_type {str(kind)[:80]!r}; this reads {', '.join(MODEL_TYPES)}."
        )
    family = MODEL_TYPES[kind]
    known = {item.name for item in fields(Fields)}
    given = {key: value for key, value in values.items() if key in known}
    defaults = _DEFAULTS.get(kind, {})
    try:
        claim = from_mapping(Fields, {**defaults, **given}, "config.json")
        if EXTRA_KEY in values:
            section = values[EXTRA_KEY]
            if isinstance(section, Mapping):
                section = upgrade_model_section(section)
            extra = from_mapping(Extra, section, f"config.json.{EXTRA_KEY}")
            first, second = extra.sparse_step, extra.decoder_sparse_step
            second = first if second is None else second
            claim = replace(claim, encoder_sparse_step=first, decoder_sparse_step=second)
        else:
            extra = Extra(router=_router(claim), expert_dropout=claim.dropout_rate)
        config = _translate(claim, extra, generation or {}, found, family, head_differs, report)
    except ConfigError as error:
        raise CheckpointError(f"Cannot use this config.json: {error}") from None
    return config, found.family or family


def _translate(
    claim: Fields,
    extra: Extra,
    generation: Mapping[str, Any],
    found: Architecture,
    family: Family,
    head_differs: Callable[[], bool],
    report: Report,
) -> ModelConfig:
    if claim.router_bias:
        raise CheckpointError("config.json sets router_bias; routers here have no bias.")
    num_experts = _num_experts(claim, found, report)
    tied_head, scaled_head = _head(claim, found, head_differs, report)
    gated, activation = _feedforward(claim, found, family, report)
    if num_experts:
        step, second = _sparse_steps(claim, extra, found, report)
        extra = replace(extra, sparse_step=step, decoder_sparse_step=second)
    return ModelConfig(
        vocabulary_size=claim.vocab_size,
        d_model=claim.d_model,
        d_ff=claim.d_ff,
        d_kv=claim.d_kv,
        num_heads=claim.num_heads,
        num_encoder_layers=_layers("encoder", claim.num_layers, found, report),
        num_decoder_layers=_layers("decoder", claim.decoder_layers, found, report),
        num_experts=num_experts,
        activation=activation,
        gated=gated,
        tied_head=tied_head,
        scaled_head=scaled_head,
        relative_buckets=claim.relative_attention_num_buckets,
        relative_distance=claim.relative_attention_max_distance,
        norm_epsilon=claim.layer_norm_epsilon,
        dropout=claim.dropout_rate,
        **vars(extra),
        **token_ids(
            claim.pad_token_id,
            claim.eos_token_id,
            claim.decoder_start_token_id,
            claim.bos_token_id,
            generation,
            claim.vocab_size,
        ),
    )


def _router(claim: Fields) -> RouterConfig:
    return RouterConfig(
        mode="hf",
        capacity_factor=None,
        evaluation_capacity_factor=None,
        expert_capacity=claim.expert_capacity,
        exploration_rate=claim.router_jitter_noise,
        balance_weight=claim.router_aux_loss_coef,
        z_weight=claim.router_z_loss_coef,
    )


def _layers(stack: str, claimed: int, found: Architecture, report: Report) -> int:
    """Return the larger number of layers; `match` reports those that the weights lack."""
    num_layers = len(found.stacks[stack].layers)
    if num_layers > claimed:
        report(f"config.json says {claimed} {stack} layers; the weights have {num_layers}.")
        return num_layers
    return claimed


def _num_experts(claim: Fields, found: Architecture, report: Report) -> int:
    if found.num_experts > claim.num_experts:
        report(
            f"config.json says {claim.num_experts} experts; the weights have {found.num_experts}."
        )
        return found.num_experts
    all_dense = all(stack.dense == stack.layers for stack in found.stacks.values())
    return 0 if all_dense and not found.num_experts else claim.num_experts


def _feedforward(
    claim: Fields, found: Architecture, family: Family, report: Report
) -> tuple[bool, Literal["relu", "gelu"]]:
    """Return (gated, activation); T5 names both in one string, such as `gated-gelu`."""
    name_given = claim.feed_forward_proj or "relu" if family == "t5" else claim.dense_act_fn
    if found.gated and family == "switch" and claim.feed_forward_proj:
        name_given = claim.feed_forward_proj
    first, _, rest = name_given.partition("-")
    claimed_gated = first == "gated"
    name = rest if claimed_gated else name_given
    if claimed_gated and name == "gelu":
        name = "gelu_new"
    gated = claimed_gated if found.gated is None else found.gated
    if gated != claimed_gated and name == "gelu":
        name = "gelu_new"
    if gated and not claimed_gated and name == "relu":
        report(
            f"config.json says {name_given!r}; the weights have gated feed-forward layers, read as "
            "GEGLU."
        )
        name = "gelu_new"
    if name not in _ACTIVATIONS:
        raise CheckpointError(
            f"The feed-forward activation {name_given[:80]!r} of config.json is not one of "
            f"{', '.join(_ACTIVATIONS)} or gated-gelu."
        )
    return gated, _ACTIVATIONS[name]


def _head(
    claim: Fields, found: Architecture, head_differs: Callable[[], bool], report: Report
) -> tuple[bool, bool]:
    """Return (whether the head is tied, whether one of its own is scaled by d_model^-0.5).

    T5: `scale_decoder_outputs`, or else `tie_word_embeddings`, says whether outputs are scaled;
    weights are tied unless they differ. mT5 is scaled if tied by transformers 4, never by later
    ones. A Switch Transformer is scaled if it is tied.
    """
    kind, scaled = claim.model_type, claim.scale_decoder_outputs
    if scaled is None or kind != "t5":
        scaled = claim.tie_word_embeddings
    if kind == "mt5" and not (claim.transformers_version or "").startswith("4."):
        scaled = False
    if not scaled:
        return False, False
    if found.head_key is None or not head_differs():
        return True, False
    if claim.tie_word_embeddings:
        report(
            f"config.json says that the head is tied to the embedding, but {found.head_key} in the "
            f"weights differs from it; that head is used, {'' if kind == 't5' else 'un'}scaled."
        )
    return False, kind == "t5"


def _sparse_steps(
    claim: Fields, extra: Extra, found: Architecture, report: Report
) -> tuple[int, int | None]:
    """Return the sparse steps of encoder and decoder; None: the decoder's is the same."""
    claims = {
        "encoder": (claim.encoder_sparse_step, claim.num_layers, claim.num_sparse_encoder_layers),
        "decoder": (
            claim.decoder_sparse_step,
            claim.decoder_layers,
            claim.num_sparse_decoder_layers,
        ),
    }
    steps = []
    for stack, (step, num_layers, num_sparse) in claims.items():
        if step is None:
            step = num_layers // num_sparse if num_sparse > 0 else num_layers
        actual = found.stacks[stack]
        fitting = _find_step(
            step, len(actual.layers), extra.router.semantics, actual.sparse, actual.dense
        )
        if fitting is None:
            raise CheckpointError(
                f"The sparse layers of the {stack}, {sorted(actual.sparse)}, are not every n-th "
                "layer; such models are not supported."
            )
        if fitting != step:
            report(
                f"config.json says {stack} sparse step {step}; the sparse layers of the weights "
                f"are {sorted(actual.sparse)}: step {fitting}."
            )
        steps.append(fitting)
    encoder, decoder = steps
    same = encoder == decoder and extra.decoder_sparse_step is None
    return encoder, None if same else decoder


def _find_step(
    first: int, num_layers: int, semantics: Semantics, sparse: Set[int], dense: Set[int]
) -> int | None:
    """Return a sparse step for these sparse and dense layers, `first` if it fits; None: no step."""
    for step in (first, *range(num_layers + 2)):
        layers = sparse_layers(step, num_layers, semantics)
        if step >= 0 and sparse <= layers and not dense & layers:
            return step
    return None


NEVER_DROPS = 2**31 - 1  # transformers has absolute capacities only


def write_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Return the content of config.json; see save.unsupported_features for what it lacks."""
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
        **({"scale_decoder_outputs": True} if config.scaled_head else {}),
        "is_encoder_decoder": True,
        "use_cache": True,
        "pad_token_id": config.pad_id,
        "eos_token_id": config.end_id,
        "decoder_start_token_id": config.start_id,
        "dtype": dtype,
    }
    activation = "relu" if config.activation == "relu" else "gelu_new"
    if family == "t5" or config.gated:
        values["feed_forward_proj"] = f"gated-{config.activation}" if config.gated else activation
    if family == "switch":
        router = config.router
        jitter = router.exploration == "jitter"
        values |= {
            "dense_act_fn": activation,
            "num_experts": config.num_experts,
            "expert_capacity": router.expert_capacity or NEVER_DROPS,
            "router_bias": False,
            "router_dtype": "float32",
            "router_ignore_padding_tokens": False,
            "router_jitter_noise": router.exploration_rate if jitter else 0.0,
            "router_aux_loss_coef": router.balance_weight if router.balance == "loss" else 0.0,
            "router_z_loss_coef": router.z_weight,
            "add_router_probs": False,
        }
        for stack in STACKS:
            values[f"num_sparse_{stack}_layers"] = len(stack_layers(config, stack))
            # transformers computes a step from the number above unless the step itself is given.
            values[f"{stack}_sparse_step"] = transformers_step(config, stack)
    extra = Extra(**{item.name: getattr(config, item.name) for item in fields(Extra)})
    return {**values, EXTRA_KEY: to_mapping(extra)}


def family_of(config: ModelConfig) -> Family:
    """Return the family: T5 for dense models, Switch Transformers for all others."""
    return "switch" if config.num_experts else "t5"


def stack_layers(config: ModelConfig, stack: str) -> frozenset[int]:
    """Return the sparse layers of that stack."""
    decoder = stack == "decoder"
    num_layers = config.num_decoder_layers if decoder else config.num_encoder_layers
    return frozenset(i for i in range(num_layers) if config.is_sparse(i, decoder=decoder))


def transformers_step(config: ModelConfig, stack: str) -> int | None:
    """Return the sparse step with the same sparse layers in transformers; None: there is none."""
    num_layers = config.num_decoder_layers if stack == "decoder" else config.num_encoder_layers
    sparse = stack_layers(config, stack)
    own = config.sparse_step_of(decoder=stack == "decoder")
    dense = frozenset(range(num_layers)) - sparse
    return _find_step(own, num_layers, SEMANTICS["hf"], sparse, dense)
