"""The laws of a sampling plan. (The original's sampler means them and breaks them: protocol 1a, index mismatch.)"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from raydc.clustering.sampling import cluster_weights, plain_plan, plan_length, uniform_plan
from raydc.seeding import derive

seeds = st.integers(0, 2**63 - 1)
lengths = st.integers(1, 600)


@st.composite
def assignments(draw) -> tuple[np.ndarray, int]:
    """(pseudo_labels, num_clusters): some clusters empty, some images unreadable, at least one image known."""
    num_clusters = draw(st.integers(1, 12))
    labels = draw(st.lists(st.integers(-1, num_clusters - 1), min_size=1, max_size=80).filter(lambda x: max(x) >= 0))
    return np.array(labels, np.int32), num_clusters


def heavy_tailed(num_images: int, num_clusters: int, seed: int = 0) -> np.ndarray:
    """Sizes by Zipf's law, in no order of image_id; the smallest twentieth of the clusters holds one image each."""
    singletons = num_clusters // 20
    weight = 1 / np.arange(1, num_clusters - singletons + 1)
    rng = np.random.default_rng(seed)
    labels = rng.choice(num_clusters - singletons, num_images - singletons, p=weight / weight.sum())
    return rng.permutation(np.concatenate([labels, np.arange(num_clusters - singletons, num_clusters)]))


@settings(max_examples=60, deadline=None)
@given(assignments(), lengths, seeds)
def test_clusters_are_drawn_equally_often_within_one(assignment, length, seed):
    labels, k = assignment
    counts = uniform_plan(labels, k, length, seed).counts
    known = labels >= 0
    per_cluster = np.bincount(labels[known], weights=counts[known], minlength=k)
    filled = np.bincount(labels[known], minlength=k) > 0
    assert np.ptp(per_cluster[filled]) <= 1
    assert (per_cluster[~filled] == 0).all()


@settings(max_examples=60, deadline=None)
@given(assignments(), lengths, seeds)
def test_images_of_a_cluster_are_drawn_equally_often_within_one(assignment, length, seed):
    labels, k = assignment
    counts = uniform_plan(labels, k, length, seed).counts
    assert all(np.ptp(counts[labels == cluster]) <= 1 for cluster in np.unique(labels[labels >= 0]))


@settings(max_examples=60, deadline=None)
@given(assignments(), lengths, seeds)
def test_the_draws_add_up_and_unreadable_images_have_none(assignment, length, seed):
    labels, k = assignment
    for plan in (uniform_plan(labels, k, length, seed), plain_plan(labels, length, seed)):
        assert plan.num_draws == plan.counts.sum() == length
        assert plan.counts.shape == labels.shape and plan.counts.min() >= 0
        assert (plan.counts[labels < 0] == 0).all()


@settings(max_examples=60, deadline=None)
@given(assignments(), lengths, seeds)
def test_a_plain_plan_draws_every_readable_image_within_one(assignment, length, seed):
    labels, _ = assignment
    assert np.ptp(plain_plan(labels, length, seed).counts[labels >= 0]) <= 1


@settings(max_examples=60, deadline=None)
@given(assignments(), lengths, seeds)
def test_every_draw_comes_exactly_once(assignment, length, seed):
    plan = uniform_plan(*assignment, length, seed)
    image_ids, draws = plan.draws()
    assert len(image_ids) == length
    expected = {(image_id, draw) for image_id, count in enumerate(plan.counts) for draw in range(count)}
    assert set(zip(image_ids.tolist(), draws.tolist(), strict=True)) == expected


@settings(max_examples=60, deadline=None)
@given(assignments(), lengths, seeds)
def test_draws_of_an_image_come_in_their_order(assignment, length, seed):
    plan = uniform_plan(*assignment, length, seed)
    image_ids, draws = plan.draws()
    for image_id in np.unique(image_ids):
        assert np.array_equal(draws[image_ids == image_id], np.arange(plan.counts[image_id]))


@settings(max_examples=60, deadline=None)
@given(assignments(), lengths, seeds)
def test_a_plan_is_a_function_of_its_seed(assignment, length, seed):
    first, again = (uniform_plan(*assignment, length, seed) for _ in range(2))
    assert np.array_equal(first.counts, again.counts)
    assert all(np.array_equal(a, b) for a, b in zip(first.draws(), again.draws(), strict=True))


def test_a_cluster_of_one_cannot_fill_a_batch():
    """50,000 images, 390 clusters, a twentieth of them singletons drawn 128 times each: even so in every batch."""
    labels = heavy_tailed(50_000, 390)
    for epoch in range(3):
        plan = uniform_plan(labels, 390, plan_length(50_000, 1.0, 256), derive(0, "plan", epoch))
        assert plan.counts.max() >= 128
        batches = plan.draws()[0].reshape(-1, 256)
        most = max(np.unique(batch, return_counts=True)[1].max() for batch in batches)
        assert most <= 0.03 * 256


def test_a_singletons_draws_are_spread_over_the_whole_epoch():
    labels = heavy_tailed(50_000, 390)
    plan = uniform_plan(labels, 390, plan_length(50_000, 1.0, 256), 1)
    image_ids, _ = plan.draws()
    for image_id in np.flatnonzero(plan.counts >= 128)[:10]:
        places = np.flatnonzero(image_ids == image_id) / len(image_ids)
        count = plan.counts[image_id]
        assert np.abs(places - (np.arange(count) + 0.5) / count).max() < 1 / count


