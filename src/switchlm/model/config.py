"""The configuration of a model: its shape, and how its routers decide."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any, Literal

from switchlm.config import check_choices
from switchlm.errors import ConfigError
from switchlm.model.semantics import SEMANTICS, Mode, Semantics

Activation = Literal["relu", "gelu"]
LARGEST = 2**31  # limit of every dimension, against absurd allocations


def _require(
    section: object, where: str, names: Sequence[str], fits: Callable[[float], bool], what: str
) -> None:
    """Raise ConfigError for the first of the fields `names` whose value is set and does not fit."""
    for name in names:
        value = getattr(section, name)
        if value is not None and not fits(value):
            raise ConfigError(f"{where}.{name} must {what}, got {value}.")


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How tokens are routed to experts.

    mode: which implementation's semantics (see semantics.py).
    capacity_factor, evaluation_capacity_factor: capacity = tokens / experts * factor; None is
        dropless: no token is dropped.
    expert_capacity: an absolute capacity per group, instead of the factors (`hf` checkpoints: 64).
    min_capacity: the least capacity; None leaves it to the mode.
    group_rows: the number of rows of a batch that share capacity and a balance loss; None leaves it
        to the mode, which splits the rows of one process (`paper`, `t5x`). With a number that
        divides the rows of every process, routing does not depend on the number of processes.
    experts_per_token: 1 as in the paper; more is the MoE of Shazeer et al. 2017, its gates
        renormalised.
    selection: `token` lets tokens choose experts; `expert_choice` lets the encoder's experts choose
        their tokens (Zhou et al. 2022); in the decoder, which is causal, tokens choose.
    exploration: of the router, in training only (appendix C). `jitter` multiplies its input
        by U(1 - eps, 1 + eps), eps = `exploration_rate`; `input_dropout` drops with that rate;
        `sample` draws the expert from the softmax; `argmax` does nothing.
    exploration_rate: of `jitter` and `input_dropout`.
    reroute_overflow: No-token-left-behind (appendix B): overflow goes to the next best expert.
    balance: `loss` (equations 4 to 6), `bias` (a selection bias updated by load, no loss), `none`.
    balance_weight, z_weight: coefficients of the balance loss and of the router z-loss.
    bias_rate: how far `bias` moves each expert's bias per step.
    """

    mode: Mode = "paper"
    capacity_factor: float | None = 1.25
    evaluation_capacity_factor: float | None = 2.0
    expert_capacity: int | None = None
    min_capacity: int | None = None
    group_rows: int | None = None
    experts_per_token: int = 1
    selection: Literal["token", "expert_choice"] = "token"
    exploration: Literal["jitter", "argmax", "sample", "input_dropout"] = "jitter"
    exploration_rate: float = 0.01
    reroute_overflow: bool = False
    balance: Literal["loss", "bias", "none"] = "loss"
    balance_weight: float = 0.01
    z_weight: float = 0.0
    bias_rate: float = 0.001

    def __post_init__(self) -> None:
        check_choices(self, "router")
        require = partial(_require, self, "router")
        capacities = ("capacity_factor", "evaluation_capacity_factor", "expert_capacity")
        require(capacities, lambda value: value > 0, "be positive or null (dropless)")
        sizes = ("min_capacity", "group_rows", "expert_capacity")
        require(sizes, lambda value: 1 <= value < LARGEST, "be at least 1 and below 2^31, or null")
        require(("exploration_rate",), lambda value: 0 <= value < 1, "lie in [0, 1)")
        require(("experts_per_token",), lambda value: value >= 1, "be at least 1")
        if self.experts_per_token > 1 and (self.reroute_overflow or self.exploration == "sample"):
            raise ConfigError(
                "router.reroute_overflow and router.exploration=sample are defined for one expert "
                f"per token; router.experts_per_token is {self.experts_per_token}."
            )
        if self.reroute_overflow and self.dropless:
            raise ConfigError("router.reroute_overflow needs a capacity; set a capacity factor.")

    @property
    def semantics(self) -> Semantics:
        """The named semantics, with this configuration's own minimum capacity."""
        semantics = SEMANTICS[self.mode]
        if self.min_capacity is None:
            return semantics
        return dataclasses.replace(semantics, min_capacity=self.min_capacity)

    @property
    def dropless(self) -> bool:
        """Whether no token is ever dropped, in training and in evaluation."""
        factors = (self.capacity_factor, self.evaluation_capacity_factor, self.expert_capacity)
        return all(value is None for value in factors)


