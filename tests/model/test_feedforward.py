import pytest
import torch
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5DenseActDense, T5DenseGatedActDense

from switchlm.model.layers import FeedForward


@pytest.mark.parametrize("gated", [False, True])
def test_equals_t5(gated: bool) -> None:
    torch.manual_seed(0)
    config = T5Config(
        d_model=8, d_ff=12, dropout_rate=0.0, feed_forward_proj="gated-gelu" if gated else "relu"
    )
    theirs = (T5DenseGatedActDense if gated else T5DenseActDense)(config)
    ours = FeedForward(8, 12, "gelu" if gated else "relu", gated)
    if gated:
        ours.gate.weight.data.copy_(theirs.wi_0.weight)
        ours.up.weight.data.copy_(theirs.wi_1.weight)
    else:
        ours.up.weight.data.copy_(theirs.wi.weight)
    ours.down.weight.data.copy_(theirs.wo.weight)
    x = torch.randn(3, 8)
    torch.testing.assert_close(ours(x), theirs(x))


def test_dropout_acts_in_training_only() -> None:
    layer = FeedForward(8, 400, dropout=0.5)
    x = torch.randn(2, 8)
    torch.manual_seed(0)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
