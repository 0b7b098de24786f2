import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from switchlm.errors import ConfigError

TOKENS = torch.tensor([[0, 20, 30, 40]] * 3)


def fixed(config, length):
    lengths = (StaticCache(config=config, max_cache_len=length) for _ in range(2))
    return EncoderDecoderCache(*lengths)


def test_a_cache_of_a_fixed_length_gives_the_logits_without_one(pair, batch):
    ours, _ = pair
    cache = fixed(ours.config, 20)  # longer than the source too
    with torch.no_grad():
        whole = ours(**batch[0], decoder_input_ids=TOKENS).logits
        first = ours(**batch[0], decoder_input_ids=TOKENS[:, :3], cache=cache)
        last = ours(
            attention_mask=batch[0]["attention_mask"],
            encoder_outputs=(first.encoder_last_hidden_state,),
            decoder_input_ids=TOKENS[:, 3:],
            decoder_attention_mask=torch.ones(3, 4),
            cache=cache,
        )
    logits = torch.cat([first.logits, last.logits], 1)
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)


def test_no_cache_is_made_where_activations_are_recomputed(ours, batch):
    ours.train().gradient_checkpointing_enable()
    assert ours.is_activation_checkpointing
    output = ours(**batch[0], labels=batch[1])
    assert output.get("cache", output.get("past_key_values")) is None


def test_errors(pair, batch):
    ours, _ = pair
    with pytest.raises(ConfigError, match="is an EncoderDecoderCache, got a DynamicCache"):
        ours(**batch[0], decoder_input_ids=TOKENS, cache=DynamicCache())
    with pytest.raises(ConfigError, match="has 3 places, too few for 4 tokens"):
        ours(**batch[0], decoder_input_ids=TOKENS, cache=fixed(ours.config, 3))
