"""The two programs, not yet exported, against the model."""

import pytest
import torch

from switchlm.errors import CheckpointError, ConfigError
from switchlm.export.steps import greedy, programs
from switchlm.generation.decode import dropless, generate
from switchlm.model import lora

PROMPT = [*range(20, 60, 3), 1]


def about(config):
    return {
        "layers": config.num_decoder_layers,
        "heads": config.num_heads,
        "width": config.d_kv,
        "start_id": config.first_id,
        "end_ids": config.end_ids,
    }


def in_numpy(program):
    def call(*arrays):
        with torch.no_grad():
            return [y.numpy() for y in program(*map(torch.from_numpy, arrays))]

    return call


KINDS = {
    "switch": {},
    "dense": {"num_experts": 0},
    "v1.1": {"gated": True, "activation": "gelu"},
    "tied": {"tied_head": True, "num_decoder_layers": 1},
    "two experts": {"router": {"experts_per_token": 2}},
}


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())
def test_greedy_tokens_are_the_model_s(build, changes):
    model = build(**changes)
    ours = generate(model, torch.tensor([PROMPT]), max_new_tokens=20).rows([1])[0]
    encode, step = map(in_numpy, programs(model))
    tokens = greedy(encode, step, PROMPT, about(model.config), 20)
    assert tokens == ours
    assert changes.get("tied_head") or len(set(tokens)) > 3


def test_rows_do_not_see_padding_or_what_the_cache_will_hold(build):
    model = build()
    encoder, step = programs(model)
    tokens = torch.tensor([PROMPT, PROMPT[:5] + [0] * (len(PROMPT) - 5)])
    mask = tokens != 0
    with torch.no_grad(), dropless(model):
        alone = model.encode(tokens[1:, :5])[0]
        encoded, keys, values = encoder(tokens, mask)
        torch.testing.assert_close(encoded[1:, :5], alone, rtol=1e-4, atol=1e-5)
        expected = model.decode(torch.zeros(1, 1, dtype=torch.int64), alone).logits_BTV[0, 0]
        cache = torch.full((2, 2, 2, 6, 16), 7.0)
        logits, new_keys, _ = step(
            torch.zeros(2, 1, dtype=torch.int64),
            torch.tensor(0),
            mask,
            keys,
            values,
            cache,
            cache.clone(),
        )
    torch.testing.assert_close(logits[1], expected, rtol=1e-4, atol=1e-4)
    assert (cache == 7).all()
    assert (new_keys[:, :, :, 1:] == 7).all()
    assert (new_keys[:, :, :, 0] != 7).all()


def test_the_model_keeps_its_own_weights_and_they_are_not_copied(build):
    model = build()
    encoder, _ = programs(model)
    assert encoder.model.embedding.weight.data_ptr() == model.embedding.weight.data_ptr()
    half = build().bfloat16()
    encoder, _ = programs(half)
    assert encoder.model.embedding.weight.dtype == torch.float32
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in half.parameters())


def test_models_without_static_shapes_are_refused(build):
    with pytest.raises(ConfigError, match="attention_experts"):
        programs(build(attention_experts=True))
    with pytest.raises(ConfigError, match="expert_choice"):
        programs(build(router={"selection": "expert_choice"}))
    with pytest.raises(ConfigError, match=r"at least 0.01, got 0.0"):
        programs(build(), 0.0)


def test_other_weights_are_refused(build):
    model = build()
    lora.apply(model, 2, 4.0)
    with pytest.raises(CheckpointError, match="compressed or adapted cannot be exported"):
        programs(model)
