"""The table has every tensor of every model, in both formats."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from switchlm.huggingface.names import entries, parse_key
from switchlm.model.config import ModelConfig, RouterConfig
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer

configs = st.builds(
    ModelConfig,
    vocabulary_size=st.just(11),
    d_model=st.just(6),
    d_ff=st.just(10),
    d_kv=st.just(4),
    num_heads=st.just(2),
    num_encoder_layers=st.integers(1, 4),
    num_decoder_layers=st.integers(1, 4),
    num_experts=st.integers(0, 3),
    sparse_step=st.integers(0, 3),
    decoder_sparse_step=st.none() | st.integers(0, 3),
    attention_experts=st.booleans(),
    gated=st.booleans(),
    tied_head=st.booleans(),
    router=st.builds(
        RouterConfig,
        mode=st.sampled_from(["paper", "hf"]),
        balance=st.sampled_from(["loss", "bias"]),
    ),
)


def shapes(config: ModelConfig, family: str) -> dict[str, list[int]]:
    """Return the names and shapes of parameters according to the table."""
    found: dict[str, list[int]] = {}
    for entry in entries(config, family):
        if entry.expert is None:
            assert entry.name not in found
            found[entry.name] = list(entry.shape)
        else:
            found[entry.name] = [entry.expert + 1, *reversed(entry.shape)]
    return found


@given(config=configs, family=st.sampled_from(["switch", "t5"]))
def test_the_table_has_every_tensor_of_the_model(config, family):
    with torch.device("meta"):
        model = SwitchTransformer(config)
    tensors = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes(config, family) == tensors


@given(config=configs, family=st.sampled_from(["switch", "t5"]))
def test_every_key_is_parsed(config, family):
    keys = set()
    for entry in entries(config, family):
        assert entry.hf_name not in keys
        keys.add(entry.hf_name)
        parsed = parse_key(entry.hf_name)
        assert parsed is not None
        assert parsed.expert == entry.expert
        if ".blocks." in entry.name:
            stack, _, layer = entry.name.split(".")[:3]
            assert (parsed.stack, parsed.layer) == (stack, int(layer))
        if parsed.family is not None:
            assert parsed.family == family


@pytest.mark.parametrize(
    ("name", "hf_name"),
    [
        ("embedding.weight", "shared.weight"),
        (
            "encoder.blocks.1.feedforward.router.weight",
            "encoder.block.1.layer.1.mlp.router.classifier.weight",
        ),
        (
            "decoder.blocks.3.feedforward.experts.down",
            "decoder.block.3.layer.2.mlp.experts.expert_7.wo.weight",
        ),
        (
            "decoder.relative_bias.weight",
            "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        ),
        (
            "decoder.blocks.11.cross_attention.value.weight",
            "decoder.block.11.layer.1.EncDecAttention.v.weight",
        ),
    ],
)
def test_the_released_names(name, hf_name):
    found = {entry.hf_name: entry.name for entry in entries(preset("switch-base-8"), "switch")}
    assert found[hf_name] == name


def test_gated_names_follow_t5():
    config = dataclasses.replace(preset("dense-nano"), gated=True)
    found = {entry.hf_name: entry.name for entry in entries(config, "t5")}
    stem = "encoder.block.0.layer.1.DenseReluDense"
    assert found[f"{stem}.wi_0.weight"] == "encoder.blocks.0.feedforward.gate.weight"
    assert found[f"{stem}.wi_1.weight"] == "encoder.blocks.0.feedforward.up.weight"


@pytest.mark.parametrize(
    "key",
    [
        "",
        "encoder",
        "encoder.block.0.layer.1.mlp.wi.weight.extra",
        "encoder.block.-1.layer.1.mlp.wi.weight",
        "encoder.block.٣.layer.1.mlp.wi.weight",
        "encoder.block.99999999999999.layer.1.mlp.wi.weight",
        "encoder.block.0.layer.2.mlp.wi.weight",
        "encoder.block.2.layer.0.SelfAttention.relative_attention_bias.weight",
        "encoder.block.0.layer.1.mlp.experts.expert_x.wi.weight",
    ],
)
def test_unknown_keys_are_not_parsed(key):
    assert parse_key(key) is None
