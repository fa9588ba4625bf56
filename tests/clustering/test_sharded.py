"""A bank over several shards is one bank: the same clusters, the same complaints."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from raydc.clustering.bank import CoverageError, FeatureBank
from raydc.clustering.sharded import Shard, ShardedBank, bounds, fill_empty
from raydc.clustering.whitening import fit_whitening, l2, moments
from raydc.config import ClusteringConfig, ProbeConfig
from raydc.remote import Remote
from raydc.seeding import derive

CONFIG = ClusteringConfig(num_clusters=20, pca_dim=16, iterations=10)
NUM = 600


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    return load_digits().data.astype(np.float32)


@pytest.fixture(scope="module")
def reduced(digits) -> np.ndarray:
    """600 real features as a worker pushes them."""
    return fit_whitening(moments(digits[:NUM]), 16)(digits[:NUM])


def sharded(num_shards: int, num: int = NUM, config: ClusteringConfig = CONFIG, kind: type = Shard) -> ShardedBank:
    sizes = np.diff(bounds(num, num_shards))
    return ShardedBank([Remote(kind, int(size), config, local=True, threads=1) for size in sizes], num, config)


def opened(num_shards: int, **options) -> tuple[ShardedBank, str]:
    bank = sharded(num_shards, **options)
    return bank, bank.open()


def clustered(bank, token: str, previous_labels=None):
    return bank.cluster(token, 3, 7, "abc", previous_labels)


def whole(features: np.ndarray, config: ClusteringConfig, skipped=(), previous_labels=None):
    """What one bank makes of the same images."""
    bank = FeatureBank(len(features), config, threads=1)
    token, here = bank.open(), np.setdiff1d(np.arange(len(features)), skipped)
    bank.push(token, here, features[here])
    bank.skip(token, np.array(skipped, np.int64))
    return clustered(bank, token, previous_labels)


def assert_same(found, expected) -> None:
    assert np.array_equal(found.pseudo_labels, expected.pseudo_labels)
    assert found.pseudo_labels.dtype == expected.pseudo_labels.dtype
    np.testing.assert_allclose(found.centroids, expected.centroids, atol=1e-5)
    np.testing.assert_allclose(found.distances, expected.distances, atol=2e-6)
    assert found.objective == pytest.approx(expected.objective, rel=1e-6)
    assert found.num_repaired == expected.num_repaired


# --- the same clusters ---------------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_clusters_are_faiss_on_the_whole_matrix_whatever_the_order_of_pushes(reduced, data):
    import faiss

    bank, token = opened(data.draw(st.integers(1, 5)))
    ids = np.array(data.draw(st.permutations(range(NUM))))
    for part in np.split(ids, sorted(data.draw(st.lists(st.integers(0, NUM), max_size=6)))):
        bank.send("push", token, part, reduced[part])
    bank.flush()
    found = clustered(bank, token)
    theirs = faiss.Kmeans(16, 20, niter=10, seed=derive(7, "kmeans", 3) % 2**31, max_points_per_centroid=10**7)
    theirs.train(reduced)
    assert np.array_equal(found.pseudo_labels, theirs.index.search(reduced, 1)[1][:, 0])
    np.testing.assert_allclose(found.centroids, theirs.centroids, atol=1e-5)
    own = ((reduced - found.centroids[found.pseudo_labels]) ** 2).sum(1)
    np.testing.assert_allclose(found.distances, own, atol=1e-5)
    assert (found.epoch, found.weights_hash, found.num_clusters) == (3, "abc", 20)


@pytest.mark.parametrize("method", ["kmeans", "spherical"])
@pytest.mark.parametrize("known", [20, 11], ids=["whole", "with_empty"])
def test_a_warm_start_goes_on_where_one_bank_would(reduced, method, known):
    """Nine clusters of none begin at images that are drawn; some images had no label before, others have none now."""
    config = ClusteringConfig(num_clusters=20, pca_dim=16, iterations=2, method=method, start="warm")
    before = np.random.default_rng(0).integers(-1, known, NUM).astype(np.int32)
    skipped = [0, 299, 300, 599]
    bank, token = opened(2, config=config)
    here = np.setdiff1d(np.arange(NUM), skipped)
    bank.send("push", token, here, reduced[here])
    bank.send("skip", token, np.array(skipped))
    found = clustered(bank, token, before)
    assert_same(found, whole(reduced, config, skipped, before))
    assert np.flatnonzero(found.pseudo_labels == -1).tolist() == skipped


@pytest.mark.parametrize("skipped", [(), range(190, 410)], ids=["all", "without_a_shard"])
def test_empty_clusters_are_split_as_in_one_bank(reduced, skipped):
    """Labels at random make means that are all near the middle: many of them stay without an image."""
    config = ClusteringConfig(num_clusters=80, pca_dim=16, iterations=4, start="warm")
    before = np.random.default_rng(0).integers(0, 40, NUM).astype(np.int32)
    bank, token = opened(3, config=config)
    here = np.setdiff1d(np.arange(NUM), skipped)
    bank.send("push", token, here, reduced[here])
    bank.send("skip", token, np.array(skipped, np.int64))
    found = clustered(bank, token, before)
    assert_same(found, whole(reduced, config, skipped, before))
    assert found.num_repaired > 0


@pytest.mark.parametrize("method", ["kmeans", "spherical"])
@pytest.mark.parametrize("skipped", [(), range(130, 270)], ids=["all", "without_a_shard"])
def test_images_that_are_alike_leave_no_cluster_empty(method, skipped):
    """Thirty different points, each several times, for 25 clusters: starts fall together, and clusters end empty."""
    rng = np.random.default_rng(2)
    features = l2(rng.standard_normal((30, 4)).astype(np.float32))[rng.integers(0, 30, 400)]
    config = ClusteringConfig(num_clusters=25, pca_dim=4, iterations=3, method=method)
    bank, token = opened(3, num=400, config=config)
    here = np.setdiff1d(np.arange(400), skipped)
    bank.send("push", token, here, features[here])
    bank.send("skip", token, np.array(skipped, np.int64))
    found = clustered(bank, token)
    assert found.num_repaired > 0
    assert found.sizes.min() > 0
    own = ((features - found.centroids[found.pseudo_labels]) ** 2).sum(1)
    np.testing.assert_allclose(found.distances[here], own[here], atol=1e-5)
    assert len(np.unique(np.column_stack([features, found.pseudo_labels])[here], axis=0)) == 30


def test_the_farthest_images_fill_what_is_empty_at_the_end():
    """By hand: 0 0 1 | 9 9 10 20 in two shards, centroids 0, 9 and two that nobody is near. Cluster 1 holds 9 9 10 20: its
    20 goes first; then 1 and 10 are as far, and 1 comes first. The 9s, nearest of their cluster, stay."""
    features = np.array([0, 0, 1, 9, 9, 10, 20], np.float32)[:, None]
    config = ClusteringConfig(num_clusters=4, pca_dim=1)
    shards = [Shard(3, config, threads=1), Shard(4, config, threads=1)]
    tokens = [shard.open() for shard in shards]
    for shard, token, rows in zip(shards, tokens, (features[:3], features[3:]), strict=True):
        shard.push(token, np.arange(len(rows)), rows)
        shard.begin(token)

    def ask(method, *args):
        return [getattr(shard, method)(token, *args) for shard, token in zip(shards, tokens, strict=True)]

    centroids = np.array([[0], [9], [99], [-99]], np.float32)
    counts = sum(ask("settle", centroids))
    assert counts.tolist() == [3, 4, 0, 0]
    assert fill_empty(ask, centroids, counts) == 2
    labels, distances = (np.concatenate(column) for column in zip(*ask("result"), strict=True))
    assert labels.tolist() == [0, 0, 3, 1, 1, 1, 2]
    assert distances.tolist() == [0, 0, 0, 0, 0, 1, 0]
    assert centroids[:, 0].tolist() == [0, 9, 20, 1]


def test_images_that_are_alike_move_together_from_both_shards():
    """5 is in both shards, beside 0: it moves once, and cluster 2 finds nothing that another could spare."""
    config = ClusteringConfig(num_clusters=3, pca_dim=1)
    bank, token = opened(2, num=6, config=config)
    bank.send("push", token, np.arange(6), np.array([0, 5, 5, 5, 0, 5], np.float32)[:, None])
    found = clustered(bank, token)
    assert found.objective == 0
    assert sorted(found.sizes.tolist()) == [0, 2, 4]
    assert found.num_empty_clusters == 1


def test_images_all_alike_are_one_cluster():
    bank, token = opened(2, num=50, config=ClusteringConfig(num_clusters=5, pca_dim=2))
    bank.send("push", token, np.arange(50), np.ones((50, 2), np.float32))
    found = clustered(bank, token)
    assert found.objective < 1e-3  # the last split moves centroids by a thousandth
    assert found.num_empty_clusters == 4
    assert found.objective == pytest.approx(whole(np.ones((50, 2), np.float32), bank.config).objective)


def test_a_shard_without_a_readable_image_changes_nothing(reduced):
    bank, token = opened(3)
    skipped = np.arange(200, 400)
    here = np.setdiff1d(np.arange(NUM), skipped)
    bank.send("push", token, here, reduced[here])
    bank.send("skip", token, skipped)
    assert_same(clustered(bank, token), whole(reduced, CONFIG, skipped))


def test_more_shards_than_images(reduced):
    config = ClusteringConfig(num_clusters=2, pca_dim=16, iterations=5)
    bank, token = opened(5, num=3, config=config)
    bank.send("push", token, np.arange(3), reduced[:3])
    assert_same(clustered(bank, token), whole(reduced[:3], config))


class Weighed(Shard):
    """Notes the size of what each call brings and takes away."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.weights: dict[str, list[int]] = {}

    def __getattribute__(self, name: str):
        found = super().__getattribute__(name)
        if name.startswith("_") or not callable(found):
            return found

        def weighed(*args, **kwargs):
            result = found(*args, **kwargs)
            if name != "lead":  # its arguments are the shards themselves
                self.weights.setdefault(name, []).append(len(pickle.dumps((args, result), protocol=5)))
            return result

        return weighed


