"""k-means against faiss called directly, scikit-learn, and arithmetic."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans as SklearnKMeans
from sklearn.datasets import load_digits

from raydc.clustering.kmeans import _fill_empty, kmeans, means
from raydc.clustering.whitening import fit_whitening, l2, moments

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


# --- spherical -----------------------------------------------------------------------------------------------------------


def test_spherical_is_faiss_with_an_inner_product_index(features):
    import faiss

    theirs = faiss.Kmeans(32, K, niter=20, seed=3, max_points_per_centroid=10_000_000, spherical=True)
    theirs.train(features)
    ours = kmeans(features, K, seed=3, spherical=True)
    products, labels = theirs.index.search(features, 1)
    assert np.array_equal(ours.labels_N, labels[:, 0])
    assert np.array_equal(ours.centroids_kd, theirs.centroids)
    assert np.allclose(ours.distances_N, 2 - 2 * products[:, 0], atol=1e-5)
    assert np.allclose(ours.objectives, 2 * len(features) - 2 * np.array(theirs.obj), rtol=1e-4)


def test_spherical_centroids_are_the_directions_of_their_means(features):
    ours = kmeans(features, 10, iterations=200, seed=3, spherical=True)
    assert np.allclose(np.linalg.norm(ours.centroids_kd, axis=1), 1, atol=1e-5)
    assert np.allclose(ours.centroids_kd, l2(means(features, ours.labels_N, 10)), atol=1e-4)


def test_spherical_distances_are_squared_l2_and_labels_sklearns_assignment(features):
    """On unit rows the nearest by L2 is the nearest by cosine: scikit-learn's k-means predicts from these centroids."""
    ours = kmeans(features, K, seed=4, spherical=True)
    judge = SklearnKMeans(K, init=ours.centroids_kd, n_init=1, max_iter=1).fit(ours.centroids_kd)
    judge.cluster_centers_ = ours.centroids_kd.astype(np.float32)
    assert np.array_equal(judge.predict(features), ours.labels_N)
    exact = ((features.astype(np.float64) - ours.centroids_kd[ours.labels_N]) ** 2).sum(1)
    assert np.allclose(ours.distances_N, exact, atol=1e-5)


def test_spherical_of_zero_rows_is_finite():
    """A collapsed network, whitened: every row is zero."""
    ours = kmeans(np.zeros((50, 4), np.float32), 5, spherical=True)
    assert np.isfinite(ours.centroids_kd).all() and (ours.distances_N == 0).all()


# --- warm start ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spherical", [False, True])
def test_a_warm_start_goes_on_where_the_last_one_ended(features, spherical):
    cold = kmeans(features, K, iterations=200, seed=5, spherical=spherical)
    start = means(features, cold.labels_N, K)
    warm = kmeans(features, K, iterations=5, seed=6, spherical=spherical, start_kd=start)
    assert np.array_equal(warm.labels_N, cold.labels_N)
    assert np.isclose(warm.objective, cold.objective, rtol=1e-5)


def test_a_warm_start_is_sklearns_lloyd(features):
    """From the same centroids and as long as no cluster runs empty, the algorithm has nothing left to choose."""
    start = features[:20].copy()
    theirs = SklearnKMeans(20, init=start, n_init=1, max_iter=8, tol=0, algorithm="lloyd").fit(features)
    ours = kmeans(features, 20, iterations=8, seed=9, start_kd=start)
    assert (ours.labels_N == theirs.labels_).mean() > 0.999
    assert np.isclose(ours.objective, theirs.inertia_, rtol=1e-4)


@pytest.mark.parametrize("spherical", [False, True])
def test_the_objective_never_rises_from_a_warm_start_either(features, spherical):
    start = means(features, load_digits().target, 10)
    ours = kmeans(features, 10, iterations=30, seed=1, start_kd=start, spherical=spherical)
    assert len(ours.objectives) > 2
    assert (np.diff(ours.objectives) <= 1e-5 * ours.objectives[0]).all()
    assert ours.objective <= ours.objectives[-1] * (1 + 1e-5)


