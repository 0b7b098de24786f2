import dataclasses

import pytest
import torch

from switchlm.data.batch import Batch
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.evaluation.routing import PARTS, routing_statistics
from switchlm.model.presets import preset
from switchlm.model.router import Router
from switchlm.model.switch import switch_layers
from switchlm.model.transformer import SwitchTransformer

TEXTS = ("def size(self):\n", "x = 12", "a b")
NAMES = ("code", "sums", "letters", "unused")


@pytest.fixture
def tokenizer():
    return Tokenizer.bytes()


def build(router=None, **changes):
    torch.manual_seed(0)
    config = dataclasses.replace(preset("nano"), **changes)
    config = dataclasses.replace(
        config, router=dataclasses.replace(config.router, **(router or {}))
    )
    return SwitchTransformer(config)


@pytest.fixture
def batch(tokenizer):
    rows = [torch.tensor(tokenizer.encode(text)) for text in TEXTS]
    inputs_BS = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    segments_BS = (inputs_BS != 0).int()
    return Batch(
        inputs_BS=inputs_BS,
        targets_BT=inputs_BS[:, :5],
        input_segments_BS=segments_BS,
        target_segments_BT=segments_BS[:, :5],
        source_B=torch.arange(3, dtype=torch.int32),
    )


ROUTERS = {
    "paper": {},
    "dropping": {"evaluation_capacity_factor": 0.5, "min_capacity": 1},
    "hf": {"mode": "hf", "expert_capacity": 64},
    "expert choice": {"selection": "expert_choice", "min_capacity": 1},
    "top 2": {"experts_per_token": 2},
}


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS.keys())
def test_every_token_but_padding_is_counted_once_per_choice(batch, tokenizer, router):
    model = build(router)
    layers = routing_statistics(model, [batch, batch], tokenizer, NAMES, top=300)
    assert [layer.name for layer in layers] == list(switch_layers(model))
    real = {"encoder": sum(map(len, TEXTS)), "decoder": 5 + 5 + 3}
    choices = router.get("experts_per_token", 1)
    for layer in layers:
        stack = layer.name.partition(".")[0]
        by_tokens = [sum(number for _, number in tokens) for tokens in layer.top_tokens]
        assert by_tokens == list(layer.load_E)
        for loads_by_name in (layer.class_load, layer.source_load):
            columns = zip(*loads_by_name.values(), strict=True)
            assert [sum(loads) for loads in columns] == by_tokens
        assert "unused" not in layer.source_load
        assert len(layer.dropped_by_place) == PARTS
        if router.get("selection") != "expert_choice" or stack == "decoder":
            assert sum(layer.load_E) == 2 * choices * real[stack]
        assert 0 < layer.gate <= 1
        assert 0 <= layer.dropped < 1
        if router == ROUTERS["dropping"]:
            assert layer.dropped > 0
            assert max(layer.dropped_by_place) > 0
        elif router != ROUTERS["expert choice"]:
            assert not any(layer.dropped_by_place)


def test_counts_equal_the_routing_record(batch, tokenizer):
    model = build()
    layers = routing_statistics(model, [batch], tokenizer, NAMES)
    model.eval()
    with torch.no_grad():
        _, routing = model.encode(batch.inputs_BS, batch.input_segments_BS)
    assert layers[0].load_E == tuple(routing[0].load_E.tolist())
    expert = int(routing[0].expert_A[0])
    assert "d" in [text for text, _ in layers[0].top_tokens[expert]]


def test_the_inputs_of_decoder_layers_are_the_targets_shifted_right(batch, tokenizer):
    layers = routing_statistics(build(), [batch], tokenizer, NAMES, top=300)
    tokens = {text for tokens in layers[-1].top_tokens for text, _ in tokens}
    assert "<pad>" in tokens
    assert "s" not in tokens, "the fifth target is no input of the decoder"
    assert sum(layers[-1].class_load["start or end"]) == len(TEXTS)


def test_switch_attention_layers_have_names(batch, tokenizer):
    model = build(attention_experts=True)
    names = [layer.name for layer in routing_statistics(model, [batch], tokenizer, NAMES)]
    assert names[:3] == [
        "encoder.blocks.1.attention.query",
        "encoder.blocks.1.attention.key_value",
        "encoder.blocks.1.feedforward",
    ]


def test_a_dense_model_has_no_layers(batch, tokenizer):
    assert routing_statistics(build(num_experts=0), [batch], tokenizer, NAMES) == []


def test_drops_are_counted_by_place(tokenizer):
    """With a capacity of one slot and one group, all tokens after the first are dropped."""
    inputs_BS = torch.tensor([tokenizer.encode("a" * 32)])
    batch = Batch(
        inputs_BS=inputs_BS,
        targets_BT=inputs_BS[:, :16],
        input_segments_BS=None,
        target_segments_BT=None,
        source_B=torch.zeros(1, dtype=torch.int32),
    )
    model = build({"evaluation_capacity_factor": 0.1, "min_capacity": 1})
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, Router):
                layer.weight.zero_()  # ties: all tokens choose the first expert
    encoder = routing_statistics(model, [batch], tokenizer, ("a",))[0]
    assert encoder.dropped_by_place == (0.5, *[1.0] * (PARTS - 1))
    assert encoder.dropped == pytest.approx(31 / 32)
