"""Equals PyTorch's attention in float64, padding included; other rows change no bit."""

import pytest
import torch

from switchlm.kernels.cpu import attention, native
from switchlm.kernels.select import attention as attend

pytestmark = pytest.mark.skipif(native.native().library is None, reason=native.native().reason)
SHAPES = [(1, 12, 64, 64), (3, 4, 17, 16), (2, 2, 600, 32), (5, 1, 1, 48)]
LOW = torch.finfo(torch.bfloat16).min


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def tensors(batch, heads, places, width, dtype=torch.float32):
    sizes = (1, places, places)
    return tuple(torch.randn(batch, heads, size, width).to(dtype) for size in sizes)


def twin(query, key, value, bias):
    doubles = (t.double() for t in (query, key, value))
    mask = None if bias is None else bias.double()
    y = torch.nn.functional.scaled_dot_product_attention(*doubles, attn_mask=mask, scale=1.0)
    return y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["none", "heads", "rows and heads", "transposed"])
def test_it_is_attention(shape, dtype, kind):
    batch, heads, places, _ = shape
    bias = {
        "none": None,
        "heads": torch.randn(1, heads, 1, places),
        "rows and heads": torch.randn(batch, heads, 1, places),
        "transposed": torch.randn(1, 1, places, heads).movedim(-1, -3),
    }[kind]
    query, key, value = tensors(*shape, dtype=dtype)
    assert attention.decode_misfit(query, key, value, bias) is None
    found = attention.decode_attention(query, key, value, bias)
    assert found.dtype == dtype
    tolerance = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 1e-5)
    expected = twin(query, key, value, bias)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_large_differences_of_scores():
    query, key, value = tensors(2, 2, 100, 32)
    found = attention.decode_attention(query * 100, key, value, None)
    torch.testing.assert_close(
        found.double(), twin(query * 100, key, value, None), rtol=1e-4, atol=1e-4
    )


def test_masked_places_have_no_effect():
    query, key, value = tensors(2, 3, 40, 16)
    bias = torch.randn(1, 3, 1, 40)
    short = attention.decode_attention(query, key[:, :, :23], value[:, :, :23], bias[..., :23])
    masked = torch.where(torch.arange(40) < 23, bias, LOW)
    key[:, :, 23:] = 1e4
    assert torch.equal(attention.decode_attention(query, key, value, masked), short)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", [0, 5, 16, 22])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_nan_key_affects_its_own_head_only(bad, place, dtype):
    query, key, value = (x.to(dtype) for x in tensors(2, 3, 23, 16))
    key[1, 2, place] = bad
    found = attention.decode_attention(query, key, value, None).view(2, 3, 16)
    assert found[1, 2].isnan().all()
    found[1, 2] = 0
    assert found.isfinite().all()


def test_a_query_that_may_attend_to_nothing_gives_the_mean():
    query, key, value = tensors(1, 2, 9, 16)
    found = attention.decode_attention(query, key, value, torch.full((1, 1, 1, 9), LOW))
    torch.testing.assert_close(found.view(2, 16), value[0].mean(1))


def test_rows_and_threads_change_no_bit(monkeypatch):
    monkeypatch.setattr(attention, "_LEAST_NUMBERS", 0)
    query, key, value = tensors(4, 3, 50, 32)
    together = attention.decode_attention(query, key, value, None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = attention.decode_attention(query[2:3], key[2:3], value[2:3], None)
    torch.set_num_threads(threads)
    assert torch.equal(alone, together[2:3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_heads_of_no_whole_vectors(dtype):
    query, key, value = tensors(3, 2, 20, 8, dtype)
    bias = torch.randn(3, 1, 1, 20).to(dtype)
    assert attention.narrow_misfit(query, key, value, bias) is None
    found = attend(query, key, value, bias, 0.0)
    expected = twin(query, key, value, bias).to(dtype)
    torch.testing.assert_close(found, expected)
    assert torch.equal(attend(query[1:2], key[1:2], value[1:2], bias[1:2], 0.0), found[1:2])


def test_misfit():
    query, key, value = tensors(2, 3, 8, 16)
    assert attention.decode_misfit(query, key, value, None) is None
    assert attention.decode_misfit(torch.randn(2, 3, 2, 16), key, value, None), "two queries"
    assert attention.decode_misfit(query, key.transpose(2, 3).contiguous().mT, value, None)
    assert attention.decode_misfit(query.double(), key.double(), value.double(), None)
    assert attention.decode_misfit(*tensors(2, 3, 8, 12), None), "an odd width"
    with torch.enable_grad():
        assert attention.decode_misfit(query, key, value, None)


def test_the_model_uses_it(monkeypatch):
    query, key, value = tensors(2, 3, 8, 16)
    bias = torch.randn(1, 3, 1, 8)
    ours = attend(query, key, value, bias, 0.0)
    monkeypatch.setattr(attention, "decode_misfit", lambda *_: False)
    torch.testing.assert_close(ours, attend(query, key, value, bias, 0.0))