def test_centroids_that_are_missing_begin_at_images_of_the_seed(features):
    start = means(features, load_digits().target, 12)  # two more clusters than digits
    assert np.isnan(start[10:]).all() and np.isfinite(start[:10]).all()
    one, same, other = (kmeans(features, 12, iterations=3, seed=seed, start_kd=start) for seed in (1, 1, 2))
    assert np.isfinite(one.centroids_kd).all()
    assert (np.bincount(one.labels_N, minlength=12) > 0).all()
    assert np.array_equal(one.centroids_kd, same.centroids_kd)
    assert not np.array_equal(one.centroids_kd, other.centroids_kd)
    assert np.isnan(start[10:]).all(), "the caller's array is left alone"


def test_a_start_of_another_shape_is_refused(features):
    with pytest.raises(ValueError, match=r"begin with are \(9, 32\), not \(10, 32\)"):
        kmeans(features, 10, start_kd=features[:9])


# --- means ---------------------------------------------------------------------------------------------------------------


def test_means_by_hand():
    points = np.array([[1, 2], [3, 6], [100, 100], [5, 5]], np.float32)
    found = means(points, np.array([2, 2, -1, 0]), 4)
    assert found.dtype == np.float32
    assert np.array_equal(found, np.array([[5, 5], [np.nan] * 2, [2, 4], [np.nan] * 2]), equal_nan=True)


def test_means_are_exact_where_float32_sums_are_not():
    """100,000 values of 1000.1: a float32 sum drifts by parts in a thousand, the mean must not."""
    points = np.full((100_000, 130), 1000.1, np.float32)
    assert (means(points, np.zeros(100_000, np.int32), 1) == np.float32(1000.1)).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 150), st.integers(1, 9), st.integers(0, 2**32))
def test_means_are_numpys(num, dim, k, seed):
    rng = np.random.default_rng(seed)
    points, labels = rng.normal(size=(num, dim)).astype(np.float32), rng.integers(-1, k, num)
    found = means(points, labels, k)
    for cluster in range(k):
        own = points[labels == cluster].astype(np.float64)
        assert np.allclose(found[cluster], own.mean(0) if len(own) else np.nan, equal_nan=True, atol=1e-6)


# --- empty clusters ------------------------------------------------------------------------------------------------------


def left_empty(points: np.ndarray, k: int, **options) -> tuple[np.ndarray, float]:
    """What faiss alone leaves: sizes of its clusters and the sum of squared distances."""
    import faiss

    theirs = faiss.Kmeans(points.shape[1], k, max_points_per_centroid=10_000_000, min_points_per_centroid=1, **options)
    theirs.train(points)
    distances, labels = theirs.index.search(points, 1)
    return np.bincount(labels[:, 0], minlength=k), float(distances.clip(0).sum(dtype=np.float64))


def heavy_points() -> np.ndarray:
    """2,000 rows of which 90 % are 8 rows over and over: faiss leaves clusters empty (asserted where it is used)."""
    rng = np.random.default_rng(0)
    few, rest = rng.normal(size=(8, 6)), rng.normal(size=(200, 6))
    return rng.permutation(np.concatenate([np.repeat(few, 225, 0), rest])).astype(np.float32)


@pytest.mark.parametrize("iterations", [1, 20])
def test_no_cluster_is_empty_and_the_objective_is_not_above_faiss(iterations):
    points = heavy_points()
    sizes, objective = left_empty(points, 150, niter=iterations, seed=2)
    assert (sizes == 0).any(), "the case is one"
    ours = kmeans(points, 150, iterations=iterations, seed=2)
    assert (np.bincount(ours.labels_N, minlength=150) > 0).all()
    assert ours.objective < objective
    assert ours.num_repaired >= (sizes == 0).sum()
    exact = ((points.astype(np.float64) - ours.centroids_kd[ours.labels_N]) ** 2).sum(1)
    assert np.allclose(ours.distances_N, exact, atol=1e-5)