@dataclass(frozen=True, kw_only=True)
class Initialisation:
    """How parameters are drawn before training; the defaults are T5X's (section 2.4).

    scale: s in std = sqrt(s / fan_in), of attention, FFNs, experts and an untied head; 0.1 is the
        paper's choice, 1.0 what it compares with (Table 3).
    embedding_std: standard deviation of the embedding. T5 draws N(0, 1), with which a tied head
        repeats its input token at first, and which AdamW changes by 1% per step while it overwrites
        the queries in two. 0.3 is good for small models.
    router_std: standard deviation of router weights. T5X draws N(0, 0.02) whatever the width:
        logits of std 0.55 at d_model 768, but of 0.11 at 32, where every gate starts at 1 / E.
        0.5 is good for small models; transformers' own Switch Transformers use 1.0.
    positions: initial relative position biases. `uniform` is T5X's: small random numbers, so that
        attention is even over all positions. `local` adds a preference of each head for one small
        offset, so that attention is a convolution at first (d'Ascoli et al. 2021, ConViT). Small
        models otherwise have a plateau until they attend to neighbours (Gopalani & Hu 2025). See
        `local_bias` in initialise.py.
    """

    scale: float = 0.1
    embedding_std: float = 1.0
    router_std: float = 0.02
    positions: Literal["uniform", "local"] = "uniform"

    def __post_init__(self) -> None:
        check_choices(self, "model.initialisation")
        names = ("scale", "embedding_std", "router_std")
        _require(self, "model.initialisation", names, lambda value: 0 < value < inf, "be positive")


