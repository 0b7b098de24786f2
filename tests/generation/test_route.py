import dataclasses
import json

import pytest
import torch

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import DataError
from switchlm.generation.decode import dropless, evaluation_mode, generate
from switchlm.generation.route import NO_EXPERT, route

TOKENIZER = Tokenizer.bytes()
TEXT = "def <extra_id_0>(self): return größe"


def inputs(text):
    return torch.tensor([[*TOKENIZER.encode(text), 1]])


def forward(model, text, output):
    """Return the routing of the model for a text and an output."""
    with evaluation_mode(model):
        return model(inputs(text), torch.tensor([[0, *TOKENIZER.encode(output)]]))


@pytest.mark.parametrize("changes", [{}, {"sparse_step": 1, "num_encoder_layers": 3}])
def test_layers_are_the_model_s_routing(build, changes):
    model = build(**changes)
    routed = route(model, TOKENIZER, TEXT, "<extra_id_0>size")
    with dropless(model):
        own = forward(model, TEXT, "<extra_id_0>size")
    sparse = {
        name: [
            index
            for index, block in enumerate(getattr(model, name).blocks)
            if hasattr(block.feedforward, "router")
        ]
        for name in ("encoder", "decoder")
    }
    assert routed.num_experts == model.config.num_experts
    for name, routings in (("encoder", own.encoder_routing), ("decoder", own.decoder_routing)):
        stack = getattr(routed, name)
        assert [layer.layer for layer in stack.layers] == sparse[name]
        assert sparse[name]
        for layer, routing in zip(stack.layers, routings, strict=True):
            assert layer.part == "feedforward"
            assert layer.expert == routing.expert_A.tolist()
            assert layer.gate == routing.gate_A.tolist()
            assert layer.load == routing.load_E.tolist()
            assert all(layer.kept)
            assert len(layer.expert) == len(stack.tokens) == sum(layer.load)


def test_tokens_are_the_text_and_the_decoder_s_input(build):
    routed = route(build(), TOKENIZER, TEXT, "<extra_id_0>g b")
    assert "".join(routed.encoder.tokens) == TEXT + "</s>"
    assert routed.decoder.tokens == ["<pad>", "<extra_id_0>", "g", " ", "b"]


def test_without_an_output_the_greedy_one_is_routed(build):
    model = build()
    tokens = generate(model, inputs(TEXT), max_new_tokens=9).rows([1])[0]
    own = route(model, TOKENIZER, TEXT, max_new_tokens=9)
    assert "".join(own.decoder.tokens) == "<pad>" + TOKENIZER.decode(tokens)
    with dropless(model), evaluation_mode(model):
        output = model(inputs(TEXT), torch.tensor([[0, *tokens]]))
    experts = [routing.expert_A.tolist() for routing in output.decoder_routing]
    assert [layer.expert for layer in own.decoder.layers] == experts


def test_capacity_drops_only_where_it_is_enforced(build):
    model = build(router={"evaluation_capacity_factor": 0.5})
    free = route(model, TOKENIZER, TEXT, "abc")
    tight = route(model, TOKENIZER, TEXT, "abc", enforce_capacity=True)
    own = forward(model, TEXT, "abc")
    assert all(all(layer.kept) for layer in free.encoder.layers)
    for layer, routing in zip(tight.encoder.layers, own.encoder_routing, strict=True):
        assert layer.kept == routing.kept_A.tolist()
        assert not all(layer.kept)
        assert sum(layer.load) == len(layer.kept)


def test_of_several_experts_per_token_the_first_choice_is_recorded(build):
    model = build(router={"experts_per_token": 2})
    layer = route(model, TOKENIZER, TEXT, "abc").encoder.layers[0]
    with dropless(model):
        routing = forward(model, TEXT, "abc").encoder_routing[0]
    assert layer.expert == routing.expert_A.view(-1, 2)[:, 0].tolist()
    assert all(gate >= 0.5 for gate in layer.gate)
    assert sum(layer.load) == 2 * len(layer.expert)


def test_with_expert_choice_a_token_has_the_expert_of_largest_gate_or_none(build):
    model = build(router={"selection": "expert_choice", "evaluation_capacity_factor": 0.5})
    layer = route(model, TOKENIZER, TEXT, "abc").encoder.layers[0]
    routing = forward(model, TEXT, "abc").encoder_routing[0]
    columns = (routing.token_A, routing.gate_A, routing.expert_A)
    pairs = list(zip(*(column.tolist() for column in columns), strict=True))
    for token, (expert, gate) in enumerate(zip(layer.expert, layer.gate, strict=True)):
        took = [(g, e) for t, g, e in pairs if t == token]
        assert (gate, expert) == max(took, default=(0.0, NO_EXPERT))
        assert layer.kept[token] == (expert != NO_EXPERT)
    assert NO_EXPERT in layer.expert


def test_experts_in_attention_are_separate_layers(build):
    routed = route(build(attention_experts=True), TOKENIZER, TEXT, "abc")
    parts = [layer.part for layer in routed.encoder.layers]
    assert parts[:3] == ["attention.query", "attention.key_value", "feedforward"]
    assert len({layer.layer for layer in routed.encoder.layers[:3]}) == 1


def test_a_dense_model_has_tokens_and_no_layers(build):
    routed = route(build(num_experts=0), TOKENIZER, TEXT, "abc")
    assert routed.num_experts == 0
    assert routed.encoder.layers == routed.decoder.layers == []
    assert routed.decoder.tokens == ["<pad>", "a", "b", "c"]


def test_the_record_can_be_written_as_json(build):
    routed = dataclasses.asdict(route(build(), TOKENIZER, TEXT, ""))
    assert json.loads(json.dumps(routed)) == routed


def test_the_model_is_not_changed(build):
    model = build(router={"evaluation_capacity_factor": 0.5}).train()
    route(model, TOKENIZER, TEXT, "abc")
    assert all(module.training for module in model.modules())
    assert forward(model, TEXT, "abc").encoder_routing[0].dropped > 0


def test_errors(build):
    with pytest.raises(DataError, match="The text is empty"):
        route(build(), TOKENIZER, "")
    small = build(vocabulary_size=128)
    for text, output in ((TEXT, "a"), ("abc", TEXT)):
        with pytest.raises(DataError, match="vocabulary ends at 127"):
            route(small, TOKENIZER, text, output)
