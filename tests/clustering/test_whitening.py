"""PCA and whitening from sums, against faiss and scikit-learn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from raydc.clustering.whitening import Moments, fit_whitening, l2, moments

DIM = 32


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    """1,797 real 8 x 8 images; three of their 64 pixels are always zero."""
    return load_digits().data.astype(np.float32)


def with_signs_of(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """``ours`` with each column turned to the side of ``theirs``."""
    return ours * np.sign((ours * theirs).sum(0))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 1797), max_size=5), st.integers(1, 700))
def test_sums_over_pieces_are_the_sum_over_all(digits, cuts, rows):
    pieces = np.split(digits, sorted(cuts))
    total = sum((moments(piece, rows) for piece in pieces[1:]), start=moments(pieces[0], rows))
    exact = digits.astype(np.float64)  # whole numbers: every order of adding is exact
    assert total.count == 1797
    assert np.array_equal(total.total_D, exact.sum(0))
    assert np.array_equal(total.gram_DD, exact.T @ exact)


def test_a_worker_without_images_adds_nothing(digits):
    none = moments(np.empty((0, 64), np.float32))
    assert isinstance(none, Moments) and none.count == 0
    assert np.array_equal((none + moments(digits)).gram_DD, moments(digits).gram_DD)


def test_whitening_is_faiss_pca_matrix(digits):
    import faiss

    theirs = faiss.PCAMatrix(64, DIM, -0.5, False)
    theirs.train(digits)
    expected = theirs.apply(digits) * np.sqrt(len(digits))  # faiss divides by the sum of squares, not by their mean
    ours = fit_whitening(moments(digits), DIM)
    assert np.allclose(with_signs_of(ours.project(digits), expected), expected, atol=2e-3)
    rows = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.allclose(with_signs_of(ours(digits), rows), rows, atol=1e-3)


def test_without_whitening_it_is_sklearns_pca(digits):
    expected = PCA(DIM, svd_solver="full").fit_transform(digits.astype(np.float64))
    ours = fit_whitening(moments(digits), DIM, whiten=False).project(digits)
    assert np.allclose(with_signs_of(ours, expected), expected, atol=1e-3)


def test_whitened_rows_are_uncorrelated_with_variance_one(digits):
    white = fit_whitening(moments(digits), DIM).project(digits)
    assert np.allclose(white.mean(0), 0, atol=1e-4)
    assert np.allclose(np.cov(white.T, bias=True), np.eye(DIM), atol=1e-3)


def test_rows_have_length_one_and_float32(digits):
    rows = fit_whitening(moments(digits), DIM)(digits)
    assert rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert (l2(np.zeros((1, 4), np.float32)) == 0).all(), "a zero row stays zero, not NaN"


def test_strong_directions_come_first(digits):
    spread = fit_whitening(moments(digits), 64, whiten=False).project(digits).std(0)
    assert (np.diff(spread) <= 1e-4).all()


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_dead_directions_are_zero_and_counted(digits, rank):
    """Real features pressed through ``rank`` directions, in 64 dimensions again: 30 - rank of 30 hold nothing."""
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(64, rank)))[0]
    features = ((digits.astype(np.float64) @ basis) @ basis.T).astype(np.float32)
    whitening = fit_whitening(moments(features), 30)
    white = whitening.project(features)
    assert whitening.num_negligible == 30 - rank
    assert np.isfinite(white).all() and np.isfinite(whitening(features)).all()
    assert np.allclose(white[:, :rank].std(0), 1, atol=1e-2)
    assert (white[:, rank:] == 0).all()


def test_constant_features_do_not_become_noise():
    """A collapsed network: every image has the same features, so no direction holds anything."""
    features = np.tile(np.random.default_rng(0).uniform(0.1, 3, 64).astype(np.float32), (500, 1))
    whitening = fit_whitening(moments(features), 16)
    assert whitening.num_negligible == 16
    assert np.abs(whitening(features)).max() == 0


def test_more_dimensions_than_there_are_is_all_of_them(digits):
    assert fit_whitening(moments(digits), 256).matrix_Dd.shape == (64, 64)
    assert fit_whitening(moments(digits), 256).num_negligible == 3, "the three pixels that are always zero"


# --- the norm, and no PCA at all -----------------------------------------------------------------------------------------


def root_mean_square_length(rows: np.ndarray) -> float:
    return float(np.sqrt((rows.astype(np.float64) ** 2).sum(1).mean()))


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("dim", [1, 32, 64, 256])
def test_the_norm_is_the_root_mean_square_length_before_the_l2(digits, dim, whiten):
    ours = fit_whitening(moments(digits), dim, whiten)
    assert isinstance(ours.norm, float)
    assert ours.norm == pytest.approx(root_mean_square_length(ours.project(digits)), rel=1e-3)


def test_the_norm_of_whitened_digits_is_the_root_of_their_useful_directions(digits):
    assert fit_whitening(moments(digits), 32).norm == pytest.approx(np.sqrt(32))
    assert fit_whitening(moments(digits), 256).norm == pytest.approx(np.sqrt(61)), "three pixels are always zero"


def test_without_whitening_all_directions_hold_the_total_variance(digits):
    assert fit_whitening(moments(digits), 64, whiten=False).norm == pytest.approx(np.sqrt(digits.var(0).sum()), rel=1e-5)


def test_constant_features_have_no_length_left():
    whitening = fit_whitening(moments(np.full((500, 64), 0.7, np.float32)), 16)
    assert whitening.norm == 0


@pytest.mark.parametrize("whiten", [True, False])
def test_dim_0_leaves_the_features_as_they_are(digits, whiten):
    raw = fit_whitening(moments(digits), 0, whiten)
    assert raw.matrix_Dd is None and raw.num_negligible == 0
    assert np.array_equal(raw.mean_D, np.zeros(64)) and raw.mean_D.dtype == np.float32
    assert np.array_equal(raw.project(digits), digits)
    assert np.allclose(raw(digits), digits / np.linalg.norm(digits, axis=1, keepdims=True), atol=1e-6)
    assert raw(digits).dtype == np.float32
    assert raw.norm == pytest.approx(root_mean_square_length(digits), rel=1e-6)


def test_by_hand_what_dim_0_keeps():
    """Rows of lengths 5 and 1: the root of (25 + 1) / 2."""
    raw = fit_whitening(moments(np.array([[3, 4], [1, 0]], np.float32)), dim=0, whiten=False)
    assert raw.norm == pytest.approx(np.sqrt(13))
    assert np.allclose(raw(np.array([[6, 8]], np.float32)), [[0.6, 0.8]])