def test_batches_mix_the_clusters():
    """256 draws from 390 equally likely clusters meet 390 (1 - (1 - 1/390)^256) = 188 of them."""
    labels = heavy_tailed(50_000, 390)
    plan = uniform_plan(labels, 390, plan_length(50_000, 1.0, 256), 1)
    met = [len(np.unique(labels[batch])) for batch in plan.draws()[0].reshape(-1, 256)]
    assert abs(np.mean(met) - 188) < 12
    assert min(met) > 140


def test_large_clusters_are_not_drawn_more_often():
    """What the original did: draws per cluster correlated .999 with size, 0 to 18,141 draws (protocol 1a's simulation)."""
    labels = heavy_tailed(100_000, 1000)
    sizes = np.bincount(labels, minlength=1000)
    assert sizes.max() > 50 * np.median(sizes), "a heavy tail"
    image_ids, _ = uniform_plan(labels, 1000, plan_length(100_000, 1.0, 256), 3).draws()
    drawn = np.bincount(labels[image_ids], minlength=1000)
    assert 99 <= drawn.min() <= drawn.max() <= 102
    assert abs(stats.spearmanr(drawn, sizes).statistic) < 0.1


@pytest.mark.parametrize("size", [5, 300])
def test_epochs_differ_and_are_fair_in_the_long_run(size):
    """Who is drawn once more, in a cluster and among the clusters, is drawn anew: all get their share over 400 epochs."""
    labels = np.repeat(np.arange(10), size)
    plans = [uniform_plan(labels, 10, 128, derive(0, "plan", epoch)) for epoch in range(400)]
    assert len({plan.seed for plan in plans}) == 400
    assert len({plan.counts.tobytes() for plan in plans}) > 390
    assert len({plan.draws()[0].tobytes() for plan in plans}) == 400
    total = sum(plan.counts for plan in plans)
    assert stats.chisquare(total).pvalue > 1e-3
    assert np.ptp(np.bincount(labels, weights=total)) < 400 * 0.3


def test_the_order_is_drawn_anew_even_where_the_counts_are_not():
    """Every image once: ranks of an image in two epochs are uncorrelated, and its place is uniform over the epoch."""
    labels = np.zeros(5000, np.int32)
    first, second = (np.argsort(plain_plan(labels, 5000, derive(0, "plan", epoch)).draws()[0]) for epoch in (0, 1))
    assert abs(stats.spearmanr(first, second).statistic) < 0.05
    assert abs(stats.spearmanr(first, np.arange(5000)).statistic) < 0.05


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 10**7), st.floats(0.01, 20), st.integers(1, 4096))
def test_a_plan_is_whole_batches_near_its_length(num_images, multiple, batch_size):
    length = plan_length(num_images, multiple, batch_size)
    assert length % batch_size == 0 and length >= batch_size
    assert length == batch_size or abs(length - multiple * num_images) <= batch_size / 2 + 1e-6 * length


def test_imagenets_plan_is_protocol_12s():
    """1,281,167 images, batch 512: 2,503 iterations with a partial last one, here 2,502 whole ones (2,502.3)."""
    assert plan_length(1_281_167, 1.0, 512) == 2502 * 512


# --- weights of the loss instead of draws --------------------------------------------------------------------------------


def test_weights_by_hand():
    """Sizes 1, 4, 0: to the power -1/2 they are 1, 1/2, 0; the five images' mean is 3 / 5."""
    weights = cluster_weights(np.array([1, 4, 0]), 0.5)
    assert weights.dtype == np.float32
    assert np.allclose(weights, np.array([1, 0.5, 0]) * 5 / 3)
    assert np.allclose(cluster_weights(np.array([2, 6, 0]), 1), [2, 2 / 3, 0]), "a cluster weighs as much as any other"
    assert np.array_equal(cluster_weights(np.array([2, 6]), 0), [1, 1])


@settings(max_examples=60, deadline=None)
@given(assignments(), st.floats(0, 3))
def test_the_mean_weight_of_an_image_is_one_and_ratios_are_the_references(assignment, power):
    """Protocol 1b.5: (1 / (n + 1e-10))^power, up to a factor."""
    labels, k = assignment
    sizes = np.bincount(labels[labels >= 0], minlength=k)
    weights = cluster_weights(sizes, power)
    assert weights[labels[labels >= 0]].mean(dtype=np.float64) == pytest.approx(1, rel=1e-5)
    assert (weights[sizes == 0] == 0).all()
    filled = sizes > 0
    theirs = (1 / (sizes[filled] + 1e-10)) ** power
    assert np.allclose(weights[filled] / weights[filled][0], theirs / theirs[0], rtol=1e-4)


def test_weighted_losses_of_parts_add_up_to_the_references_weighted_mean():
    """Over all images a sum of ours, divided by their number, is the reference's weighted mean."""
    labels = heavy_tailed(5000, 50)
    losses = np.random.default_rng(1).uniform(0, 5, 5000)
    weights = cluster_weights(np.bincount(labels), 0.5)[labels]
    parts = sum((losses[part] * weights[part]).sum() for part in np.array_split(np.arange(5000), 7))
    reference = np.bincount(labels)[labels] ** -0.5
    assert parts / 5000 == pytest.approx(np.average(losses, weights=reference), rel=1e-5)


@pytest.mark.parametrize("sizes", [[0, 0], []])
def test_weights_without_images_are_zero(sizes):
    assert np.array_equal(cluster_weights(np.array(sizes, np.int64), 0.5), np.zeros(len(sizes)))