def test_an_iteration_moves_eight_bytes_for_each_number_of_the_centroids(digits):
    """And nothing that a clustering moves grows with the images, but their labels and distances at the end."""
    config, raw, moved = ClusteringConfig(num_clusters=20, pca_dim=64, iterations=4), l2(digits), []
    for num in (800, 1600):
        bank, token = opened(2, num=num, config=config, kind=Weighed)
        bank.send("push", token, np.arange(num), raw[:num])
        clustered(bank, token)
        moved.append(bank.shards[1].weights)
    few, many = moved
    assert len(many["assign"]) == 4
    assert max(many["assign"]) <= 1.2 * 20 * 64 * 8
    assert many["result"][0] - few["result"][0] == pytest.approx(8 * 400, abs=64)
    for method in many.keys() - {"result", "push"}:
        assert max(many[method]) == pytest.approx(max(few[method]), abs=64 + 20 * 64 * 4 * (method == "points")), method


# --- the same complaints ---------------------------------------------------------------------------------------------------


def test_a_missing_image_is_named_wherever_it_belongs(reduced):
    bank, token = opened(3)
    here = np.setdiff1d(np.arange(NUM), [17, 401, 402, 599])
    bank.send("push", token, here, reduced[here])
    with pytest.raises(CoverageError, match=r"4 of 600 images.*\[17, 401, 402\]"):
        clustered(bank, token)
    bank.send("push", token, np.array([17, 599]), reduced[[17, 599]])
    with pytest.raises(CoverageError, match=r"2 of 600 images.*\[401, 402\]"):
        clustered(bank, token)
    bank.send("push", token, np.array([401]), reduced[[401]])
    bank.send("skip", token, np.array([402]))
    assert clustered(bank, token).sizes.sum() == NUM - 1


