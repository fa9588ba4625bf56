"""Matching of clusters against worked cases, all permutations and the dense Hungarian method."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from raydc.clustering.matching import match


def kept(previous, current, taken) -> int:
    """Images that stay in their cluster under its old number."""
    known = (previous >= 0) & (current >= 0)
    return int((taken[current[known]] == previous[known]).sum())


@st.composite
def clusterings(draw):
    k_previous, k_current = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    pairs = draw(st.lists(st.tuples(st.integers(-1, k_previous - 1), st.integers(-1, k_current - 1)), max_size=60))
    previous, current = np.array(pairs, np.int32).reshape(-1, 2).T
    return previous, current, k_previous, k_current


def best_by_trying_all(previous, current, k_previous, k_current) -> int:
    """Previous clusters, and as many times nobody as there are new ones, in every order."""
    places = [*range(k_previous), *[-1] * max(0, k_current - k_previous)]
    orders = itertools.permutations(places, k_current)
    return max(kept(previous, current, np.array(order)) for order in orders)


def test_a_permutation_is_undone():
    previous = np.arange(1000) % 20
    order = np.random.default_rng(0).permutation(20)
    taken = match(previous, order[previous], 20, 20)
    assert taken.dtype == np.int64
    assert np.array_equal(taken[order], np.arange(20))


def test_by_hand_where_greed_would_lose():
    """New 0 shares 5 images with old 0 and 4 with old 1; new 1 shares 4 with old 0 only. Best: 4 + 4, not 5 + 0."""
    previous = np.repeat([0, 1, 0], [5, 4, 4])
    current = np.repeat([0, 0, 1], [5, 4, 4])
    assert match(previous, current, 2, 2).tolist() == [1, 0]


def test_more_new_clusters_than_old_and_fewer():
    previous, current = np.array([0, 0, 0, 1, 1]), np.array([2, 2, 0, 1, 1])
    assert match(previous, current, 2, 4).tolist() == [-1, 1, 0, -1]
    assert match(current, previous, 4, 2).tolist() == [2, 1]


def test_what_shares_no_image_gets_nobody_and_unreadable_ones_do_not_count():
    previous, current = np.array([-1, -1, 0, 1]), np.array([0, 0, 1, -1])
    assert match(previous, current, 2, 3).tolist() == [-1, 0, -1]
    assert match(np.array([-1]), np.array([0]), 5, 2).tolist() == [-1, -1]
    assert match(np.empty(0, np.int32), np.empty(0, np.int32), 2, 2).tolist() == [-1, -1]


@settings(max_examples=80, deadline=None)
@given(clusterings())
def test_no_other_matching_keeps_more_images(case):
    previous, current, k_previous, k_current = case
    taken = match(*case)
    assert taken.shape == (k_current,) and taken.min() >= -1 and taken.max() < k_previous
    given_out = taken[taken >= 0]
    assert len(set(given_out)) == len(given_out), "each at most once"
    for cluster, old in enumerate(taken):
        assert old < 0 or ((current == cluster) & (previous == old)).any(), "none that shares no image"
    assert kept(previous, current, taken) == best_by_trying_all(*case)


@pytest.mark.parametrize("agree", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("power", [0.0, 1.0])
def test_it_keeps_as_many_as_the_hungarian_method(agree, power):
    """30,000 images, 300 old clusters, 260 new ones, sizes equal or by Zipf's law."""
    rng = np.random.default_rng(1)
    share = np.arange(1, 301) ** -power
    previous = rng.choice(300, 30_000, p=share / share.sum())
    current = np.where(rng.random(30_000) < agree, rng.permutation(300)[previous], rng.integers(0, 300, 30_000)) % 260
    table = np.zeros((260, 300))
    np.add.at(table, (current, previous), 1)
    best = table[linear_sum_assignment(table, maximize=True)].sum()
    assert kept(previous, current, match(previous, current, 300, 260)) == best
