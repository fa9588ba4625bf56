"""PIC against a plain loop over the facts of protocol 1a, and against clusters known beforehand."""

import math

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors

from raydc.clustering.diagnostics import nmi
from raydc.clustering.kmeans import means
from raydc.clustering.pic import _join_singletons, _nearest_others, pic
from raydc.clustering.whitening import fit_whitening, moments


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    """1,797 real digits, whitened and on the sphere: what a run clusters."""
    digits = load_digits().data.astype(np.float32)
    return fit_whitening(moments(digits), 32)(digits)


def three_blobs(size: int) -> tuple[np.ndarray, np.ndarray]:
    corners = np.repeat(np.eye(3), size, axis=0)
    return (corners + np.random.default_rng(0).normal(0, 0.02, corners.shape)).astype(np.float32), np.repeat(range(3), size)


def plainly(points: np.ndarray, neighbours: int, sigma: float) -> list[int]:
    """Protocol 1a, one image after the other."""
    num = len(points)
    near, weight = [], [{} for _ in range(num)]
    for i in range(num):
        squared = ((points.astype(np.float64) - points[i]) ** 2).sum(1)
        near.append(sorted((j for j in range(num) if j != i), key=lambda j: squared[j])[:neighbours])
        for j in near[i]:
            for a, b in ((i, j), (j, i)):
                weight[a][b] = weight[a].get(b, 0) + math.exp(-squared[j] / sigma**2)
    vector = [1 / num] * num
    for _ in range(200):
        vector = [0.001 * sum(w * vector[j] for j, w in weight[i].items()) + 0.999 / num for i in range(num)]
        total = sum(vector)
        vector = [value / total for value in vector]
    pointer = []
    for i in range(num):
        rise = {j: w * (vector[j] - vector[i]) for j, w in weight[i].items()}
        best = max(rise, key=rise.get)
        pointer.append(best if rise[best] > 0 else i)
    labels = []
    for i in range(num):
        while pointer[i] != i:
            i = pointer[i]
        labels.append(i)
    size = {label: labels.count(label) for label in set(labels)}
    moves = {i: next((j for j in near[i] if size[labels[j]] > 1), None) for i in range(num) if size[labels[i]] == 1}
    return [labels[moves[i]] if moves.get(i) is not None else labels[i] for i in range(num)]


def same_partition(a, b) -> bool:
    pairs = set(zip(a, b, strict=True))
    return len(pairs) == len(set(a)) == len(set(b))


@pytest.mark.parametrize(("neighbours", "sigma"), [(5, 0.2), (5, 0.8), (2, 0.8), (1, 0.5), (20, 0.4)])
def test_it_is_the_plain_loop(features, neighbours, sigma):
    points = features[:300]
    ours = pic(points, neighbours=neighbours, sigma=sigma)
    assert same_partition(ours.labels_N.tolist(), plainly(points, neighbours, sigma))


def test_the_plain_loop_meets_images_that_are_alone():
    """Singletons that join, and ones that cannot: an outlier whose neighbours are all alone stays alone."""
    points = np.concatenate([three_blobs(15)[0], [[9, 9, 9]], np.eye(3) * 30]).astype(np.float32)
    ours = pic(points, neighbours=3)
    assert same_partition(ours.labels_N.tolist(), plainly(points, 3, 0.2))
    sizes = np.bincount(ours.labels_N)
    assert (sizes == 1).sum() < 4, "at least one of the outliers has company among its neighbours"


def test_three_blobs_are_three_clusters():
    """Each image of a blob is every other's neighbour, so each blob has one summit."""
    points, blobs = three_blobs(20)
    ours = pic(points, neighbours=19)
    assert len(ours.centroids_kd) == 3
    assert nmi(ours.labels_N, blobs) == pytest.approx(1)
    assert same_partition(ours.labels_N, blobs)


def test_with_few_neighbours_blobs_fall_into_parts_but_never_mix():
    points, blobs = three_blobs(100)
    ours = pic(points)
    assert 3 <= len(ours.centroids_kd) < 100
    assert all(len(set(blobs[ours.labels_N == cluster])) == 1 for cluster in range(len(ours.centroids_kd)))


