import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchlm.data.order import hash_numbers
from switchlm.data.pretraining.span_corruption import Noise, corrupt, noise_mask
from switchlm.errors import DataError

END = 1
SENTINELS = np.arange(999, 899, -1)
NOISES = st.builds(Noise, density=st.floats(0.05, 0.6), mean_span=st.floats(1.0, 8.0))
ROOMY = st.builds(Noise, density=st.floats(0.05, 0.5), mean_span=st.floats(2.0, 8.0))


def slow_corrupt(tokens, mask):
    """Span corruption token by token, the oracle."""
    inputs, targets, spans = [], [], 0
    for place, token in enumerate(tokens):
        if not mask[place]:
            inputs.append(token)
            continue
        if place == 0 or not mask[place - 1]:
            inputs.append(SENTINELS[spans])
            targets.append(SENTINELS[spans])
            spans += 1
        targets.append(token)
    return [*inputs, END], [*targets, END]


def restore(inputs, targets):
    """Replace every sentinel in the inputs by its span of the targets."""
    spans, current = {}, None
    for token in targets[:-1]:
        if token in SENTINELS:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    return [piece for token in inputs[:-1] for piece in spans.get(token, [token])]


def split(values, lengths):
    return [part.tolist() for part in np.split(values, np.cumsum(lengths)[:-1])]


def examples(lengths, noise, key=0):
    chance = random.Random(key)
    lengths = np.array(lengths)
    tokens = np.array(
        [[chance.randrange(2, 800) for _ in range(lengths.max())] for _ in lengths], dtype=np.int64
    )
    mask = noise_mask(lengths, noise, hash_numbers(key, np.arange(len(lengths))))
    return tokens, lengths, mask, corrupt(tokens, lengths, mask, SENTINELS, END)


@given(st.lists(st.integers(2, 90), min_size=1, max_size=6), NOISES, st.integers(0, 999))
def test_the_fast_path_equals_the_slow_one_and_the_inverse_restores_the_text(lengths, noise, key):
    tokens, lengths, mask, fast = examples(lengths, noise, key)
    inputs = split(fast.inputs, fast.input_length_N)
    targets = split(fast.targets, fast.target_length_N)
    for row, length in enumerate(lengths):
        text = tokens[row, :length].tolist()
        assert (inputs[row], targets[row]) == slow_corrupt(text, mask[row])
        assert restore(inputs[row], targets[row]) == text
    expected = noise.corrupted_lengths(lengths)
    assert fast.input_length_N.tolist() == expected[0].tolist()
    assert fast.target_length_N.tolist() == expected[1].tolist()


@given(st.integers(2, 300), NOISES, st.integers(0, 999))
def test_a_mask_keeps_the_counts_and_begins_kept_and_ends_masked(length, noise, key):
    mask = noise_mask(np.array([length]), noise, hash_numbers(key, np.arange(1)))[0]
    (masked,), (spans,) = noise.counts(np.array([length]))
    assert mask.sum() == masked
    assert (mask[1:] & ~mask[:-1]).sum() == spans
    assert not mask[0]
    assert mask[-1]


def test_the_lengths_are_those_of_t5():
    # t5.data.preprocessors.random_spans_helper(512, 0.15, 3.0) gives 568 tokens and 114 targets.
    noise = Noise(density=0.15, mean_span=3.0)
    assert noise.raw_length(512) == 568
    assert [int(part[0]) for part in noise.corrupted_lengths(np.array([568]))] == [512, 114]


@given(st.integers(12, 700), ROOMY)
def test_raw_length_fills_the_row_exactly_and_is_the_longest_that_does(input_length, noise):
    raw = noise.raw_length(input_length)
    after = noise.corrupted_lengths(np.array([raw, raw + 1]))[0]
    assert after[0] == input_length
    assert after[1] > input_length


def test_a_row_that_no_text_fills_is_refused():
    with pytest.raises(DataError, match="Use longer rows"):
        Noise(density=0.15, mean_span=1.0).raw_length(2)


def test_masks_are_a_function_of_the_key_alone():
    noise = Noise(density=0.3, mean_span=2.0)
    keys = hash_numbers(3, np.arange(5))
    lengths = np.array([40, 11, 40, 7, 23])
    together = noise_mask(lengths, noise, keys)
    for row, length in enumerate(lengths):
        alone = noise_mask(lengths[row : row + 1], noise, keys[row : row + 1])[0]
        assert together[row, :length].tolist() == alone.tolist()
        assert not together[row, length:].any()
    other = noise_mask(lengths[:1], noise, hash_numbers(4, np.arange(1)))[0]
    assert other.tolist() != together[0, :40].tolist()


def test_every_way_to_cut_is_equally_likely():
    # 6 tokens, 3 masked in 2 spans: 2 ways to cut the kept ones times 2 ways to cut the masked.
    noise = Noise(density=0.5, mean_span=1.5)
    draws = 8000
    masks = noise_mask(np.full(draws, 6), noise, hash_numbers(0, np.arange(draws)))
    _, counts = np.unique(masks, axis=0, return_counts=True)
    assert len(counts) == 4
    assert np.abs(counts - draws / 4).max() < 5 * math.sqrt(draws * 3 / 16)


@given(st.integers(200, 5000), st.integers(1, 100))
def test_spans_are_no_more_than_the_sentinels_and_mask_as_many_tokens(length, sentinels):
    few = Noise(density=0.15, mean_span=3.0, most_spans=sentinels)
    many = Noise(density=0.15, mean_span=3.0, most_spans=10**6)
    (masked,), (spans,) = few.counts(np.array([length]))
    assert spans == min(sentinels, many.counts(np.array([length]))[1][0])
    assert masked == many.counts(np.array([length]))[0][0]
    mask = noise_mask(np.array([length]), few, hash_numbers(length, np.arange(1)))[0]
    assert ((mask[1:] & ~mask[:-1]).sum(), mask.sum()) == (spans, masked)
