import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from switchlm.errors import ConfigError
from switchlm.generation.sampling import GREEDY, Sampling, candidates, next_tokens, uniforms

LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=12)


def draw(logits, sampling, number=4000, seed=0):
    logits_BV = torch.tensor(logits, dtype=torch.float32).expand(number, -1)
    return next_tokens(logits_BV, sampling, uniforms([seed], number)[0])


def test_greedy_takes_the_most_probable_and_the_first_of_equals():
    logits_BV = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 1.0]])
    assert next_tokens(logits_BV, GREEDY, None).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature):
    logits = [0.0, 1.0, 2.0, -1.0]
    tokens = draw(logits, Sampling(temperature=temperature))
    expected = (torch.tensor(logits) / temperature).softmax(0)
    observed = torch.bincount(tokens, minlength=4) / len(tokens)
    # Five standard deviations of a proportion.
    assert ((observed - expected).abs() < 5 * (expected * (1 - expected) / 4000).sqrt()).all()


@given(logits=LOGITS, k=st.integers(1, 14))
def test_top_k_keeps_the_k_most_probable(logits, k):
    probability_BV, token_BV = candidates(
        torch.tensor([logits]), Sampling(temperature=1.0, top_k=k)
    )
    left = token_BV[probability_BV > 0].tolist()
    assert 1 <= len(left) <= min(k, len(logits))
    excluded = set(range(len(logits))) - set(token_BV[0, :k].tolist())
    assert all(logits[a] >= logits[b] for a in left for b in excluded)
    assert float(probability_BV.sum()) == pytest.approx(1, abs=1e-5)


@given(logits=LOGITS, p=st.floats(0.01, 0.99))
def test_top_p_keeps_the_fewest_that_reach_p(logits, p):
    full = torch.tensor(logits).softmax(0)
    probability_BV, token_BV = candidates(
        torch.tensor([logits]), Sampling(temperature=1.0, top_p=p)
    )
    kept = full[token_BV[probability_BV > 0]]
    assert len(kept) >= 1
    assert float(kept.sum()) >= p - 1e-5
    assert len(kept) == 1 or float(kept[:-1].sum()) < p + 1e-5
    assert float(probability_BV.sum()) == pytest.approx(1, abs=1e-5)


@given(
    logits=LOGITS,
    k=st.none() | st.integers(1, 6),
    p=st.floats(0.05, 1.0),
    temperature=st.floats(1e-3, 50),
    uniform=st.floats(0, 1, exclude_max=True, width=32),
)
def test_a_sampled_token_is_a_candidate(logits, k, p, temperature, uniform):
    sampling = Sampling(temperature=temperature, top_k=k, top_p=p)
    probability_BV, token_BV = candidates(torch.tensor([logits]), sampling)
    token = next_tokens(torch.tensor([logits]), sampling, torch.tensor([uniform]))
    assert int(token) in token_BV[probability_BV > 0].tolist()


def test_top_p_is_applied_after_top_k():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    # Of 4/7 and 3/7 the first alone reaches a half; of all four it would take two.
    probability_BV, _ = candidates(logits, Sampling(temperature=1.0, top_k=2, top_p=0.5))
    assert (probability_BV > 0).sum() == 1
    probability_BV, _ = candidates(logits, Sampling(temperature=1.0, top_p=0.5))
    assert (probability_BV > 0).sum() == 2


def test_a_tiny_temperature_is_nearly_greedy_and_finite():
    assert draw([80.0, 90.0, -90.0], Sampling(temperature=1e-4)).unique().tolist() == [1]


def test_random_numbers_depend_on_the_seed_only():
    together = uniforms([7, 8, 7], 40)
    assert torch.equal(together[0], together[2])
    assert torch.equal(uniforms([8], 40)[0], together[1])
    assert torch.equal(uniforms([8], 9)[0], together[1, :9])
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": 0}, "top-k"),
        ({"top_p": 0.0}, "top-p"),
        ({"top_p": 1.5}, "top-p"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**options)