CALLS = {
    "push": lambda bank, token, x: bank.send("push", token, np.arange(NUM), x),
    "skip": lambda bank, token, x: bank.send("skip", token, np.array([599])),
    "whitening": lambda bank, token, x: bank.whitening(token),
    "cluster": lambda bank, token, x: clustered(bank, token),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_an_old_pass_and_a_shard_that_restarted_are_refused(call, reduced):
    bank, old = opened(2)
    bank.send("push", old, np.arange(NUM), reduced)
    token = bank.open()
    with pytest.raises(CoverageError, match="extract again"):
        call(bank, old, reduced)
    bank.send("push", token, np.arange(NUM), reduced)
    bank.send("add_moments", token, 0, moments(reduced))
    bank.shards[1] = Remote(Shard, NUM // 2, CONFIG, local=True, threads=1)  # what Ray starts in place of a dead one
    with pytest.raises(CoverageError, match="extract again"):
        call(bank, token, reduced)


@pytest.mark.parametrize("bad", [-1, NUM])
def test_an_image_id_outside_the_set_is_refused(reduced, bad):
    bank, token = opened(2)
    with pytest.raises(CoverageError, match=r"outside 0..599"):
        bank.send("push", token, np.array([0, bad]), reduced[:2])
    with pytest.raises(CoverageError, match=r"outside 0..599"):
        bank.send("skip", token, np.array([bad]))


def test_what_the_user_must_mend(reduced):
    bank, token = opened(2)
    bank.send("skip", token, np.arange(NUM))
    with pytest.raises(ValueError, match="no image could be read"):
        clustered(bank, token)
    token = bank.open()
    bank.send("push", token, np.arange(290, 310), reduced[290:310])
    bank.send("skip", token, np.setdiff1d(np.arange(NUM), np.arange(290, 309)))
    with pytest.raises(ValueError, match="num_clusters 20 is above the number of images 19"):
        clustered(bank, token)
    token, bad = bank.open(), reduced.copy()
    bad[500, 3] = np.nan
    bank.send("push", token, np.arange(NUM), bad)
    with pytest.raises(ValueError, match="features are not finite"):
        clustered(bank, token)


# --- moments and probes ----------------------------------------------------------------------------------------------------


def test_the_pca_is_fitted_on_the_sums_of_all_ranks(digits):
    bank, token = opened(3, num=len(digits))
    skipped = np.array([5, 1000, 1796])
    here = np.setdiff1d(np.arange(len(digits)), skipped)
    bank.send("add_moments", token, 1, moments(digits[here[900:]]))
    bank.send("skip", token, skipped)
    with pytest.raises(CoverageError, match="hold 894 images where 1794"):
        bank.whitening(token)
    bank.send("add_moments", token, 0, moments(digits[here[:900]]))
    expected = fit_whitening(moments(digits[here]), 16)
    np.testing.assert_allclose(bank.whitening(token).matrix_Dd, expected.matrix_Dd, rtol=1e-4, atol=1e-6)
    bank.send("push", token, here, bank.whitening(token)(digits[here]))
    assert np.array_equal(clustered(bank, token).whitening.matrix_Dd, bank.whitening(token).matrix_Dd)


def test_a_probe_is_that_of_one_bank(digits):
    labels, found = load_digits().target, []
    for bank in (FeatureBank(500, CONFIG, threads=1), sharded(2, num=500)):
        token = bank.open()
        push = bank.push_probe if isinstance(bank, FeatureBank) else lambda *args, bank=bank: bank.send("push_probe", *args)
        push(token, "train", np.arange(500), digits[:500])
        push(token, "val", np.arange(300), digits[500:800])
        config, both = ProbeConfig(images_per_class=10), (labels[:500], labels[500:800])
        found.append(bank.run_probe(token, ("train", "val"), config, both, seed=1, k=30, whiten_dim=16))
    assert found[0] == found[1]
