from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from switchlm.data.pretraining.rows import RunningText, running_rows
from switchlm.data.text.token_cache import TokenCache


def cache_of(lengths):
    """A cache whose token at every place is that place."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TokenCache(
        folder=Path(),
        tokens=np.arange(offsets[-1], dtype=np.uint32),
        offsets=offsets,
        hashes_D=np.zeros(len(lengths), dtype=np.uint64),
        skipped="",
    )


def tokens_of(rows, index):
    return running_rows([rows], np.zeros_like(index), index).tokens_EL


@given(
    st.lists(st.tuples(st.integers(2, 30), st.booleans()), min_size=1, max_size=20),
    st.integers(2, 25),
    st.integers(0, 5),
)
def test_rows_are_consecutive_text_of_the_chosen_documents_and_no_other(documents, length, seed):
    lengths, chosen = np.array([n for n, _ in documents]), np.array([c for _, c in documents])
    cache = cache_of(lengths)
    parts = [cache.tokens[cache.offsets[d] : cache.offsets[d + 1]] for d in np.flatnonzero(chosen)]
    text = np.concatenate([np.zeros(0, dtype=np.uint32), *parts])
    rows = RunningText(cache, chosen, length, seed)
    assert rows.num_tokens == len(text)
    assert rows.num_rows == len(text) // length
    if not rows.num_rows:
        return
    place = {int(token): at for at, token in enumerate(text)}
    for epoch in range(3):
        found = tokens_of(rows, np.arange(rows.num_rows) + epoch * rows.num_rows)
        at = np.vectorize(place.__getitem__)(found)
        assert ((at[:, 1:] - at[:, :-1]) % len(text) == 1 % len(text)).all()
        # 0 repeated over an epoch; what is left over is less than a row.
        assert len(np.unique(at)) == rows.num_rows * length


def test_passes_are_shuffled_and_cut_elsewhere():
    rows = RunningText(cache_of([1000]), np.array([True]), 10, seed=1)
    first = tokens_of(rows, np.arange(100))[:, 0]
    second = tokens_of(rows, np.arange(100, 200))[:, 0]
    assert not np.array_equal(first, np.sort(first))
    assert first[0] % 10 != second[0] % 10
    other = RunningText(cache_of([1000]), np.array([True]), 10, seed=2)
    assert not np.array_equal(first, tokens_of(other, np.arange(100))[:, 0])


def test_a_row_does_not_depend_on_the_other_rows_of_a_call():
    rows = RunningText(cache_of([300, 200]), np.array([True, True]), 10, seed=1)
    together = tokens_of(rows, np.arange(200))
    for index in (0, 49, 50, 199):
        assert together[index].tolist() == tokens_of(rows, np.array([index]))[0].tolist()
