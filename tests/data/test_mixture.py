import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchlm.data.order import BLOCK, Mixture, probabilities
from switchlm.errors import DataError


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=6), st.integers(0, 99))
def test_every_sample_of_a_source_comes_once_and_in_order(weights, seed):
    shares = np.array(weights) / sum(weights)
    source_N, index_N = Mixture(shares, seed).assign(np.arange(BLOCK + 5000))
    for source in range(len(shares)):
        mine = index_N[source_N == source]
        assert mine.tolist() == list(range(len(mine)))


def test_shares_hold_in_every_stretch_not_only_on_average():
    shares = np.array([0.7, 0.2, 0.1])
    source_N, _ = Mixture(shares, 3).assign(np.arange(4 * BLOCK))
    counts = np.stack([source_N.reshape(-1, 64) == s for s in range(3)]).sum(axis=2)
    assert np.abs(counts - 64 * shares[:, None]).max() <= 3


def test_samples_can_be_computed_alone():
    mixture = Mixture(np.array([0.5, 0.3, 0.2]), 1)
    source_N, index_N = mixture.assign(np.arange(2 * BLOCK))
    wanted = np.array([2 * BLOCK - 1, 5, BLOCK, 77])
    again = Mixture(np.array([0.5, 0.3, 0.2]), 1).assign(wanted)
    assert (again[0].tolist(), again[1].tolist()) == (
        source_N[wanted].tolist(),
        index_N[wanted].tolist(),
    )


def test_a_rare_source_still_comes_and_an_absent_one_never():
    source_N, _ = Mixture(np.array([1 - 1e-7, 1e-7, 0.0]), 0).assign(np.arange(BLOCK))
    assert np.bincount(source_N, minlength=3).tolist() == [BLOCK - 1, 1, 0]


def test_proportional_temperature_and_weights():
    sizes = [1000, 10]
    assert probabilities(sizes, [None, None], "proportional", 0.3) == pytest.approx(
        [1000 / 1010, 10 / 1010]
    )
    hot = probabilities(sizes, [None, None], "temperature", 0.3)
    assert hot[0] / hot[1] == pytest.approx(100**0.3)
    assert probabilities(sizes, [3.0, 1.0], "proportional", 0.3) == pytest.approx([0.75, 0.25])


@pytest.mark.parametrize(
    ("weights", "mixing", "message"),
    [
        ([0.7, None], "proportional", "1 of 2 data sources have a weight"),
        ([None, None], "weights", "0 of 2 data sources have a weight"),
        ([0.7, 0.3], "temperature", "Drop the weights"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, mixing, message):
    with pytest.raises(DataError, match=message):
        probabilities([1, 1], weights, mixing, 0.3)