def test_the_result_is_like_that_of_kmeans(features):
    ours = pic(features)
    k = len(ours.centroids_kd)
    assert ours.labels_N.dtype == np.int32
    assert sorted(set(ours.labels_N)) == list(range(k)) and 1 < k < len(features)
    assert np.array_equal(ours.centroids_kd, means(features, ours.labels_N, k))
    exact = ((features.astype(np.float64) - ours.centroids_kd[ours.labels_N]) ** 2).sum(1)
    assert np.allclose(ours.distances_N, exact, atol=1e-5)
    assert np.isclose(ours.objective, exact.sum())
    assert len(ours.objectives) == 0 and ours.num_repaired == 0


def test_its_clusters_hold_alike_digits(features):
    """1,797 real digits; most of a small group of near neighbours show the same one (chance: a tenth)."""
    ours, digits = pic(features), load_digits().target
    table = np.zeros((len(ours.centroids_kd), 10))
    np.add.at(table, (ours.labels_N, digits), 1)
    assert table.max(1).sum() / len(digits) > 0.8


def test_neither_threads_nor_the_seed_change_it(features):
    one, two = pic(features, threads=1), pic(features, threads=2)
    assert np.array_equal(one.labels_N, two.labels_N)
    assert np.array_equal(one.distances_N, two.distances_N)


def test_copies_of_an_image_are_together():
    """40 copies of each: an image need not be among its own nearest, and must not become its own neighbour."""
    points = np.repeat(three_blobs(4)[0], 40, axis=0)
    ours = pic(points, neighbours=30)
    assert all(len(set(ours.labels_N[start : start + 40])) == 1 for start in range(0, len(points), 40))


def test_neighbours_are_others_and_the_nearest():
    """Also where 40 copies hide an image from its own search, against scikit-learn, which leaves out the image itself."""
    points = np.repeat(three_blobs(4)[0], 40, axis=0)
    ids, squared = _nearest_others(points, 45, threads=1, gpu=False)
    expected = NearestNeighbors(n_neighbors=45).fit(points).kneighbors()[0] ** 2
    assert ids.shape == squared.shape == (480, 45)
    assert (ids != np.arange(480)[:, None]).all()
    assert all(len(set(row)) == 45 for row in ids)
    assert np.allclose(squared, expected, atol=1e-6)
    assert np.allclose(((points[:, None] - points[ids]) ** 2).sum(2), expected, atol=1e-6)


def test_an_image_that_is_alone_joins_its_nearest_neighbour_in_company():
    """Images 0-2 are together; 3 and 4 are alone. 3's nearest is 4, which is alone too, then 2; 4 knows only 3."""
    ids = np.array([[1, 2], [0, 2], [0, 1], [4, 2], [3, 3]])
    assert _join_singletons(np.array([7, 7, 7, 3, 4]), ids).tolist() == [1, 1, 1, 1, 0]


def test_distances_too_large_for_sigma_are_refused():
    with pytest.raises(ValueError, match="PIC left each of the 30 images alone; raise clustering.sigma"):
        pic(1e4 * np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32))


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_constant_features_are_refused(value):
    with pytest.raises(ValueError, match="PIC put all 50 images into one cluster; lower clustering.sigma"):
        pic(np.full((50, 8), value, np.float32))


def test_one_cluster_is_refused():
    points = three_blobs(20)[0]
    with pytest.raises(ValueError, match="PIC put all 60 images into one cluster; lower clustering.sigma"):
        pic(points, neighbours=59, sigma=100)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(features, value):
    spoilt = features[:50].copy()
    spoilt[7, 3] = value
    with pytest.raises(ValueError, match="not finite; lower train.lr"):
        pic(spoilt)


def test_fewer_images_than_neighbours_are_refused(features):
    with pytest.raises(ValueError, match="neighbours 5 needs more images than the 5 there are; lower clustering.neighbours"):
        pic(features[:5])
    assert len(pic(features[:6], sigma=1, neighbours=1).labels_N) == 6
