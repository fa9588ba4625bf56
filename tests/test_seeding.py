"""Random numbers that hang on (seed, image_id, draw, column) and on nothing else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from raydc.seeding import derive, random_bits, uniforms

IDS = np.arange(20_000)
PUBLISHED = [16294208416658607535, 7960286522194355700, 487617019471545679]  # outputs of splitmix64 for state 0
seeds = st.integers(0, 2**63 - 1)


def test_derive_is_the_first_63_bits_of_blake2b():
    """Bytes from coreutils: printf 7/kmeans/3 | b2sum -l 64, read from the last byte to the first, halved."""
    assert derive(7, "kmeans", 3) == 0xBA9A9F9B2173FACC >> 1
    assert derive(0, "plan", 12) == 0x8820920E20377783 >> 1


def test_derive_gives_every_purpose_its_own_seed():
    found = {derive(s, p, e) for s in range(10) for p in ("kmeans", "plan", "head") for e in range(200)}
    assert len(found) == 10 * 3 * 200
    assert all(0 <= one < 2**63 for one in found)


def test_first_numbers_are_splitmix64s():
    """The published outputs of splitmix64 for state 0; the state of (0, 0, 0) is 0, which the mixer leaves alone."""
    assert uniforms(0, np.array([0]), 0, 3)[0].tolist() == [(one >> 11) / 2**53 for one in PUBLISHED]


def test_random_bits_are_splitmix64s():
    """Images in turn are its sequence; further draws of an image are the sequence that begins at its first number."""
    assert random_bits(0, np.arange(1, 4)).tolist() == PUBLISHED
    first = int(random_bits(9, np.array([5]))[0])
    assert random_bits(9, np.full(4, 5), np.arange(4)).tolist() == [first, *random_bits(first, np.arange(1, 4)).tolist()]
    assert random_bits(9, np.array([5, 7]), 2).tolist() == random_bits(9, np.array([5, 7]), np.array([2, 2])).tolist()


@pytest.mark.parametrize("seed", [0, 1, 2**62 + 5])
def test_uniform_along_every_coordinate(seed):
    along = {
        "image_ids": uniforms(seed, IDS)[:, 0],
        "draws": uniforms(seed, np.full(20_000, 3), IDS)[:, 0],
        "columns": uniforms(seed, np.array([3]), 0, 20_000)[0],
        "seeds": np.array([uniforms(seed // 2 + s, np.array([3]))[0, 0] for s in range(3000)]),
    }
    for coordinate, values in along.items():
        assert stats.kstest(values, "uniform").pvalue > 1e-3, coordinate
        assert values.min() >= 0 and values.max() < 1


@pytest.mark.parametrize("lag", [1, 2, 256, 4096])
def test_neighbours_are_uncorrelated(lag):
    values = uniforms(11, IDS, 0, 2)
    assert abs(stats.spearmanr(values[:-lag, 0], values[lag:, 0]).statistic) < 0.03
    assert abs(stats.spearmanr(values[:, 0], values[:, 1]).statistic) < 0.03


def test_no_two_coordinates_share_a_number():
    values = [uniforms(s, np.repeat(np.arange(50), 20), np.tile(np.arange(20), 50), 8) for s in range(20)]
    assert len(np.unique(np.concatenate(values))) == 20 * 50 * 20 * 8


@settings(max_examples=60, deadline=None)
@given(seeds, st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 10_000)), min_size=1, max_size=40), st.data())
def test_batches_and_order_change_nothing(seed, rows, data):
    ids, draws = (np.array(column) for column in zip(*rows, strict=True))
    whole = uniforms(seed, ids, draws, 5)
    order = np.array(data.draw(st.permutations(range(len(rows)))))
    cut = data.draw(st.integers(0, len(rows)))
    pieces = [uniforms(seed, ids[part], draws[part], 5) for part in (order[:cut], order[cut:])]
    assert np.array_equal(np.concatenate(pieces), whole[order])
    assert np.array_equal(uniforms(seed, ids, draws, 2), whole[:, :2]), "more columns change no earlier one"
