"""config.json against the weights: what is repaired and what is refused."""

import dataclasses
import json
import time
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import switchlm
from switchlm.errors import CheckpointError
from switchlm.huggingface.config import read_config, write_config
from switchlm.huggingface.match import infer_architecture
from switchlm.huggingface.names import entries
from switchlm.model.config import Initialisation, ModelConfig, RouterConfig
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer

HF = RouterConfig(
    mode="hf",
    capacity_factor=None,
    evaluation_capacity_factor=None,
    expert_capacity=64,
    balance_weight=0.001,
    z_weight=0.001,
)
# The file as it was released: 12 decoder layers, no sparse ones, a tied head.
SWITCH_C = {
    "architectures": ["SwitchTransformersForConditionalGeneration"],
    "d_ff": 6144,
    "d_kv": 64,
    "d_model": 2080,
    "decoder_sparse_step": 0,
    "decoder_start_token_id": 0,
    "dense_act_fn": "relu",
    "dropout_rate": 0.1,
    "encoder_sparse_step": 1,
    "expert_capacity": 64,
    "feed_forward_proj": "relu",
    "is_gated_act": False,
    "model_type": "switch_transformers",
    "num_decoder_layers": 12,
    "num_experts": 2048,
    "num_heads": 30,
    "num_layers": 15,
    "num_sparse_decoder_layers": 15,
    "num_sparse_encoder_layers": 15,
    "tie_word_embeddings": True,
    "vocab_size": 32128,
}


def read(values: dict[str, Any], keys: Any, differs: bool = False) -> tuple[ModelConfig, list[str]]:
    said: list[str] = []
    config, _ = read_config(
        values, infer_architecture(dict.fromkeys(keys)), lambda: differs, said.append
    )
    return config, said


def keys_of(config: ModelConfig) -> list[str]:
    family = "switch" if config.num_experts else "t5"
    return [entry.hf_name for entry in entries(config, family)]


def without_extra(config: ModelConfig, **changes: Any) -> dict[str, Any]:
    """Return config.json as transformers would have written it."""
    values = write_config(config, "float32")
    del values["switchlm"]
    return values | changes


def hf(name: str, **changes: Any) -> ModelConfig:
    """Return a model that a config.json of transformers describes in full."""
    plain = {"router": HF, "initialisation": Initialisation()}
    return dataclasses.replace(preset(name), **plain, **changes)


def test_the_released_switch_c_is_repaired_from_its_index():
    truth = hf("switch-c-2048", dropout=0.1, expert_dropout=0.1)
    keys = [key.replace("lm_head", "decoder.lm_head") for key in keys_of(truth)]
    assert len(keys) > 2 * 2048 * 30
    start = time.process_time()
    config, said = read(SWITCH_C, keys, differs=True)
    assert time.process_time() - start < 5
    assert config == truth
    assert len(said) == 3
    assert any("12 decoder layers; the weights have 15" in line for line in said)
    assert any("decoder sparse step 0" in line for line in said)
    assert any("decoder.lm_head.weight" in line for line in said)


def test_a_small_switch_c_loads_from_disk(tmp_path):
    truth = hf("nano", sparse_step=1, tied_head=False, num_decoder_layers=3)
    model = SwitchTransformer(truth)
    switchlm.save(model, None, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["decoder.lm_head.weight"] = tensors.pop("lm_head.weight")
    save_file(tensors, path)
    broken = {"num_decoder_layers": 2, "decoder_sparse_step": 0, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(without_extra(truth, **broken)))
    said: list[str] = []
    again, _ = switchlm.load(tmp_path, report=said.append)
    assert again.config == dataclasses.replace(truth, dropout=0.0)
    assert len(said) == 3
    assert (again.head.weight == model.head.weight).all()


@pytest.mark.parametrize(
    "config",
    [
        hf("switch-base-8"),
        hf("switch-base-256"),
        hf("switch-large-128"),
        hf("switch-xxl-128"),
        hf("switch-c-2048", num_experts=16),
        preset("dense-base"),
        dataclasses.replace(preset("dense-xxl"), num_encoder_layers=2),
    ],
)
def test_released_shapes_need_no_repair(config):
    values = without_extra(config)
    for key in ("encoder_sparse_step", "decoder_sparse_step"):
        values.pop(key, None)  # derived from num_sparse_*_layers then
    found, said = read(values, keys_of(config), differs=True)
    # Without the extra key, dense models have no router configuration.
    assert dataclasses.replace(found, router=config.router) == config
    assert not said


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_layers": 1}, "encoder layers"),
        ({"num_decoder_layers": 1}, "decoder layers"),
        ({"num_experts": 2}, "experts"),
        ({"num_experts": 0}, "experts"),
        ({"encoder_sparse_step": 1}, "encoder sparse step"),
        ({"encoder_sparse_step": -7}, "encoder sparse step"),
        ({"decoder_sparse_step": 0}, "decoder sparse step"),
    ],
)
def test_the_weights_decide(changes, word):
    config = hf("nano")
    found, said = read(without_extra(config, **changes), keys_of(config))
    assert found == config
    assert len(said) == 1
    assert word in said[0]


