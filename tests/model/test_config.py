from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchlm.config import from_mapping, to_mapping
from switchlm.errors import ConfigError
from switchlm.model.config import ModelConfig, RouterConfig, upgrade_model_section

router_options = st.fixed_dictionaries(
    {},
    optional={
        "mode": st.sampled_from(["paper", "t5x", "hf"]),
        "capacity_factor": st.none() | st.floats(0.1, 8),
        "evaluation_capacity_factor": st.none() | st.floats(0.1, 8),
        "expert_capacity": st.none() | st.integers(1, 512),
        "min_capacity": st.none() | st.integers(1, 8),
        "experts_per_token": st.integers(1, 4),
        "selection": st.sampled_from(["token", "expert_choice"]),
        "exploration": st.sampled_from(["jitter", "argmax", "input_dropout"]),
        "exploration_rate": st.floats(0, 0.5),
        "balance": st.sampled_from(["loss", "bias", "none"]),
        "z_weight": st.floats(0, 1),
    },
)
model_options = st.fixed_dictionaries(
    {"router": router_options},
    optional={
        "d_model": st.integers(1, 4096),
        "num_experts": st.integers(4, 64),
        "sparse_step": st.integers(0, 4),
        "decoder_sparse_step": st.none() | st.integers(0, 4),
        "activation": st.sampled_from(["relu", "gelu"]),
        "gated": st.booleans(),
        "tied_head": st.booleans(),
        "dropout": st.floats(0, 0.9),
    },
)


@given(model_options)
def test_round_trip_through_a_mapping(options: dict[str, Any]) -> None:
    config = from_mapping(ModelConfig, options)
    assert from_mapping(ModelConfig, to_mapping(config)) == config
    for name, value in options["router"].items():
        assert getattr(config.router, name) == value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity_factor": 0.0}, r"router.capacity_factor must be positive .* got 0.0"),
        ({"expert_capacity": -1}, r"router.expert_capacity must be positive"),
        ({"min_capacity": -1}, r"router.min_capacity must be at least 1 and below 2\^31, or null"),
        ({"group_rows": 2**31}, r"router.group_rows must be at least 1 and below 2\^31, or null"),
        ({"exploration_rate": 1.0}, r"exploration_rate must lie in \[0, 1\), got 1.0"),
        ({"experts_per_token": 0}, r"experts_per_token must be at least 1, got 0"),
        ({"experts_per_token": 2, "reroute_overflow": True}, r"defined for one expert"),
        ({"experts_per_token": 2, "exploration": "sample"}, r"defined for one expert"),
        (
            {
                "reroute_overflow": True,
                "capacity_factor": None,
                "evaluation_capacity_factor": None,
            },
            r"reroute_overflow needs a capacity",
        ),
        ({"mode": "mtf"}, r"router.mode is 'mtf'.*Known: hf, paper, t5x"),
        ({"jitter": 0.1}, r"Unknown configuration key 'router.jitter'"),
    ],
)
def test_a_bad_router_says_what_to_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(RouterConfig, options, "router")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 0}, r"model.d_model must be at least 1 and below 2\^31, got 0"),
        ({"d_model": 10**12}, r"model.d_model must be"),
        ({"num_experts": 10**9}, r"model.num_experts must lie in 0..65536, got 1000000000"),
        ({"dropout": 1.5}, r"model.dropout must lie in \[0, 1\), got 1.5"),
        ({"initialisation": {"scale": 0.0}}, r"model.initialisation.scale must be positive"),
        ({"initialisation": {"router_std": -1}}, r"router_std must be positive, got -1"),
        ({"initialisation": {"positions": "locale"}}, r"Did you mean 'local'"),
        ({"relative_buckets": 2}, r"relative_buckets must be at least 4"),
        ({"relative_buckets": 64, "relative_distance": 32}, r"below twice the relative_distance"),
        ({"pad_id": 32128}, r"model.pad_id must be one of the 32128 ids"),
        ({"sparse_step": -1}, r"model.sparse_step must lie in 0"),
        ({"num_experts": 2, "router": {"experts_per_token": 3}}, r"only 2 experts"),
        ({"num_exprets": 2}, r"'model.num_exprets'. Did you mean 'num_experts'\?"),
    ],
)
def test_a_bad_model_says_what_to_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(ModelConfig, options, "model")


def test_dropless_means_never_dropping() -> None:
    assert not RouterConfig().dropless
    assert not RouterConfig(capacity_factor=None).dropless, "evaluation still has a capacity"
    nothing = {"capacity_factor": None, "evaluation_capacity_factor": None}
    assert RouterConfig(**nothing).dropless
    assert not RouterConfig(**nothing, expert_capacity=64).dropless


def test_the_dense_twin_keeps_the_shape() -> None:
    config = ModelConfig(num_experts=8, attention_experts=True)
    twin = config.dense_twin()
    assert not any(twin.is_sparse(layer) for layer in range(12))
    changed = {k for k, v in to_mapping(config).items() if v != to_mapping(twin)[k]}
    assert changed == {"num_experts", "attention_experts"}


def test_sections_of_earlier_versions_are_read() -> None:
    old = {"d_model": 64, "initialisation_scale": 0.3}
    assert upgrade_model_section(old) == {"d_model": 64, "initialisation": {"scale": 0.3}}
    new = {"initialisation": {"router_std": 0.5}}
    assert upgrade_model_section(new) == new
