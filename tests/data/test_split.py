import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchlm.data.order import choose_held_out, choose_tail

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


def tail(hashes, lengths, share=0.01, least=50):
    hashes, lengths = np.array(hashes, dtype=np.uint64), np.array(lengths)
    [chosen] = choose_held_out([hashes], [lengths], share, least)
    return chosen, choose_tail(hashes, lengths, chosen, share, least)


def test_the_end_of_a_single_document_is_held_out():
    chosen, found = tail([2**63], [1500])
    assert (chosen.any(), found) == (False, (0, 50))
    assert tail([2**63], [1500], share=0.5)[1] == (0, 750)
    assert tail([2**63], [99])[1] is None  # a row to train on would be missing
    assert tail([2**63], [1500], share=0.0)[1] is None


def test_a_document_that_its_hash_holds_out_is_split_too_if_it_is_all_there_is():
    chosen, found = tail([5], [1500], share=0.1)
    assert (chosen.any(), found) == (False, (0, 150))


def test_of_few_large_documents_the_end_of_one_is_held_out():
    hashes = [2**63 + 2, 2**63 + 1, 2**63 + 3]
    chosen, found = tail(hashes, [100_000, 90_000, 120_000])
    assert (chosen.any(), found) == (False, (1, 3100))
    # A small one is held out whole, and the rest is of the next.
    chosen, found = tail([2**63 + 2, 2**63 + 1, 2**63 + 3], [100_000, 90, 120_000], least=2000)
    assert (chosen.tolist(), found) == ([False, True, False], (0, 2200 - 90))


def test_a_document_that_is_there_twice_is_not_split():
    assert tail([2**63, 2**63, 2**63 + 1], [10_000] * 3)[1] == (2, 300)
    assert tail([2**63, 2**63], [10_000] * 2)[1] is None


@given(HASHES, st.integers(1, 4000), st.floats(0.001, 0.5))
def test_no_more_than_twice_the_wanted_tokens_are_added(hashes, least, share):
    chosen, found = tail(hashes, [500 + value % 1000 for value in hashes], share, least)
    lengths = np.array([500 + value % 1000 for value in hashes])
    by_hash = np.array([value < share * 2.0**64 for value in hashes])
    by_hash &= lengths[~by_hash].sum() >= least
    kept = lengths[chosen].sum() + (found[1] if found else 0)
    wanted = max(share * lengths.sum(), least)
    assert kept <= max(lengths[by_hash].sum(), 2 * wanted) + 1
    if found:
        assert found[1] < lengths[found[0]]
        assert lengths.sum() - kept >= least


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
