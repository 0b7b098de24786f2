import pytest
import torch

from switchlm.generation.cache import LEAST, GrowingCache
from switchlm.generation.decode import dropless, memories, pad_prompts
from switchlm.model.transformer import SwitchTransformer

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def decode_by_steps(model, encoded_BSD, segments_BS, tokens_BT, sizes):
    cache = GrowingCache(memories(model, encoded_BSD, segments_BS), tokens_BT.shape[1])
    logits = []
    for part in tokens_BT.split(sizes, 1):
        output = model.decode(part, encoded_BSD, input_segments_BS=segments_BS, cache=cache)
        logits.append(output.logits_BTV)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("sizes", [[1] * 6, [3, 1, 2], [6]])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_experts": 0},
        {"gated": True, "activation": "gelu", "tied_head": True},
        {"attention_experts": True},
    ],
    ids=["switch", "dense", "gated", "switch attention"],
)
@torch.no_grad()
def test_decoding_with_the_cache_equals_decoding_at_once(build, prompts, changes, sizes):
    model: SwitchTransformer = build(**changes)
    inputs_BS, segments_BS = pad_prompts(prompts, 0)
    tokens_BT = torch.randint(3, 300, (4, 6), generator=torch.Generator().manual_seed(2))
    with dropless(model):
        encoded_BSD, _ = model.encode(inputs_BS, segments_BS)
        at_once = model.decode(tokens_BT, encoded_BSD, input_segments_BS=segments_BS).logits_BTV
        by_steps = decode_by_steps(model, encoded_BSD, segments_BS, tokens_BT, sizes)
    torch.testing.assert_close(by_steps, at_once, **TOLERANCE)


@torch.no_grad()
def test_every_row_of_a_padded_batch_equals_the_row_alone(build, prompts):
    model = build()
    inputs_BS, segments_BS = pad_prompts(prompts, 0)
    tokens_BT = torch.randint(3, 300, (4, 6), generator=torch.Generator().manual_seed(2))
    with dropless(model):
        encoded_BSD, _ = model.encode(inputs_BS, segments_BS)
        batched = decode_by_steps(model, encoded_BSD, segments_BS, tokens_BT, [1] * 6)
        for row, prompt in enumerate(prompts):
            encoded_1SD, _ = model.encode(torch.tensor([prompt]))
            alone = decode_by_steps(model, encoded_1SD, None, tokens_BT[row : row + 1], [1] * 6)
            torch.testing.assert_close(alone[0], batched[row], **TOLERANCE)


@torch.no_grad()
def test_memory_grows_with_what_is_generated(build):
    model = build()
    encoded_BSD, _ = model.encode(torch.arange(3, 9)[None])
    tokens_BT = torch.randint(3, 300, (1, LEAST + 3))
    cache = GrowingCache(memories(model, encoded_BSD, None), 10**12)
    logits, lengths = [], []
    with dropless(model):
        for token_B1 in tokens_BT.split(1, 1):
            logits.append(model.decode(token_B1, encoded_BSD, cache=cache).logits_BTV)
            lengths.append(cache.self_attention[0].keys_BHMK.shape[2])
        at_once = model.decode(tokens_BT, encoded_BSD).logits_BTV
    assert lengths == [LEAST] * LEAST + [2 * LEAST] * 3
    torch.testing.assert_close(torch.cat(logits, 1), at_once, **TOLERANCE)


@torch.no_grad()
def test_no_more_than_the_longest_output_is_kept(build):
    cache = GrowingCache(memories(build(), torch.randn(2, 3, 32), None), LEAST + 1)
    cache.advance(LEAST)
    cache.advance(1)
    assert cache.self_attention[0].keys_BHMK.shape[2] == LEAST + 1
    with pytest.raises(AssertionError, match="full"):
        cache.advance(1)


@torch.no_grad()
def test_the_cache_has_the_dtype_of_the_model(build):
    model = build().bfloat16()
    encoded_BSD, _ = model.encode(torch.arange(3, 9)[None])
    cache = GrowingCache(memories(model, encoded_BSD, None), 2)
    output = model.decode(torch.tensor([[3]]), encoded_BSD, cache=cache)
    assert output.logits_BTV.dtype == torch.bfloat16
