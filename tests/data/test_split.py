import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchlm.data.order import choose_held_out

HASHES = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=50)


def choose(hashes, share=0.1, least=0, length=100):
    hashes = np.array(hashes, dtype=np.uint64)
    [chosen] = choose_held_out([hashes], [np.full(len(hashes), length)], share, least)
    return chosen


@given(HASHES, HASHES, st.floats(0.0, 0.5))
def test_more_documents_move_none(hashes, others, share):
    alone = choose(hashes, share)
    among = choose(hashes + others, share)
    assert alone.tolist() == among[: len(hashes)].tolist()


def test_the_held_out_share_is_about_the_setting():
    hashes = np.random.default_rng(0).integers(0, 2**64, size=20_000, dtype=np.uint64)
    assert choose(hashes, 0.03).mean() == pytest.approx(0.03, abs=0.005)
    assert not choose(hashes, 0.0).any()


@given(HASHES, st.integers(0, 3000))
def test_equal_documents_stay_together_and_training_keeps_half(hashes, least):
    hashes = hashes + hashes[:3]
    chosen = choose(hashes, 0.0001, least)
    for value in set(hashes):
        assert len({bool(c) for c, h in zip(chosen, hashes, strict=True) if h == value}) == 1
    assert chosen.sum() <= max(len(hashes) / 2, sum(h < 2**64 * 0.0001 for h in hashes))


def test_a_small_corpus_still_holds_out_a_row():
    hashes = [2**63 + number for number in range(10)]
    assert choose(hashes, 0.01, least=250).sum() == 3
    assert choose(hashes, 0.01, least=10**9).sum() == 5


def test_a_single_document_is_for_training():
    assert not choose([2**63], 0.01, least=50).any()


@given(st.lists(HASHES, min_size=1, max_size=4), st.floats(0.0, 0.5), st.integers(0, 500))
def test_a_group_is_held_out_in_all_sources_or_in_none(sources, share, least):
    hashes_SD = [np.array(hashes, dtype=np.uint64) for hashes in sources]
    lengths_SD = [np.full(len(hashes), 100) for hashes in sources]
    chosen_SD = choose_held_out(hashes_SD, lengths_SD, share, least, aligned=True)
    held_out = {value for h, c in zip(hashes_SD, chosen_SD, strict=True) for value in h[c]}
    trained = {value for h, c in zip(hashes_SD, chosen_SD, strict=True) for value in h[~c]}
    assert not held_out & trained
    alone_SD = choose_held_out(hashes_SD, lengths_SD, share, least)
    for alone_D, chosen_D in zip(alone_SD, chosen_SD, strict=True):
        assert (chosen_D >= alone_D).all()
