"""ODC's memories: cases worked by hand in two dimensions, laws over random steps, and digits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.metrics import normalized_mutual_info_score

from raydc.clustering.kmeans import kmeans
from raydc.clustering.online import ROWS, OnlineClusters
from raydc.clustering.whitening import fit_whitening, l2, moments

NONE = (np.empty(0, np.int64), np.empty((0, 2), np.float32))  # a batch without a readable image is still a step


def clusters(points, labels, k: int, **options) -> OnlineClusters:
    options = {"min_cluster": 0, "seed": 0} | options
    return OnlineClusters(np.array(points, np.float32), np.array(labels, np.int32), k, **options)


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    """1,797 real digits, whitened and on the sphere."""
    pixels = load_digits().data.astype(np.float32)
    return fit_whitening(moments(pixels), 32)(pixels)


def random_batches(features: np.ndarray, num: int, size: int, seed: int = 0, noise: float = 0.1):
    """Ids with repeats, and their features as a network that moved on would give them."""
    rng = np.random.default_rng(seed)
    for _ in range(num):
        ids = rng.integers(0, len(features), size)
        yield ids, (3 * features[ids] + noise * rng.normal(size=(size, features.shape[1]))).astype(np.float32)


# --- by hand ------------------------------------------------------------------------------------------------------------

FOUR = [(1, 0), (0.6, 0.8), (0, 1), (-0.6, 0.8)]


def test_a_step_by_hand():
    """Image 1 is at (.6, .8); its new feature (-3, 4) is (-.6, .8) of length one; their mean (0, .8) becomes (0, 1)."""
    online = clusters(FOUR, [0, 0, 1, 1], 2)
    assert np.allclose(online.centroids, [(0.8, 0.4), (-0.3, 0.9)])
    ids, labels = online.update(np.array([1]), np.array([(-3.0, 4.0)]))
    assert (ids.tolist(), labels.tolist()) == ([1], [1])
    assert np.allclose(online.features, [(1, 0), (0, 1), (0, 1), (-0.6, 0.8)])
    assert online.labels.tolist() == [0, 1, 1, 1] and online.sizes.tolist() == [1, 3]
    assert np.allclose(online.sums, [(1, 0), (-0.6, 2.8)])
    assert np.allclose(online.centroids, [(0.8, 0.4), (-0.3, 0.9)]), "they wait for the tenth step"


def test_centroids_are_means_that_are_not_normalised():
    online = clusters(FOUR, [0, 0, 1, 1], 2, centroids_every=1)
    online.update(np.array([1]), np.array([(-3.0, 4.0)]))
    assert np.allclose(online.centroids, [(1, 0), (-0.2, 2.8 / 3)])


def test_momentum_is_the_share_of_the_new_feature():
    """.75 (1, 0) + .25 (0, 1) = (.75, .25), over its length."""
    online = clusters(FOUR, [0, 0, 1, 1], 2, momentum=0.25)
    online.update(np.array([0]), np.array([(0.0, 7.0)]))
    assert np.allclose(online.features[0], np.array([3, 1]) / np.sqrt(10))


def test_it_is_the_inner_product_with_the_mean_not_the_cosine():
    """(.96, .28) with the means (.6, 0) and (.8, .6): inner products .576 and .936, cosines .96 and .936.

    The published memory multiplies features with means that it does not make unit vectors.
    """
    points = [(0.6, 0.8), (0.6, -0.8), (0.8, 0.6), (0.8, 0.6), (-1.0, 0.0), (-1.0, 0.0)]
    online = clusters(points, [0, 0, 1, 1, 2, 2], 3, momentum=1.0)
    ids, labels = online.update(np.array([4]), np.array([(0.96, 0.28)]))
    assert (ids.tolist(), labels.tolist()) == ([4], [1])


def test_the_last_of_a_repeated_id_wins():
    """(.6, .8) and (0, -1) give (.6, -.2): once with what was remembered before, not twice in turn."""
    online = clusters(FOUR, [0, 0, 1, 1], 2)
    ids, labels = online.update(np.array([1, 3, 1]), np.array([(-3.0, 4.0), (-0.6, 0.8), (0.0, -1.0)]))
    assert np.allclose(online.features[1], np.array([3, -1]) / np.sqrt(10))
    assert len(ids) == len(labels) == 0
    assert np.allclose(online.sums, [(1 + 3 / np.sqrt(10), -1 / np.sqrt(10)), (-0.6, 1.8)])


SMALL = [(1, 0)] * 3 + [(0.8, 0.6)] + [(-0.6, 0.8), (-0.6, -0.8)] * 3


def test_a_small_cluster_is_dissolved_and_the_largest_is_split():
    """Image 3, alone, is nearer to (1, 0) than to (-.6, 0); the six on the left are two triples."""
    online = clusters(SMALL, [0, 0, 0, 1] + [2] * 6, 3, min_cluster=2)
    ids, labels = online.update(*NONE)
    assert online.labels[:4].tolist() == [0, 0, 0, 0]
    upper, lower = online.labels[4::2], online.labels[5::2]
    assert {*upper, *lower} == {1, 2} and len({*upper}) == len({*lower}) == 1
    assert np.allclose(online.centroids[upper[0]], (-0.6, 0.8)) and np.allclose(online.centroids[lower[0]], (-0.6, -0.8))
    assert np.allclose(online.centroids[0], (1, 0)), "only what was split is centred before its time"
    assert (online.num_split, online.num_dissolved, online.num_empty_clusters) == (1, 1, 0)
    assert ids.tolist() == [3, *np.flatnonzero(online.labels == 1)]
    assert labels.tolist() == [0, 1, 1, 1]
    online.reset_counts()
    assert len(online.update(*NONE)[0]) == 0 and (online.num_split, online.num_dissolved) == (0, 0)


def test_a_cluster_of_min_cluster_stays():
    online = clusters(SMALL, [0, 0, 0, 1] + [2] * 6, 3, min_cluster=1)
    assert len(online.update(*NONE)[0]) == 0 and online.num_dissolved == 0


@pytest.mark.parametrize(("sizes", "min_cluster"), [((30, 25, 30), 28), ((2000, ROWS + 76, 1900), 1600)])
def test_members_go_to_the_nearest_cluster_that_is_not_small(sizes, min_cluster):
    """Both large ones together could not be halved: nothing is split, the dissolved cluster stays empty."""
    points = l2(np.random.default_rng(3).normal(size=(sum(sizes), 2)).astype(np.float32))
    labels = np.repeat([0, 1, 2], sizes)
    online = clusters(points, labels, 3, min_cluster=min_cluster)
    online.update(*NONE)
    means = {cluster: points[labels == cluster].astype(np.float64).mean(0) for cluster in (0, 2)}
    for image in range(sum(sizes)):
        products = {cluster: points[image] @ mean for cluster, mean in means.items()}
        expected = labels[image] if labels[image] != 1 else max(products, key=products.get)
        assert online.labels[image] == expected
    assert set(online.labels[labels == 1]) == {0, 2}
    assert np.allclose(online.sums[[0, 2]], [points[online.labels == one].sum(0, dtype=np.float64) for one in (0, 2)])
    assert (online.num_empty_clusters, online.num_split, online.num_dissolved) == (1, 0, 1)


# --- empty clusters -----------------------------------------------------------------------------------------------------


def test_clusters_that_are_empty_at_the_start_are_filled():
    points = l2(np.random.default_rng(0).normal(size=(1000, 3)).astype(np.float32))
    online = clusters(points, np.zeros(1000), 10, min_cluster=20)
    assert online.num_empty_clusters == 0 and online.sizes.min() >= 20 and online.num_split == 9
    assert np.array_equal(online.sizes, np.bincount(online.labels))
    for cluster in range(10):
        assert np.allclose(online.centroids[cluster], points[online.labels == cluster].mean(0), atol=1e-6)


@pytest.mark.parametrize("outliers", [0, 1, 19])
def test_a_random_half_where_2_means_leaves_too_few(outliers):
    """Alike images have no second mean; up to 19 on the other side would be a cluster that is dissolved at once."""
    points = [(1, 0)] * (41 - outliers) + [(-1, 0)] * outliers
    halves = [clusters(points, [0] * 41, 2, min_cluster=20, seed=seed).labels for seed in (0, 0, 1)]
    assert all(sorted(np.bincount(half).tolist()) == [20, 21] for half in halves)
    assert np.array_equal(halves[0], halves[1]) and not np.array_equal(halves[0], halves[2])


def test_what_cannot_be_split_leaves_the_cluster_empty_and_it_is_never_chosen():
    online = clusters([(1, 0)] * 39, [0] * 39, 2, min_cluster=20)
    assert online.num_empty_clusters == 1 and np.isnan(online.centroids[1]).all()
    online.update(np.arange(39), np.full((39, 2), (-1.0, 0.1)))  # far from the only centroid
    assert (online.labels == 0).all() and online.num_empty_clusters == 1


@pytest.mark.parametrize("num_images", [5, 19, 20, 60, 300])
def test_a_min_cluster_above_the_mean_size_ends(num_images):
    """Where all are small the largest stays; fewer images than min_cluster are one cluster."""
    points = l2(np.random.default_rng(1).normal(size=(num_images, 2)).astype(np.float32))
    online = clusters(points, np.arange(num_images) % 50, 50, min_cluster=20)
    for _ in range(3):
        online.update(*NONE)
        sizes = online.sizes
        assert sizes.sum() == num_images and sizes[sizes > 0].min() >= min(20, num_images)
    assert sizes.max() < 40, "what can be split while there are empty clusters is"


# --- laws ---------------------------------------------------------------------------------------------------------------


@st.composite
def histories(draw):
    """Options, features, labels (some images unreadable) and a generator for batches with repeated ids."""
    num_images, k = draw(st.integers(1, 60)), draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    features = l2(rng.normal(size=(num_images, 3)).astype(np.float32))
    labels = rng.integers(-1, k, num_images).astype(np.int32)
    labels[rng.integers(num_images)] = draw(st.integers(0, k - 1))
    options = {
        "momentum": draw(st.sampled_from([0.1, 0.5, 1.0])),
        "centroids_every": draw(st.integers(1, 4)),
        "min_cluster": draw(st.integers(0, 12)),
        "seed": draw(st.integers(0, 2**62)),
    }
    return features, labels, k, options, rng


@settings(max_examples=60, deadline=None)
@given(histories())
def test_the_laws_of_the_memories(history):
    features, labels, k, options, rng = history
    unreadable = labels < 0
    untouched = features[unreadable].copy()
    online = OnlineClusters(features, labels, k, **options)
    for step in range(1, 8):
        before, centroids = online.labels.copy(), online.centroids.copy()
        online.reset_counts()
        ids = rng.integers(0, len(features), rng.integers(0, 20))
        changed, new = online.update(ids, rng.normal(size=(len(ids), 3)))

        assert np.array_equal(changed, np.flatnonzero(online.labels != before))
        assert np.array_equal(new, online.labels[changed])
        assert np.array_equal(online.labels < 0, unreadable)
        assert np.array_equal(features[unreadable], untouched)
        assert online.labels.max() < k and online.labels.dtype == np.int32

        readable = np.flatnonzero(~unreadable)
        sizes = np.bincount(online.labels[readable], minlength=k)
        assert np.array_equal(online.sizes, sizes) and sizes.sum() == len(readable)
        assert sizes[sizes > 0].min() >= min(options["min_cluster"], len(readable))
        assert sizes.max() < 2 * max(options["min_cluster"], 1) or (sizes > 0).all()
        sums = np.zeros((k, 3))
        for image in readable:
            sums[online.labels[image]] += features[image]
        assert np.allclose(online.sums, sums, atol=1e-6)
        assert np.allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)

        moved = (online.centroids != centroids).any(1) & ~(np.isnan(online.centroids) & np.isnan(centroids)).any(1)
        if step % options["centroids_every"]:
            assert moved.sum() <= 2 * online.num_split


def test_each_image_of_a_batch_goes_to_the_largest_inner_product(digits):
    """Against a plain loop; no cluster is small or empty here, so nothing else happens."""
    features = digits.copy()
    online = OnlineClusters(features, kmeans(digits, 10, seed=0).labels_N, 10, min_cluster=0, seed=0)
    expected = online.labels.copy()
    for step, (ids, rows) in enumerate(random_batches(digits, 25, 64, noise=1.0), 1):
        centroids = online.centroids.astype(np.float64)
        online.update(ids, rows)
        for image in set(ids.tolist()):
            expected[image] = int(np.argmax(centroids @ features[image]))
        assert np.array_equal(online.labels, expected)
        if step % 10 == 0:
            assert np.allclose(online.centroids, [features[expected == one].mean(0) for one in range(10)], atol=1e-6)
            assert not np.allclose(online.centroids, centroids, atol=1e-4)
        else:
            assert np.array_equal(online.centroids, centroids)
    assert online.num_split == 0


def test_saved_and_loaded_midway_equals_unbroken(digits, tmp_path):
    options = {"momentum": 0.5, "centroids_every": 4, "min_cluster": 20, "seed": 5}
    features = digits.copy()
    online = OnlineClusters(features, kmeans(digits, 60, seed=0).labels_N, 60, **options)
    batches = list(random_batches(digits, 30, 128, noise=1.0))
    for batch in batches[:14]:
        online.update(*batch)
    assert online.num_split > 0 and online.num_dissolved > 0
    remembered, state = features.copy(), online.state()
    np.savez(tmp_path / "state.npz", **state)
    online.reset_counts()
    unbroken = [online.update(*batch) for batch in batches[14:]]
    assert online.num_split > 0

    assert not np.array_equal(state["labels"], online.labels), "a state is a copy"
    loaded = OnlineClusters.load(remembered, dict(np.load(tmp_path / "state.npz")), **options)
    assert loaded.step == 14 and loaded.num_split == state["totals"][0] and loaded.num_dissolved == state["totals"][1]
    loaded.reset_counts()
    again = [loaded.update(*batch) for batch in batches[14:]]
    for (ids, labels), (same_ids, same_labels) in zip(unbroken, again, strict=True):
        assert np.array_equal(ids, same_ids) and np.array_equal(labels, same_labels)
    assert np.array_equal(remembered, features)
    assert {name: array.tobytes() for name, array in loaded.state().items()} == {
        name: array.tobytes() for name, array in online.state().items()
    }


def test_it_clusters_digits_from_random_labels(digits):
    """Five passes with features that stay: the labels end up telling digits apart, which at the start they do not."""
    classes = load_digits().target
    labels = np.random.default_rng(0).integers(0, 20, len(digits)).astype(np.int32)
    online = OnlineClusters(digits.copy(), labels, 20, min_cluster=20, seed=0)
    for seed in range(5):
        for ids in np.array_split(np.random.default_rng(seed).permutation(len(digits)), 30):
            online.update(ids, digits[ids])
    assert normalized_mutual_info_score(classes, labels) < 0.05
    assert normalized_mutual_info_score(classes, online.labels) > 0.4


# --- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_refused_and_nothing_changes(value):
    online = clusters(FOUR, [0, 0, 1, 1], 2)
    features, state = online.features.copy(), online.state()
    with pytest.raises(ValueError, match="not finite; lower train.lr"):
        online.update(np.array([0, 1]), np.array([(0.0, 1.0), (value, 0.0)]))
    assert np.array_equal(online.features, features)
    assert all(np.array_equal(array, state[name]) for name, array in online.state().items())
    with pytest.raises(ValueError, match="not finite; lower train.lr"):
        clusters([*FOUR[:3], (value, 0)], [0, 0, 1, 1], 2)


def test_an_unreadable_image_in_a_batch_is_left_alone():
    online = clusters(FOUR, [0, -1, 1, 1], 2)
    ids, _ = online.update(np.array([1]), np.array([(0.0, -1.0)]))
    assert len(ids) == 0 and online.labels.tolist() == [0, -1, 1, 1] and np.allclose(online.features, FOUR)


@pytest.mark.parametrize("image_id", [-1, 4])
def test_ids_outside_the_memory_are_refused(image_id):
    with pytest.raises(ValueError, match=r"an image_id is outside 0\.\.3; the shards changed"):
        clusters(FOUR, [0, 0, 1, 1], 2).update(np.array([image_id]), np.array([(0.0, 1.0)]))


def test_arrays_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="no image could be read; make the shards again"):
        clusters(FOUR, [-1] * 4, 2)
    with pytest.raises(ValueError, match="label 2 is above"):
        clusters(FOUR, [0, 0, 1, 2], 2)
    with pytest.raises(ValueError, match="4 features and 3 labels; the shards changed"):
        clusters(FOUR, [0, 0, 1], 2)
    online = clusters(FOUR, [0, 0, 1, 1], 2)
    with pytest.raises(ValueError, match=r"shape \(2, 1\) for 2 images of 2 dimensions"):
        online.update(np.array([0, 1]), np.ones((2, 1)))
    options = {"momentum": 0.5, "centroids_every": 10, "min_cluster": 0, "seed": 0}
    with pytest.raises(ValueError, match="3 features and 4 labels; the shards changed"):
        OnlineClusters.load(online.features[:3], online.state(), **options)
