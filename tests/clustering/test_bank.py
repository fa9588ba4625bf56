"""The bank as a plain object: nothing missing, nothing stale, and no trace of who pushed first."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from raydc.clustering.bank import CoverageError, FeatureBank
from raydc.clustering.whitening import fit_whitening, moments
from raydc.config import ClusteringConfig, ProbeConfig
from raydc.probe import evaluate
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


def opened(num: int = NUM) -> tuple[FeatureBank, str]:
    bank = FeatureBank(num, CONFIG, threads=1)
    return bank, bank.open()


def clustered(bank: FeatureBank, token: str, **changes):
    return bank.cluster(token, **({"epoch": 3, "seed": 7, "weights_hash": "abc"} | changes))


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_clusters_are_faiss_on_the_whole_matrix_whatever_the_order_of_pushes(reduced, data):
    import faiss

    ids = np.array(data.draw(st.permutations(range(NUM))))
    bank, token = opened()
    for part in np.split(ids, sorted(data.draw(st.lists(st.integers(0, NUM), max_size=6)))):
        bank.push(token, part, reduced[part])
    found = clustered(bank, token)
    seed = derive(7, "kmeans", 3) % 2**31
    theirs = faiss.Kmeans(16, 20, niter=10, seed=seed, max_points_per_centroid=10**7, gpu=faiss.get_num_gpus() > 0)
    theirs.train(reduced)
    assert np.array_equal(found.pseudo_labels, theirs.index.search(reduced, 1)[1][:, 0])
    assert np.array_equal(found.centroids, theirs.centroids)
    assert (found.epoch, found.weights_hash, found.num_clusters) == (3, "abc", 20)
    assert found.sizes.sum() == NUM


def test_a_missing_image_is_named(reduced):
    bank, token = opened()
    bank.push(token, np.arange(NUM), reduced)
    clustered(bank, token)
    token = bank.open()
    here = np.setdiff1d(np.arange(NUM), [17, 401])
    bank.push(token, here, reduced[here])
    with pytest.raises(CoverageError, match=r"2 of 600 images.*\[17, 401\]"):
        clustered(bank, token)
    bank.push(token, np.array([17]), reduced[[17]])
    with pytest.raises(CoverageError, match=r"1 of 600 images.*\[401\]"):
        clustered(bank, token)


def test_skipped_images_get_no_label_and_do_not_move_the_others(reduced):
    bank, token = opened()
    skipped, here = np.array([3, 599]), np.setdiff1d(np.arange(NUM), [3, 599])
    bank.push(token, here, reduced[here])
    bank.skip(token, skipped)
    found = clustered(bank, token)
    assert np.flatnonzero(found.pseudo_labels == -1).tolist() == [3, 599]
    assert (found.distances[skipped] == 0).all()
    assert found.sizes.sum() == NUM - 2
    own = ((reduced[here] - found.centroids[found.pseudo_labels[here]]) ** 2).sum(1)
    assert np.allclose(found.distances[here], own, atol=1e-5)
    assert found.objective == pytest.approx(own.sum(), rel=1e-4)


def test_a_second_push_replaces_the_first(reduced):
    bank, token = opened()
    bank.push(token, np.arange(NUM), np.full_like(reduced, np.nan))
    bank.push(token, np.arange(NUM), reduced)
    bank.push(token, np.arange(0, NUM, 2), reduced[::2])
    once, once_token = opened()
    once.push(once_token, np.arange(NUM), reduced)
    found, expected = clustered(bank, token), clustered(once, once_token)
    assert np.array_equal(found.pseudo_labels, expected.pseudo_labels)
    assert np.array_equal(found.centroids, expected.centroids)


@pytest.mark.parametrize("bad", [-1, NUM])
def test_an_image_id_outside_the_set_is_refused(reduced, bad):
    bank, token = opened()
    with pytest.raises(CoverageError, match=r"outside 0..599"):
        bank.push(token, np.array([0, bad]), reduced[:2])
    with pytest.raises(CoverageError):
        bank.skip(token, np.array([bad]))


CALLS = {
    "push": lambda bank, token, x: bank.push(token, np.arange(NUM), x),
    "skip": lambda bank, token, x: bank.skip(token, np.array([0])),
    "add_moments": lambda bank, token, x: bank.add_moments(token, 0, moments(x)),
    "whitening": lambda bank, token, x: bank.whitening(token),
    "cluster": lambda bank, token, x: clustered(bank, token),
    "push_probe": lambda bank, token, x: bank.push_probe(token, "train", np.arange(NUM), x),
    "run_probe": lambda bank, token, x: bank.run_probe(token, ("train", "val"), ProbeConfig(), (x, x)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_an_old_pass_and_a_restarted_bank_are_refused(call, reduced):
    bank, old = opened()
    token = bank.open()
    assert token != old
    with pytest.raises(CoverageError, match="extract again"):
        call(bank, old, reduced)
    fresh = FeatureBank(NUM, CONFIG, threads=1)  # what Ray starts in place of a dead one
    with pytest.raises(CoverageError, match="extract again"):
        call(fresh, token, reduced)


def test_a_late_push_leaves_the_new_pass_untouched(reduced):
    bank, old = opened()
    bank.push(old, np.arange(NUM), reduced)
    token = bank.open()
    with pytest.raises(CoverageError):
        bank.push(old, np.arange(NUM), reduced)
    with pytest.raises(CoverageError, match="600 of 600"):
        clustered(bank, token)


def test_more_clusters_than_readable_images_is_the_users_error(reduced):
    bank, token = opened()
    bank.push(token, np.arange(10), reduced[:10])
    bank.skip(token, np.arange(10, NUM))
    with pytest.raises(ValueError, match="num_clusters 20 is above the number of images 10"):
        clustered(bank, token)


def test_no_readable_image_at_all_is_the_users_error():
    bank, token = opened()
    bank.skip(token, np.arange(NUM))
    with pytest.raises(ValueError):
        clustered(bank, token)


def test_whitening_does_not_hang_on_who_came_first(digits):
    pieces = [moments(piece / 16) for piece in np.array_split(digits.astype(np.float64) ** 1.5, 3)]
    found = []
    for order in itertools.permutations(range(3)):
        bank, token = opened(len(digits))
        for rank in order:
            bank.add_moments(token, rank, pieces[rank])
        found.append(bank.whitening(token))
    assert all(np.array_equal(one.matrix_Dd, found[0].matrix_Dd) for one in found)
    assert all(np.array_equal(one.mean_D, found[0].mean_D) for one in found)
    whole = fit_whitening(moments(digits.astype(np.float64) ** 1.5 / 16), 16)
    assert np.allclose(found[0].matrix_Dd, whole.matrix_Dd, rtol=1e-4, atol=1e-6)


def test_sums_sent_twice_count_once(digits):
    """A call that Ray repeats."""
    bank, token = opened(len(digits))
    for _ in range(2):
        bank.add_moments(token, 0, moments(digits[:NUM]))
    bank.add_moments(token, 1, moments(digits[NUM:]))
    assert np.allclose(bank.whitening(token).mean_D, digits.mean(0), atol=1e-4)


def test_a_rank_whose_sums_are_missing_is_noticed(digits):
    bank, token = opened(len(digits))
    bank.add_moments(token, 0, moments(digits[:NUM]))
    with pytest.raises(CoverageError, match="hold 600 images where 1797"):
        bank.whitening(token)


def test_a_probe_is_evaluated_in_order_of_image_id_whoever_pushed(digits):
    labels = load_digits().target
    order = np.random.default_rng(0).permutation(500)
    config = ProbeConfig(images_per_class=10)
    options = {"seed": 1, "k": 30, "whiten_dim": 16}
    found = []
    for ids in (np.arange(500), order):
        bank, token = opened()
        for part in np.array_split(ids, 3):
            bank.push_probe(token, "train", part, digits[part])
            bank.push_probe(token, "val", part[:40], digits[500:][part[:40]])
        bank.push_probe(token, "train", ids[:20], digits[ids[:20]])  # sent twice
        bank.push_probe(token, "val", np.arange(500), digits[500:1000])
        found.append(bank.run_probe(token, ("train", "val"), config, (labels[:500], labels[500:1000]), **options))
    ids = np.arange(500)
    expected = evaluate(ids, digits[:500], labels[:500], ids, digits[500:1000], labels[500:1000], config, **options)
    assert found[0] == found[1] == expected
    assert expected["knn_top1"] > 0.7, "features met their own labels"
