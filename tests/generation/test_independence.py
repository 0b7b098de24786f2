"""An output has the same bits alone, in any batch, padded and beside others, in every format."""

import copy

import pytest
import torch

from switchlm.compression.quantise import quantise_all, round_to_nearest
from switchlm.generation.beam import Beams, beam_search
from switchlm.generation.cache import GrowingCache
from switchlm.generation.decode import (
    decode_step,
    dropless,
    encode_prompts,
    evaluation_mode,
    generate,
    memories,
    pad_prompts,
)
from switchlm.generation.sampling import GREEDY, Sampling
from switchlm.generation.slots import Slots
from switchlm.huggingface.quantised import Quantisation

FORMATS = ["float32", "bfloat16", "float16", "8 bits", "4 bits"]
SAMPLED = Sampling(temperature=1.0, top_p=0.95)
NUMBER = 70  # more than are computed at once


def in_format(model, name):
    if "bits" not in name:
        return copy.deepcopy(model).to(getattr(torch, name))
    quantisation = Quantisation(bits=8 if name == "8 bits" else 4, group_size=32, what="all")
    return quantise_all(model, quantisation, round_to_nearest(quantisation)).model(model)


@pytest.fixture(scope="module", params=["nano", "heads of 8", "gated, two experts"])
def float32(request, module_build):
    changes = {
        "nano": {},
        "heads of 8": {"d_kv": 8, "num_heads": 4},
        "gated, two experts": {
            "gated": True,
            "activation": "gelu",
            "router": {"experts_per_token": 2},
            "attention_experts": True,
        },
    }
    return module_build(**changes[request.param])


@pytest.fixture(scope="module")
def many():
    draw = torch.Generator().manual_seed(3)
    return [
        torch.randint(3, 300, (1 + int(length),), generator=draw).tolist()
        for length in torch.randint(0, 40, (NUMBER,), generator=draw)
    ]


def logits(model, prompts, tokens_BT):
    """Return the logits after each of the tokens, [B, T, V]."""
    inputs_BS, segments_BS = pad_prompts(prompts, 0)
    with evaluation_mode(model), dropless(model):
        encoded_BSD = encode_prompts(model, inputs_BS, segments_BS)
        cache = GrowingCache(memories(model, encoded_BSD, segments_BS), tokens_BT.shape[1])
        parts = [decode_step(model, one, segments_BS, cache) for one in tokens_BT.split(1, 1)]
    return torch.stack(parts, 1)


@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_equal_bit_for_bit(float32, many, name):
    model = in_format(float32, name)
    tokens_BT = torch.randint(3, 300, (NUMBER, 3), generator=torch.Generator().manual_seed(4))
    together = logits(model, many, tokens_BT)
    for rows in ([0], [5, 69], list(range(20, 40))):
        some = logits(model, [many[row] for row in rows], tokens_BT[rows])
        assert torch.equal(some, together[rows])
    assert together.std() > 0.1, "a test on dull outputs is none"


@pytest.mark.parametrize("name", FORMATS)
def test_a_server_gives_the_tokens_of_a_prompt_alone(module_build, many, name):
    model = in_format(module_build(), name)
    asked = many[:20]
    samplings = [GREEDY if row % 2 else SAMPLED for row in range(len(asked))]
    found = [[] for _ in asked]
    with evaluation_mode(model, drop=False):
        slots = Slots(model, num_slots=20, max_source=64, max_target=4)
        for row, encoded_SD in enumerate(slots.encode(asked)):
            slots.add(row, encoded_SD, sampling=samplings[row], seed=row, limit=4)
        for _ in range(4):
            for row, token in enumerate(slots.step()):
                found[row].append(token)
    for row in (0, 1, 6, 19):
        ids, _ = pad_prompts([asked[row]], 0)
        alone = generate(model, ids, max_new_tokens=4, sampling=samplings[row], seeds=row)
        expected = alone.rows([1])[0]
        assert found[row][: len(expected)] == expected


def test_beams_have_the_score_of_a_prompt_alone(module_build, many):
    model = in_format(module_build(), "bfloat16")
    options = {"max_new_tokens": 4, "beams": Beams(width=4)}
    together = beam_search(model, *pad_prompts(many[:18], 0), **options)
    for row in (0, 17):
        assert beam_search(model, *pad_prompts([many[row]], 0), **options)[0] == together[row]
