import torch
from transformers.models.t5.modeling_t5 import T5LayerNorm

from switchlm.model.layers import RMSNorm


def pair(dtype: torch.dtype) -> tuple[RMSNorm, T5LayerNorm]:
    torch.manual_seed(0)
    ours, theirs = RMSNorm(16, 1e-6), T5LayerNorm(16, eps=1e-6)
    weight = torch.rand(16) + 0.5
    ours.weight.data.copy_(weight)
    theirs.weight.data.copy_(weight)
    return ours.to(dtype), theirs.to(dtype)


def test_equals_the_layer_norm_of_t5_with_gradients() -> None:
    ours, theirs = pair(torch.float32)
    x = torch.randn(2, 5, 16) * torch.tensor([1e-4, 1e3])[:, None, None]
    gradient = torch.randn(2, 5, 16)
    results = []
    for norm in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        y.backward(gradient)
        results.append((y, leaf.grad, norm.weight.grad))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=1e-6)


def test_bfloat16_in_and_out_with_the_mean_square_in_float32() -> None:
    ours, theirs = pair(torch.bfloat16)
    x = torch.randn(4, 16).bfloat16() * 100
    assert ours(x).dtype == torch.bfloat16
    torch.testing.assert_close(ours(x), theirs(x), rtol=2e-2, atol=0)


def test_zeros_stay_zeros() -> None:
    assert RMSNorm(8)(torch.zeros(2, 8)).eq(0).all()
