"""k-means against faiss called directly, and against arithmetic."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from raydc.clustering.kmeans import kmeans
from raydc.clustering.whitening import fit_whitening, moments

K = 100


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    """1,797 real digits, whitened and on the sphere: what a run clusters."""
    digits = load_digits().data.astype(np.float32)
    return fit_whitening(moments(digits), 32)(digits)


@pytest.mark.parametrize("seed", [0, 5, 2**40 + 3])
def test_it_is_faiss(features, seed):
    """Protocol 1a: 20 iterations, no subsampling, labels by one more search."""
    import faiss

    theirs = faiss.Kmeans(
        32, K, niter=20, seed=seed % 2**31, max_points_per_centroid=10_000_000, gpu=faiss.get_num_gpus() > 0
    )
    theirs.train(features)
    distances, labels = theirs.index.search(features, 1)
    ours = kmeans(features, K, iterations=20, seed=seed)
    assert np.array_equal(ours.labels_N, labels[:, 0])
    assert np.array_equal(ours.centroids_kd, theirs.centroids)
    assert np.allclose(ours.distances_N, distances[:, 0], atol=1e-6)
    assert np.allclose(ours.objectives, theirs.obj)


def test_no_point_is_left_out_however_large_the_clusters():
    """faiss trains on 256 points a cluster unless told otherwise. 300 of 3,000 are far away: a sample's mean moves."""
    points = np.zeros((3000, 2), np.float32)
    points[:300] = 10
    ours = kmeans(points, 1, iterations=2, seed=0)
    assert np.allclose(ours.centroids_kd, 1.0)


def test_the_objective_never_rises(features):
    ours = kmeans(features, K, iterations=30, seed=1)
    assert 5 < len(ours.objectives) <= 30, "faiss stops where nothing moves any more"
    assert (np.diff(ours.objectives) <= 1e-5 * ours.objectives[0]).all()
    assert ours.objective <= ours.objectives[-1] * (1 + 1e-5)
    assert ours.objective < 0.95 * ours.objectives[0]


def test_labels_are_the_nearest_centroid_and_distances_theirs(features):
    ours = kmeans(features, K, seed=2)
    squared = ((features[:, None].astype(np.float64) - ours.centroids_kd[None]) ** 2).sum(2)
    own = squared[np.arange(len(features)), ours.labels_N]
    assert np.allclose(own, squared.min(1), atol=1e-5)
    assert np.allclose(ours.distances_N, own, atol=1e-5)
    assert np.isclose(ours.objective, squared.min(1).sum(), rtol=1e-5)
    assert ours.labels_N.dtype == np.int32


def test_centroids_are_the_means_of_their_points_once_nothing_moves(features):
    ours = kmeans(features, 10, iterations=200, seed=3)
    for cluster, centroid in enumerate(ours.centroids_kd):
        assert np.allclose(centroid, features[ours.labels_N == cluster].mean(0), atol=1e-4)


def test_distances_are_never_negative():
    points = np.repeat(np.random.default_rng(0).normal(100, 1e-3, (20, 16)).astype(np.float32), 10, axis=0)
    assert (kmeans(points, 20, seed=0).distances_N >= 0).all()


def test_seeds_start_elsewhere(features):
    a, b, c = (kmeans(features, K, seed=seed).labels_N for seed in (1, 1, 2))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_threads_change_no_bit(features):
    one, two = (kmeans(features, K, seed=4, threads=threads) for threads in (1, 2))
    assert np.array_equal(one.centroids_kd, two.centroids_kd)
    assert np.array_equal(one.labels_N, two.labels_N)
    assert np.array_equal(one.distances_N, two.distances_N)


def test_as_many_clusters_as_points_is_fine_one_more_is_not():
    points = np.eye(5, dtype=np.float32)
    assert sorted(kmeans(points, 5).labels_N) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="num_clusters 6 is above the number of images 5; lower clustering.num_clusters"):
        kmeans(points, 6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_refused(features, value):
    spoilt = features.copy()
    spoilt[77, 3] = value
    with pytest.raises(ValueError, match="not finite; lower train.lr"):
        kmeans(spoilt, K)
