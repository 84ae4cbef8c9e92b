"""Which corpus a sample comes from: the shares hold, every row once an epoch of its corpus, any cut gives the same."""

import itertools

import numpy as np
import pytest

from sutrain.mixture import PERIOD, Mixture, MixtureError


def test_shares_hold_in_every_period_and_are_shuffled_inside():
    mixture = Mixture((3.0, 1.0), seed=4)
    assert mixture.places == (768, 256)
    orders = [mixture.assign(period * PERIOD, PERIOD)[0] for period in (0, 1)]
    for corpus_N in orders:
        assert np.bincount(corpus_N).tolist() == [768, 256]
    assert (orders[0] != orders[1]).any() and (orders[0] != np.sort(orders[0])).any()
    assert (Mixture((3.0, 1.0), seed=5).assign(0, PERIOD)[0] != orders[0]).any()


def test_the_samples_of_each_corpus_are_numbered_without_gap_or_repetition():
    corpus_N, number_N = Mixture((5, 2, 1), seed=0).assign(0, 5 * PERIOD)
    for corpus in range(3):
        mine = number_N[corpus_N == corpus]
        assert (mine == np.arange(len(mine))).all()


def test_any_cut_gives_the_same():
    mixture = Mixture((0.7, 0.3), seed=1)
    whole = mixture.assign(PERIOD - 100, 2 * PERIOD)
    cuts = (0, 1, 99, 100, 101, 1500, 2 * PERIOD)
    parts = [mixture.assign(PERIOD - 100 + a, b - a) for a, b in itertools.pairwise(cuts)]
    for index in (0, 1):
        assert (np.concatenate([part[index] for part in parts]) == whole[index]).all()


@pytest.mark.parametrize("weights", [(1.0, 0.0), (1.0, -1.0), (1.0, 1e-5)])
def test_a_corpus_that_would_never_be_read_is_refused(weights):
    with pytest.raises(MixtureError, match="weights"):
        Mixture(weights, seed=0)