def test_images_that_are_alike_get_one_label():
    points = heavy_points()
    ours = kmeans(points, 208, seed=2)
    kinds, kind = np.unique(points, axis=0, return_inverse=True)
    assert len(kinds) == 208
    pairs = np.unique(np.stack([kind.ravel(), ours.labels_N]), axis=1)
    assert np.array_equal(pairs[0], np.arange(208)) and len(set(pairs[1])) == 208, "a cluster for each kind"


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 4), st.booleans(), st.integers(0, 2**31 - 1))
def test_as_many_clusters_hold_images_as_can(num, k, values, spherical, seed):
    """Rows of whole numbers, many of them alike: filled clusters are min(k, kinds of rows)."""
    points = np.random.default_rng(seed).integers(1, values + 1, (num, 2)).astype(np.float32)
    points, k = l2(points) if spherical else points, min(k, num)
    ours = kmeans(points, k, seed=seed, iterations=3, spherical=spherical)
    if k < num:  # k = num: faiss takes the images themselves as centroids
        assert len(set(ours.labels_N)) == min(k, len(np.unique(points, axis=0)))
    exact = ((points.astype(np.float64) - ours.centroids_kd[ours.labels_N]) ** 2).sum(1)
    assert np.allclose(ours.distances_N, exact, atol=1e-5)


def test_fewer_kinds_than_clusters_leave_the_rest_empty():
    points = np.repeat(np.array([[0, 0], [5, 0], [0, 5]], np.float32), 20, axis=0)
    ours = kmeans(points, 10, seed=0)
    assert (np.bincount(ours.labels_N, minlength=10) > 0).sum() == 3
    assert len(set(ours.labels_N[:20])) == len(set(ours.labels_N[20:40])) == len(set(ours.labels_N[40:])) == 1


@pytest.mark.parametrize("value", [0.0, 0.1, -3.3])
def test_constant_features_are_one_cluster(value):
    """A collapsed network; in 0.1's case faiss' centroids and distances are a rounding error away."""
    points = np.full((300, 16), value, np.float32)
    points[0] = -points[0] if value == 0 else points[0]  # -0.0 is 0.0
    ours = kmeans(points, 20, seed=0)
    assert (np.bincount(ours.labels_N, minlength=20) > 0).sum() == 1
    assert np.isfinite(ours.centroids_kd).all()
    assert ours.objective < 1e-3


def test_filling_by_hand():
    """Clusters 1 and 3 are empty. Farthest is row 5 (alone in 4: stays), then row 2, then rows 0 and 4, which are alike
    and move together; row 1 is the nearest of cluster 0 and stays."""
    points = np.array([[4.0], [1], [6], [20], [4], [90]], np.float32)
    labels, distances = np.array([0, 0, 0, 2, 0, 4], np.int32), np.array([9, 0, 25, 1, 9, 100], np.float32)
    centroids = np.array([[1.0], [-7], [21], [-8], [80]], np.float32)
    assert _fill_empty(points, labels, distances, centroids) == 2
    assert labels.tolist() == [3, 0, 1, 2, 3, 4]
    assert distances.tolist() == [0, 0, 0, 1, 0, 100]
    assert centroids.ravel().tolist() == [1, 6, 21, 4, 80]


def test_repairs_are_counted():
    """Two far groups, both centroids in one of them: no split. Three centroids at one place: two must be repaired."""
    points = np.concatenate([np.random.default_rng(0).normal(size=(50, 2)), np.full((50, 2), 100.0)]).astype(np.float32)
    assert kmeans(points, 2, start_kd=np.array([[0, 0], [100, 100]], np.float32)).num_repaired == 0
    crowded = kmeans(points, 3, start_kd=np.zeros((3, 2), np.float32))
    assert crowded.num_repaired >= 2
    assert (np.bincount(crowded.labels_N, minlength=3) > 0).all()


@pytest.mark.parametrize("options", [{"spherical": True}, {"start_kd": np.ones((K, 32), np.float32)}])
def test_bad_features_are_refused_whatever_the_method(features, options):
    spoilt = features.copy()
    spoilt[0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite; lower train.lr"):
        kmeans(spoilt, K, **options)
    with pytest.raises(ValueError, match="num_clusters 100 is above the number of images 99"):
        kmeans(features[:99], K, **options)
    assert sorted(kmeans(features[:K], K, **options).labels_N) == list(range(K))
