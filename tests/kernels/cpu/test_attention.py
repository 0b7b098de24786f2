"""Against the plain steps in float64, on every kind of vector that the C code may be built for."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from switchlm.kernels.cpu import native
from switchlm.kernels.cpu.attention import attention as attend
from switchlm.kernels.cpu.attention import misfit

LOW = torch.finfo(torch.bfloat16).min  # of a place that is masked
# Rows, heads, queries, keys, width of a head.
SHAPES = [
    (3, 4, 64, 64, 8),
    (9, 2, 14, 64, 8),
    (2, 3, 14, 14, 8),
    (2, 2, 5, 7, 4),
    (3, 2, 33, 17, 16),
    (2, 2, 50, 300, 64),
    (17, 1, 3, 5, 3),
    (1, 2, 30, 1030, 12),
    (1, 1, 1, 1, 1),
    (1, 2, 30, 40, 160),
    (1, 1, 1030, 1030, 4),
]

pytestmark = pytest.mark.skipif(native.native().library is None, reason=native.native().reason)


def scene(shape: tuple[int, ...], bias: tuple[int, int] | None = None) -> list[Tensor | None]:
    """Query, key, value as heads of [B, S, H * K], and the bias: all with gradients."""
    torch.manual_seed(0)
    rows, heads, queries, keys, width = shape
    tensors: list[Tensor | None] = [
        torch.randn(rows, size, heads, width).mul(width**-0.25).transpose(1, 2).requires_grad_()
        for size in (queries, keys, keys)
    ]
    return [*tensors, None if bias is None else torch.randn(*bias, queries, keys).requires_grad_()]


def plain(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    score = query @ key.mT
    y_BHQK = (score if bias is None else score + bias).softmax(-1) @ value
    return y_BHQK.transpose(1, 2).flatten(2)


def gradients(function, tensors: list[Tensor | None]) -> list[Tensor]:
    """Return y, and the gradients of all that require one."""
    y = function(*tensors)
    torch.manual_seed(1)
    wanted = [x for x in tensors if x is not None and x.requires_grad]
    return [y, *torch.autograd.grad(y, wanted, torch.randn(y.shape).to(y.dtype))]


def agree(tensors: list[Tensor | None]) -> None:
    assert misfit(*tensors) is None
    wide = [x if x is None else x.detach().double().requires_grad_() for x in tensors]
    for x, other in zip(tensors, wide, strict=True):
        if x is not None and other is not None:
            other.requires_grad_(x.requires_grad)
    for found, expected in zip(gradients(attend, tensors), gradients(plain, wide), strict=True):
        size = expected.abs().max().item()
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-6 * size)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", ["none", "one", "a head", "a row", "all"])
def test_equals_the_plain_steps_with_gradients(build, shape, bias):
    rows, heads = shape[:2]
    kinds = {"one": (1, 1), "a head": (1, heads), "a row": (rows, 1), "all": (rows, heads)}
    agree(scene(shape, kinds.get(bias)))


@pytest.mark.parametrize("bias", [(1, 4), (3, 1), (3, 4)], ids=str)
def test_a_bias_without_a_gradient(build, bias):
    *tensors, added = scene((3, 4, 9, 20, 8), bias)
    agree([*tensors, added.detach()])
    of_keys = added.detach()[:, :, :1].expand(-1, -1, 9, -1)  # a mask of keys alone
    agree([*tensors, of_keys])


def test_a_bias_whose_heads_are_contiguous(build):
    """As the embedding of relative positions gives it."""
    *tensors, _ = scene((20, 4, 9, 20, 8))
    agree([*tensors, torch.randn(9, 20, 4).movedim(-1, 0)[None].requires_grad_()])


def test_strided_and_misaligned_inputs_and_gradients(build):
    query, key, value, bias = scene((3, 2, 5, 18, 8), (1, 2))
    cut = torch.randn(3, 5, 40)[:, :, 3:19].unflatten(2, (2, 8)).transpose(1, 2)
    turned = torch.randn(3, 2, 8, 18).mT.requires_grad_()
    agree([cut.requires_grad_(), turned, value, bias])
    tensors = [query, key, value, bias]
    found = torch.autograd.grad(attend(*tensors).sum(), tensors)
    for mine, other in zip(found, torch.autograd.grad(plain(*tensors).sum(), tensors), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_keys_that_are_values_too(build):
    query, key, _, bias = scene((3, 2, 5, 18, 8), (1, 2))
    for found, expected in zip(
        gradients(lambda q, k, b: attend(q, k, k, b), [query, key, bias]),
        gradients(lambda q, k, b: plain(q, k, k, b), [query, key, bias]),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_gradients_of_layout_and_no_gradients(build):
    query, key, value, bias = scene((3, 2, 5, 18, 8), (1, 2))
    y_BQW, dquery, *_ = gradients(attend, [query, key, value, bias])
    assert y_BQW.shape == (3, 5, 16)
    assert y_BQW.is_contiguous()
    assert dquery.transpose(1, 2).is_contiguous()
    with torch.no_grad():
        assert torch.equal(attend(query, key, value, bias), y_BQW)
    with torch.inference_mode():
        assert torch.equal(attend(query, key, value, bias), y_BQW)
    key.requires_grad_(False)
    value.requires_grad_(False)
    (alone,) = torch.autograd.grad(attend(query, key, value, bias).square().sum(), [query])
    assert alone.shape == query.shape


@pytest.mark.parametrize("low", [LOW, -math.inf], ids=str)
def test_masked_keys_have_no_weight(build, low):
    *tensors, _ = scene((2, 2, 6, 20, 8))
    allowed = torch.ones(6, 20).tril(3).bool()
    bias = torch.where(allowed, torch.randn(1, 2, 6, 20), low).requires_grad_()
    agree([*tensors, bias])
    _, _, dkey, dvalue, dbias = gradients(attend, [*tensors, bias])
    assert dkey[:, :, 9:].eq(0).all()
    assert dvalue[:, :, 9:].eq(0).all()
    assert dbias[:, :, ~allowed].eq(0).all()


def test_a_row_that_may_attend_to_nothing_gives_the_mean(build):
    query, key, value, _ = scene((2, 2, 3, 18, 8))
    nothing = torch.full((1, 1, 3, 18), LOW, requires_grad=True)
    y_BQW = attend(query, key, value, nothing)
    mean_BHQK = value.mean(2, keepdim=True).expand(-1, -1, 3, -1)
    torch.testing.assert_close(y_BQW, mean_BHQK.transpose(1, 2).flatten(2))
    (dvalue,) = torch.autograd.grad(y_BQW.sum(), [value])
    torch.testing.assert_close(dvalue, torch.full_like(value, 3 / 18))


def test_large_scores(build):
    query, key, value, bias = scene((2, 2, 9, 18, 8), (1, 2))
    query = query.detach().mul(300).requires_grad_()
    y_BQW = attend(query, key, value, bias)
    assert y_BQW.isfinite().all()
    torch.testing.assert_close(y_BQW, plain(query, key, value, bias), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", range(4))
def test_non_finite_inputs_give_non_finite_outputs(build, bad, where):
    tensors = scene((2, 2, 6, 20, 8), (1, 2))
    with torch.no_grad():
        tensors[where][0, 0, 2, 3] = bad
    for found, expected in zip(gradients(attend, tensors), gradients(plain, tensors), strict=True):
        ours, theirs = found.isfinite(), expected.isfinite()
        assert not (ours & ~theirs).any(), "hides what is not finite"
        assert torch.equal(ours[1:], theirs[1:]), "reaches other rows"


@pytest.mark.parametrize("bias", [None, (1, 4), (1, 1), (20, 4), (20, 1)], ids=str)
def test_threads_change_no_bit(build, bias):
    tensors = scene((20, 4, 40, 70, 8), bias)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            results.append(gradients(attend, tensors))
        finally:
            torch.set_num_threads(1)
    for one, *others in zip(*results, strict=True):
        assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize(
    "case",
    ["another width", "bfloat16", "empty", "meta", "no library", "bias"],
)
def test_unsupported_inputs(case, monkeypatch):
    query, key, value, bias = (x.detach() for x in scene((1, 2, 4, 6, 8), (1, 2)))
    assert misfit(query, key, value, bias) is None
    if case == "another width":
        query = query.repeat(1, 1, 1, 100)
    elif case == "bfloat16":
        key = key.bfloat16()
    elif case == "empty":
        query = query[:0]
    elif case == "meta":
        query = query.to("meta")
    elif case == "no library":
        monkeypatch.setattr(native, "native", lambda: native.Native(None, "none"))
    else:
        bias = bias.double()
    assert misfit(query, key, value, bias)


def test_autocast_and_dispatch_modes_run_pytorchs():
    tensors = [x.detach() for x in scene((1, 2, 4, 6, 8), (1, 2))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert misfit(*tensors)
    with FlopCounterMode(display=False):
        assert misfit(*tensors)

    def answer(query, key, value, bias):
        return query if misfit(query, key, value, bias) else query + 1

    compiled = torch.compile(answer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*tensors), tensors[0])