def test_gating_is_inferred_from_the_weights():
    config = hf("nano", gated=True, activation="gelu")
    values = without_extra(config, dense_act_fn="relu")
    assert read(values, keys_of(config)) == (config, [])
    del values["feed_forward_proj"]
    found, said = read(values, keys_of(config))
    assert found == config
    assert "GEGLU" in said[0]


def test_a_head_equal_to_the_embedding_is_tied():
    config = hf("nano")
    assert read(without_extra(config), [*keys_of(config), "lm_head.weight"]) == (config, [])


def test_router_settings_are_kept():
    router = RouterConfig(mode="t5x", capacity_factor=None, experts_per_token=2, z_weight=0.5)
    config = dataclasses.replace(
        preset("nano"), router=router, expert_dropout=0.4, initialisation=Initialisation(scale=0.3)
    )
    values = json.loads(json.dumps(write_config(config, "float32")))
    assert read(values, keys_of(config)) == (config, [])


def test_a_scale_as_earlier_versions_wrote_it_is_read():
    config = dataclasses.replace(preset("nano"), initialisation=Initialisation(scale=0.3))
    values = json.loads(json.dumps(write_config(config, "float32")))
    del values["switchlm"]["initialisation"]
    values["switchlm"]["initialisation_scale"] = 0.3
    assert read(values, keys_of(config)) == (config, [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type 'bert'"),
        ({"model_type": ["t5"]}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"d_model": "wide"}, r"config\.json\.d_model must be of type int, got 'wide'"),
        ({"d_model": 1e12}, r"d_model must be at least 1 and below 2\^31"),
        ({"d_model": 10**400}, "d_model"),
        ({"d_model": float("nan")}, "d_model"),
        ({"num_experts": 10**9}, r"num_experts must lie in 0\.\.65536"),
        ({"num_layers": 0, "num_decoder_layers": None}, None),
        ({"dropout_rate": 2}, "dropout"),
        ({"router_bias": True}, "router_bias"),
        ({"router_jitter_noise": 7}, "exploration_rate"),
        ({"expert_capacity": 0}, "expert_capacity"),
        ({"relative_attention_num_buckets": 0}, "relative_buckets"),
        ({"relative_attention_max_distance": 10**30}, "relative_distance"),
        ({"dense_act_fn": "silu"}, "activation 'silu'"),
        ({"dense_act_fn": "gelu"}, "activation 'gelu'"),
        ({"tie_word_embeddings": "maybe"}, "tie_word_embeddings"),
        ({"pad_token_id": "x"}, "pad_token_id"),
        ({"eos_token_id": {"a": 1}}, "token id"),
        ({"switchlm": []}, "switchlm must be a mapping"),
        ({"switchlm": {"router": {"mod": "hf"}}}, "Did you mean 'mode'"),
        ({"switchlm": {"sparse_step": "two"}}, "sparse_step must be of type int"),
    ],
)
def test_bad_values_are_named(changes, message):
    config = hf("nano")
    if message is None:
        assert read(without_extra(config, **changes), keys_of(config))[0] == config
        return
    with pytest.raises(CheckpointError, match=message):
        read(without_extra(config, **changes), keys_of(config))


def test_irregular_sparse_layers_are_refused():
    config = hf("nano", num_encoder_layers=3, sparse_step=1)
    middle = [key for key in keys_of(config) if "encoder.block.1.layer.1.mlp" not in key]
    dense = [f"encoder.block.1.layer.1.mlp.{name}.weight" for name in ("wi", "wo")]
    with pytest.raises(CheckpointError, match=r"\[0, 2\], are not every n-th layer"):
        read(without_extra(config), middle + dense)


def test_mixed_families_and_gatings_are_refused():
    keys = keys_of(hf("nano"))
    with pytest.raises(CheckpointError, match="mix the names of T5"):
        read(without_extra(hf("nano")), [*keys, "encoder.block.0.layer.1.DenseReluDense.wi.weight"])
    with pytest.raises(CheckpointError, match="wi_0"):
        read(without_extra(hf("nano")), [*keys, "encoder.block.0.layer.1.mlp.wi_0.weight"])
