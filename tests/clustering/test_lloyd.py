"""The engine on integers of 8 bits against faiss, scikit-learn and arithmetic; both engines where they must behave alike."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans as SklearnKMeans
from sklearn.datasets import load_digits, make_blobs
from sklearn.metrics import normalized_mutual_info_score

from raydc.clustering import lloyd
from raydc.clustering.kmeans import choose_engine, kmeans, means
from raydc.clustering.whitening import fit_whitening, l2, moments

K = 100
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    """1,797 real digits, whitened and on the sphere: what a run clusters."""
    digits = load_digits().data.astype(np.float32)
    return fit_whitening(moments(digits), 32)(digits)


def by_torch(features_Nd: np.ndarray, k: int, **options):
    return kmeans(features_Nd, k, engine="torch", **options)


def exact(features_Nd: np.ndarray, centroids_kd: np.ndarray) -> np.ndarray:
    """(N, k) squared distances in float64."""
    return ((features_Nd[:, None].astype(np.float64) - centroids_kd[None]) ** 2).sum(2)


# --- against others ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spherical", [False, True])
def test_it_ends_where_faiss_ends_from_the_same_starts(features, spherical):
    """Where an early near tie falls differently either may find the better end, as far apart as faiss from a start that
    is a rounding error away; so it is the median of 24 starts that must not differ."""
    ratios = []
    for seed in range(24):
        start = features[np.random.default_rng(seed).choice(len(features), 30, replace=False)]
        how = {"start_kd": start, "spherical": spherical}
        ours, theirs = (kmeans(features, 30, engine=engine, **how) for engine in ("torch", "faiss"))
        ratios.append(ours.objective / theirs.objective)
    assert 0.999 <= np.median(ratios) <= 1.001, ratios
    assert max(ratios) <= 1.02, ratios


def test_one_iteration_is_faiss_but_for_the_rounding_of_near_ties(features):
    start = features[:K]
    ours, theirs = (kmeans(features, K, start_kd=start, iterations=1, engine=engine) for engine in ("torch", "faiss"))
    assert np.isclose(ours.objectives[0], theirs.objectives[0], rtol=1e-4)
    assert ours.objective <= 1.0005 * theirs.objective
    assert (ours.labels_N == theirs.labels_N).mean() > 0.97


@pytest.mark.parametrize("engine", ["torch", "faiss"])
def test_separable_clusters_are_found_as_scikit_learn_finds_them(engine):
    points, of = make_blobs(3000, 24, centers=15, cluster_std=0.5, random_state=1)
    points = points.astype(np.float32)
    start = means(points, np.where(np.arange(3000) < 300, of, -1), 15)
    theirs = SklearnKMeans(15, init=start, n_init=1, tol=0).fit(points)
    ours = kmeans(points, 15, start_kd=start, engine=engine)
    assert np.array_equal(ours.labels_N, theirs.labels_)
    assert np.array_equal(ours.labels_N, of)
    assert np.allclose(ours.centroids_kd, theirs.cluster_centers_, atol=1e-4)
    assert np.isclose(ours.objective, theirs.inertia_, rtol=1e-5)


def test_labels_are_the_nearest_centroid_and_distances_theirs(features):
    ours = by_torch(features, K, seed=2)
    squared = exact(features, ours.centroids_kd)
    assert np.array_equal(ours.labels_N, squared.argmin(1)), "whatever 8 bits leave in doubt is decided in float32"
    assert np.allclose(ours.distances_N, squared.min(1), atol=1e-6)
    assert np.isclose(ours.objective, squared.min(1).sum(), rtol=1e-6)
    assert (ours.labels_N.dtype, ours.distances_N.dtype, ours.centroids_kd.dtype) == (np.int32, np.float32, np.float32)


def test_more_centroids_than_are_compared_at_once():
    """2,500 clusters of 6,000 points: three tiles, the last one not full; labels as float64 finds them."""
    points = l2(np.random.default_rng(0).normal(size=(6000, 20)).astype(np.float32))
    ours = by_torch(points, 2500, iterations=3)
    assert np.array_equal(
        ours.labels_N, np.concatenate([exact(some, ours.centroids_kd).argmin(1) for some in points[:, None]])
    )
    assert (np.bincount(ours.labels_N, minlength=2500) > 0).all()


@pytest.mark.parametrize("spherical", [False, True])
def test_the_objective_never_rises_and_counts_the_iterations(features, spherical):
    ours = by_torch(features, K, iterations=40, seed=1, spherical=spherical)
    assert 5 < len(ours.objectives) <= 40
    assert (np.diff(ours.objectives) <= 1e-4 * ours.objectives[0]).all()
    assert ours.objective <= ours.objectives[-1] * (1 + 1e-5)
    assert ours.objective < 0.95 * ours.objectives[0]
    assert len(by_torch(features, K, iterations=3, spherical=spherical).objectives) == 3


def test_spherical_centroids_are_directions_and_objectives_squared_l2(features):
    ours, theirs = (kmeans(features, K, start_kd=features[:K], spherical=True, engine=one) for one in ("torch", "faiss"))
    assert np.allclose(np.linalg.norm(ours.centroids_kd, axis=1), 1, atol=1e-5)
    assert np.array_equal(ours.labels_N, exact(features, ours.centroids_kd).argmin(1))
    assert np.allclose(ours.objectives[0], theirs.objectives[0], rtol=1e-4)


@pytest.mark.parametrize("spherical", [False, True])
def test_a_warm_start_goes_on_where_the_last_one_ended(features, spherical):
    cold = kmeans(features, 20, iterations=200, seed=5, spherical=spherical)
    warm = by_torch(features, 20, iterations=2, seed=6, spherical=spherical, start_kd=means(features, cold.labels_N, 20))
    assert (warm.labels_N == cold.labels_N).mean() > 0.995
    assert np.isclose(warm.objective, cold.objective, rtol=1e-4)


def test_a_warm_start_completes_what_is_missing_and_leaves_the_callers_array_alone(features):
    start = means(features, load_digits().target, 12)  # two more clusters than digits
    ours = by_torch(features, 12, iterations=3, start_kd=start)
    assert np.isfinite(ours.centroids_kd).all() and np.isnan(start[10:]).all()
    assert (np.bincount(ours.labels_N, minlength=12) > 0).all()
    with pytest.raises(ValueError, match=r"begin with are \(9, 32\), not \(10, 32\)"):
        by_torch(features, 10, start_kd=features[:9])


# --- the same whoever computes -------------------------------------------------------------------------------------------


def test_threads_change_no_bit_and_the_setting_stays_as_it_was(features):
    before = torch.get_num_threads()
    one, two = (by_torch(features, K, seed=4, threads=threads) for threads in (1, 2))
    assert torch.get_num_threads() == before
    for name in ("labels_N", "centroids_kd", "distances_N", "objectives"):
        assert np.array_equal(getattr(one, name), getattr(two, name)), name


def test_seeds_start_elsewhere(features):
    a, b, c = (by_torch(features, K, seed=seed).labels_N for seed in (1, 1, 2))
    assert np.array_equal(a, b)
    assert normalized_mutual_info_score(a, c) < 0.95


def test_a_cpu_without_the_instruction_finds_the_same_bits(features, monkeypatch):
    ours = by_torch(features, K, seed=4)
    monkeypatch.setattr(lloyd, "has_fast_int8", lambda: not lloyd.torch.cpu.get_capabilities().get("avx512_vnni"))
    other = by_torch(features, K, seed=4)
    assert np.array_equal(ours.labels_N, other.labels_N) and np.array_equal(ours.centroids_kd, other.centroids_kd)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_finds_the_same_clusters(features):
    here, there = (by_torch(features, K, seed=4, iterations=5, gpu=gpu) for gpu in (False, True))
    assert (here.labels_N == there.labels_N).mean() > 0.99
    assert np.isclose(here.objective, there.objective, rtol=1e-3)


def test_the_order_of_the_centroids_does_not_matter(features):
    order = np.random.default_rng(0).permutation(K)
    one, other = (by_torch(features, K, start_kd=start) for start in (features[:K], features[:K][order]))
    assert (order[other.labels_N] == one.labels_N).mean() > 0.98


def test_far_from_the_origin_the_clusters_are_the_same(features):
    """Eight bits of the values as they are would see no difference at all."""
    here, there = (by_torch(features + shift, 20, start_kd=features[:20] + shift) for shift in (0, np.float32(50)))
    assert (here.labels_N == there.labels_N).mean() > 0.95
    assert np.isclose(here.objective, there.objective, rtol=2e-3)


# --- the parts -----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 12), st.floats(0.01, 100), st.integers(0, 2**32))
def test_the_best_score_and_its_lead_are_those_of_whole_numbers(num, dim, k, size, seed):
    rng = np.random.default_rng(seed)
    points = lloyd.quantise(torch.from_numpy(rng.normal(3, size, (num, dim)).astype(np.float32)))
    centroids = torch.from_numpy(rng.normal(0, size, (k, dim)).astype(np.float32))
    table = lloyd.tabulate(points, centroids)
    labels, leads = lloyd.nearest(points.ints_Nd, torch.arange(num), table)
    ((columns, offsets),) = table.tiles
    scores = points.ints_Nd.numpy().astype(np.int64) @ columns.numpy().astype(np.int64)[:, :k] + (offsets.numpy()[:k] >> 10)
    assert np.array_equal(labels.numpy(), scores.argmax(1)), "of equal ones the first"
    if k > 1:
        ranked = np.sort(scores, axis=1)
        assert np.array_equal(leads.numpy(), ranked[:, -1] - ranked[:, -2])
    reals = (points.features_Nd - points.mean_d).double() @ centroids.double().T - centroids.double().square().sum(1) / 2
    assert np.abs(scores * table.unit - reals.numpy()).max() * 2 <= table.doubt * table.unit


def test_sums_that_were_updated_are_those_of_all_rows(features):
    points = lloyd.quantise(torch.from_numpy(features))
    found = lloyd.Clusters(points, torch.from_numpy(features[:K]) - points.mean_d, False, np.random.default_rng(0))
    for iterations in (1, 1, 6):
        found.run(iterations)
        centred = features.astype(np.float64) - points.mean_d.numpy()
        sums = np.stack([centred[found.labels_N.numpy() == cluster].sum(0) for cluster in range(K)])
        assert np.allclose(found.sums_kd.numpy(), sums, atol=1e-5)
    own = sums / np.bincount(found.labels_N, minlength=K)[:, None]
    assert np.allclose(found.centroids_kd.numpy(), own, atol=1e-5)


def test_most_images_are_passed_over_late_and_their_labels_are_right(features):
    """What is skipped must be what would not change: nearest to the centroid of its label but for a few."""
    points = lloyd.quantise(torch.from_numpy(features))
    found = lloyd.Clusters(points, torch.from_numpy(features[:20]) - points.mean_d, False, np.random.default_rng(0))
    found.run(15)
    skipped = (found.leads_N >= 0).numpy()
    assert 0.2 < skipped.mean() < 1
    nearest = exact(features, (found.centroids_kd + points.mean_d).numpy()).argmin(1)
    assert (found.labels_N.numpy() == nearest)[skipped].mean() > 0.998


# --- what spoils it ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("options", [{}, {"spherical": True}, {"start_kd": np.ones((K, 32), np.float32)}])
def test_bad_features_are_refused_as_faiss_path_refuses_them(features, options, value):
    spoilt = features.copy()
    spoilt[77, 3] = value
    with pytest.raises(ValueError, match="not finite; lower train.lr"):
        by_torch(spoilt, K, **options)
    with pytest.raises(ValueError, match="num_clusters 100 is above the number of images 99"):
        by_torch(features[:99], K, **options)
    assert sorted(by_torch(features[:K], K, **options).labels_N) == list(range(K))


@pytest.mark.parametrize("value", [0.0, 0.1, -3.3, 1e-6, 1e15])
@pytest.mark.parametrize("spherical", [False, True])
def test_constant_features_are_one_cluster(value, spherical):
    points = np.full((300, 16), value, np.float32)
    points[0] = -points[0] if value == 0 else points[0]  # -0.0 is 0.0
    ours = by_torch(l2(points) if spherical else points, 20, spherical=spherical)
    assert (np.bincount(ours.labels_N, minlength=20) > 0).sum() == 1
    assert np.isfinite(ours.centroids_kd).all() and np.isfinite(ours.objectives).all()
    assert ours.objective < 1e-3 * max(1, value**2)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 4), st.booleans(), st.integers(0, 2**31 - 1))
def test_as_many_clusters_hold_images_as_can(num, k, values, spherical, seed):
    """Rows of whole numbers, many of them alike: filled clusters are min(k, kinds of rows)."""
    points = np.random.default_rng(seed).integers(1, values + 1, (num, 2)).astype(np.float32)
    points, k = l2(points) if spherical else points, min(k, num)
    ours = by_torch(points, k, seed=seed, iterations=3, spherical=spherical)
    assert len(set(ours.labels_N)) == min(k, len(np.unique(points, axis=0)))
    own = ((points.astype(np.float64) - ours.centroids_kd[ours.labels_N]) ** 2).sum(1)
    assert np.allclose(ours.distances_N, own, atol=1e-5)


def test_empty_clusters_are_split_off_and_counted():
    """All centroids at one place: one cluster has all images, the other nine are repaired, most of them at once."""
    points = np.concatenate([np.random.default_rng(0).normal(size=(500, 8)), np.full((500, 8), 20.0)]).astype(np.float32)
    crowded = by_torch(points, 10, start_kd=np.zeros((10, 8), np.float32))
    assert crowded.num_repaired >= 9
    assert (np.bincount(crowded.labels_N, minlength=10) > 0).all()
    good = kmeans(points, 10, start_kd=np.zeros((10, 8), np.float32))
    assert crowded.objective < 1.1 * good.objective
    assert by_torch(points, 2, start_kd=points[[0, 999]]).num_repaired == 0


def test_an_image_far_from_all_others_costs_precision_but_not_the_last_assignment():
    points = np.random.default_rng(0).normal(size=(2000, 16)).astype(np.float32)
    points[0] = 1e4
    ours = by_torch(points, 50)
    assert np.array_equal(ours.labels_N, exact(points, ours.centroids_kd).argmin(1))


def test_features_that_may_not_be_written_are_read_in_silence(features, recwarn):
    frozen = features.copy()
    frozen.flags.writeable = False
    assert np.array_equal(by_torch(frozen, K).labels_N, by_torch(features, K).labels_N)
    assert not [one for one in recwarn if "writable" in str(one.message)]


# --- the choice ----------------------------------------------------------------------------------------------------------


def test_small_sizes_and_gpus_are_left_to_faiss_and_large_ones_go_by_the_cpu():
    assert choose_engine(1797, 32, 100) == "faiss"
    assert choose_engine(1_281_167, 256, 10_000, gpu=True) == "faiss"
    assert choose_engine(1_281_167, 256, 10_000) == ("torch" if lloyd.has_fast_int8() else "faiss")


def test_auto_is_one_of_the_two(features):
    auto, faiss = (kmeans(features, K, seed=3, engine=engine).labels_N for engine in ("auto", "faiss"))
    assert np.array_equal(auto, faiss), "1,797 digits are small"


def test_the_engine_loads_no_faiss_and_a_small_choice_no_torch():
    """On a GPU a process can use but one of their CUDA versions."""
    code = """
import sys
import numpy as np
from raydc.clustering.kmeans import kmeans
points = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
kmeans(points, 5, engine=sys.argv[1])
print(*(name for name in ("faiss", "torch") if name in sys.modules))
"""
    for engine, loaded in (("torch", "torch"), ("auto", "faiss")):
        done = subprocess.run([sys.executable, "-c", code, engine], capture_output=True, text=True, check=True)
        assert done.stdout.split() == [loaded]