def upgrade_model_section(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `model` section with keys of earlier versions under their present names."""
    values = dict(values)
    if "initialisation_scale" in values:
        scale = values.pop("initialisation_scale")
        values["initialisation"] = {"scale": scale, **(values.get("initialisation") or {})}
    return values


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a T5-style encoder-decoder, dense or sparse.

    T5 v1.0 is `activation=relu, gated=false, tied_head=true`; v1.1 is `gelu, true, false`.

    vocabulary_size: number of ids, special tokens and sentinels included; in a run the tokenizer's.
    d_model: the width of the residual stream.
    d_ff: the hidden width of FFNs, and of each expert.
    d_kv, num_heads: the width of an attention head, and the number of heads.
    num_encoder_layers, num_decoder_layers: blocks of each stack.
    num_experts: 0 is the dense model: the FLOP-matched twin of every sparse one of the same shape.
    sparse_step: every n-th layer is a Switch layer; 1 makes every layer one, 0 none.
    decoder_sparse_step: the same for the decoder; None is sparse_step.
    attention_experts: queries, and keys and values, are Switch layers too (appendix A).
    initialisation: how parameters are drawn before training.
    activation, gated: of FFNs and experts; a gated one is act(gate(x)) * up(x).
    tied_head: whether the output projection is the embedding, scaled by d_model^-0.5.
    scaled_head: whether one of its own is scaled too.
    relative_buckets: number of relative position biases per head.
    relative_distance: the distance from which all positions share a bias.
    norm_epsilon: added to the mean square in RMSNorm.
    dropout, expert_dropout: rates; expert_dropout acts inside experts only (section 2.4).
    pad_id, end_id: the ids of padding and of the token that ends texts.
    decoder_start_id: the id that decoder inputs begin with; None is pad_id.
    generation_start_id, generation_end_ids: those of generated outputs, any of which ends one, if
        they are others than in training.
    """

    vocabulary_size: int = 32128
    d_model: int = 768
    d_ff: int = 3072
    d_kv: int = 64
    num_heads: int = 12
    num_encoder_layers: int = 12
    num_decoder_layers: int = 12
    num_experts: int = 0
    sparse_step: int = 2
    decoder_sparse_step: int | None = None
    attention_experts: bool = False
    activation: Activation = "relu"
    gated: bool = False
    tied_head: bool = True
    scaled_head: bool = False
    relative_buckets: int = 32
    relative_distance: int = 128
    norm_epsilon: float = 1e-6
    initialisation: Initialisation = dataclasses.field(default_factory=Initialisation)
    dropout: float = 0.0
    expert_dropout: float = 0.0
    pad_id: int = 0
    end_id: int = 1
    decoder_start_id: int | None = None
    generation_start_id: int | None = None
    generation_end_ids: tuple[int, ...] = ()
    router: RouterConfig = dataclasses.field(default_factory=RouterConfig)

    def __post_init__(self) -> None:
        check_choices(self, "model")
        require = partial(_require, self, "model")
        size = self.vocabulary_size
        widths = ("vocabulary_size", "d_model", "d_ff", "d_kv", "num_heads")
        sizes = (*widths, "num_encoder_layers", "num_decoder_layers")
        require(sizes, lambda value: 1 <= value < LARGEST, "be at least 1 and below 2^31")
        ids = f"be one of the {size} ids of the vocabulary"
        tokens = ("pad_id", "end_id", "decoder_start_id", "generation_start_id")
        require(tokens, lambda value: 0 <= value < size, ids)
        if not all(0 <= value < size for value in self.generation_end_ids):
            found = list(self.generation_end_ids)
            raise ConfigError(f"model.generation_end_ids must {ids}, got {found}.")
        steps = ("sparse_step", "decoder_sparse_step")
        require(steps, lambda value: 0 <= value < LARGEST, "lie in 0..2^31 - 1")
        require(("num_experts",), lambda value: 0 <= value <= 65536, "lie in 0..65536")
        require(("dropout", "expert_dropout"), lambda value: 0 <= value < 1, "lie in [0, 1)")
        if not 4 <= self.relative_buckets < 2 * self.relative_distance < LARGEST:
            raise ConfigError(
                "model.relative_buckets must be at least 4 and below twice the relative_distance, "
                f"got {self.relative_buckets} and {self.relative_distance}."
            )
        if self.num_experts and self.router.experts_per_token > self.num_experts:
            raise ConfigError(
                f"router.experts_per_token is {self.router.experts_per_token}, but there are only "
                f"{self.num_experts} experts (model.num_experts)."
            )

    @property
    def start_id(self) -> int:
        """The id that decoder inputs begin with."""
        return self.pad_id if self.decoder_start_id is None else self.decoder_start_id

    @property
    def first_id(self) -> int:
        """The id that generated outputs begin with."""
        return self.start_id if self.generation_start_id is None else self.generation_start_id

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a generated output."""
        return self.generation_end_ids or (self.end_id,)

    def sparse_step_of(self, *, decoder: bool) -> int:
        """The sparse step of that stack; 0 where it has no Switch layers."""
        if self.num_experts == 0:
            return 0
        if decoder and self.decoder_sparse_step is not None:
            return self.decoder_sparse_step
        return self.sparse_step

    def is_sparse(self, layer: int, *, decoder: bool = False) -> bool:
        """Whether layer `layer` (from 0) of that stack is a Switch layer."""
        step = self.sparse_step_of(decoder=decoder)
        return step > 0 and layer % step == self.router.semantics.first_sparse_layer(step)

    def dense_twin(self) -> "ModelConfig":
        """The dense model of equal FLOPs per token: every Switch layer becomes one FFN."""
        return dataclasses.replace(self, num_experts=0, attention_experts=False)
