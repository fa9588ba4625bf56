"""k-means: 20 Lloyd iterations from random points, empty clusters split (protocol 1a), by faiss or by ``lloyd``.

N images, d dimensions, k clusters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import csr_array

ROWS = 16384  # of the features that are copied at once, where another type is needed
LARGE = 1_000_000_000  # N d k, from where ``lloyd`` is worth its start


@dataclass(frozen=True, eq=False)
class KMeans:
    """Result for N points of d dimensions and k clusters; ``objectives`` holds the sum of squared distances before each
    iteration's update.

    ``num_repaired`` counts empty clusters that were given points: between iterations by a split of another one (faiss),
    after the last by the image that lay farthest from its centroid.
    """

    centroids_kd: np.ndarray
    labels_N: np.ndarray
    distances_N: np.ndarray
    objectives: np.ndarray
    num_repaired: int = 0

    @property
    def objective(self) -> float:
        return float(self.distances_N.sum(dtype=np.float64))


def kmeans(
    features_Nd: np.ndarray,
    k: int,
    *,
    iterations: int = 20,
    seed: int = 0,
    threads: int = 0,
    gpu: bool = False,
    spherical: bool = False,
    start_kd: np.ndarray | None = None,
    engine: str = "faiss",
) -> KMeans:
    """Lloyd's algorithm, on ``gpu`` where there is one; ValueError if k > N or not finite.

    ``spherical``: by cosine, with centroids of length one, as rows must be (protocol 1c); distances stay squared L2.
    ``start_kd``: centroids to begin with; those that are not finite become random images. No cluster is empty at the
    end unless fewer than k images differ. ``engine``: faiss, torch or auto; see ``choose_engine``.
    """
    num, dim = features_Nd.shape
    if k > num:
        raise ValueError(f"num_clusters {k} is above the number of images {num}; lower clustering.num_clusters")
    features_Nd = checked(features_Nd)
    if start_kd is not None:
        start_kd = _complete(start_kd, features_Nd, k, seed)
    if engine == "auto":
        engine = choose_engine(num, dim, k, gpu)
    # The wheels of faiss and torch are built for different CUDA versions: on a GPU a process can use but one of them.
    engine_of = {"faiss": _by_faiss, "torch": _by_torch}[engine]
    how = {"iterations": iterations, "seed": seed, "threads": threads, "gpu": gpu, "spherical": spherical}
    result = engine_of(features_Nd, k, start_kd, **how)
    num_filled = _fill_empty(features_Nd, result.labels_N, result.distances_N, result.centroids_kd)
    return replace(result, num_repaired=result.num_repaired + num_filled)


def choose_engine(num: int, dim: int, k: int, gpu: bool = False) -> str:
    """torch where the CPU multiplies integers of 8 bits in hardware and the sizes are worth it, else faiss.

    From the machine and the sizes alone, never from a stopwatch (tests/bench/kmeans.py measures the rule).
    """
    if gpu or num * dim * k < LARGE:
        return "faiss"
    from raydc.clustering.lloyd import has_fast_int8

    return "torch" if has_fast_int8() else "faiss"


def _by_torch(features_Nd: np.ndarray, k: int, start_kd: np.ndarray | None, *, threads: int, gpu: bool, **how) -> KMeans:
    from raydc.clustering import lloyd

    with lloyd.torch_threads(threads):
        centroids, labels, distances, objectives, num_split = lloyd.run(features_Nd, k, start_kd, gpu=gpu, **how)
    return KMeans(centroids, labels, distances, objectives, num_split)


def _by_faiss(
    features_Nd: np.ndarray,
    k: int,
    start_kd: np.ndarray | None,
    *,
    iterations: int,
    seed: int,
    threads: int,
    gpu: bool,
    spherical: bool,
) -> KMeans:
    import faiss

    dim = features_Nd.shape[1]
    clustering = _clustering(faiss, dim, k, iterations, seed, spherical)
    if start_kd is not None:
        faiss.copy_array_to_vector(start_kd.ravel(), clustering.centroids)
    index = flat_index(faiss, dim, gpu, spherical)
    with faiss_threads(threads):
        clustering.train(features_Nd, index)
        found, labels = (column[:, 0] for column in index.search(features_Nd, 1))
    centroids, labels = faiss.vector_to_array(clustering.centroids).reshape(k, dim).copy(), labels.astype(np.int32)
    stats = [clustering.iteration_stats.at(i) for i in range(clustering.iteration_stats.size())]
    objectives = np.array([one.obj for one in stats])
    if spherical:
        found, objectives = _from_products(found, objectives, features_Nd, labels, centroids)
    distances = np.maximum(found, 0)  # ||x||^2 - 2xc + ||c||^2 can round below zero
    return KMeans(centroids, labels, distances, objectives, sum(one.nsplit for one in stats))


def checked(features_Nd: np.ndarray) -> np.ndarray:
    """Features as faiss takes them; ValueError if one is not finite."""
    features_Nd = np.ascontiguousarray(features_Nd, np.float32)
    if not np.isfinite(features_Nd).all():
        raise ValueError("features are not finite; lower train.lr or start again from an earlier checkpoint")
    return features_Nd


def means(features_Nd: np.ndarray, labels_N: np.ndarray, k: int) -> np.ndarray:
    """float32 (k, d): the mean of each cluster, summed in float64; NaN where it is empty. Labels of -1 are left out."""
    groups = np.asarray(labels_N, np.int64) + 1  # those left out are group 0
    sums = np.zeros((k + 1, features_Nd.shape[1]))
    for rows in _blocks(len(groups)):
        num = len(groups[rows])
        members = csr_array((np.ones(num), groups[rows], np.arange(num + 1)), shape=(num, k + 1)).T
        sums += members @ features_Nd[rows].astype(np.float64)
    with np.errstate(invalid="ignore"):
        return (sums[1:] / np.bincount(groups, minlength=k + 1)[1:, None]).astype(np.float32)


def squared_distances(features_Nd: np.ndarray, labels_N: np.ndarray, centroids_kd: np.ndarray) -> np.ndarray:
    """float32 (N,): squared L2 to the own centroid."""
    return np.concatenate([_squares(features_Nd[rows] - centroids_kd[labels_N[rows]]) for rows in _blocks(len(labels_N))])


@contextlib.contextmanager
def faiss_threads(threads: int) -> Iterator[None]:
    """The setting is the whole process's: torch, where it trains in this one, must find it as it was."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads or before)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _clustering(faiss, dim: int, k: int, iterations: int, seed: int, spherical: bool):
    clustering = faiss.Clustering(dim, k)
    clustering.niter = iterations
    clustering.seed = seed & 0x7FFFFFFF  # a C int
    clustering.spherical = spherical
    clustering.max_points_per_centroid = 10_000_000  # no subsampling, as in the reference
    clustering.min_points_per_centroid = 1  # small clusters are reported by the diagnostics, not by faiss's warning
    return clustering


def flat_index(faiss, dim: int, gpu: bool, spherical: bool = False):
    """A process may see a GPU that is not its own: it is used only where the bank was given a share of it."""
    if not gpu or faiss.get_num_gpus() == 0:
        return faiss.IndexFlatIP(dim) if spherical else faiss.IndexFlatL2(dim)
    flat = faiss.GpuIndexFlatIP if spherical else faiss.GpuIndexFlatL2
    return flat(faiss.StandardGpuResources(), dim, faiss.GpuIndexFlatConfig())


def _from_products(products_N, sums, features_Nd, labels_N, centroids_kd) -> tuple[np.ndarray, np.ndarray]:
    """Squared L2 from the inner products that faiss found, and from their sums over all images in each iteration."""
    lengths_N = _squares(features_Nd)
    distances_N = lengths_N + _squares(centroids_kd)[labels_N] - 2 * products_N
    return distances_N, lengths_N.sum(dtype=np.float64) + len(features_Nd) - 2 * sums


def _complete(start_kd: np.ndarray, features_Nd: np.ndarray, k: int, seed: int) -> np.ndarray:
    """The centroids to begin with; a cluster that had no image (NaN) begins at one that is drawn, each another."""
    if start_kd.shape != (k, features_Nd.shape[1]):
        raise ValueError(f"centroids to begin with are {start_kd.shape}, not {(k, features_Nd.shape[1])}")
    start_kd = np.array(start_kd, np.float32)
    missing = np.flatnonzero(~np.isfinite(start_kd).all(1))
    drawn = np.random.default_rng(seed).choice(len(features_Nd), len(missing), replace=False)
    start_kd[missing] = features_Nd[drawn]
    return start_kd


def _fill_empty(features_Nd: np.ndarray, labels_N: np.ndarray, distances_N: np.ndarray, centroids_kd: np.ndarray) -> int:
    """Each empty cluster takes the image farthest from its centroid, of a cluster that keeps another one; in place.

    Images that are alike move together and count as one. Returns how many clusters were filled.
    """
    k = len(centroids_kd)
    if np.bincount(labels_N, minlength=k).all():
        return 0
    first, kind = _alike(features_Nd)
    labels, distances = labels_N[first], distances_N[first]  # of each kind
    empty = np.flatnonzero(np.bincount(labels, minlength=k) == 0)
    movers = _spare(labels, distances)[: len(empty)]
    empty = empty[: len(movers)]
    centroids_kd[empty] = features_Nd[first[movers]]
    labels[movers], distances[movers] = empty, 0
    labels_N[:], distances_N[:] = labels[kind], distances[kind]
    return len(empty)


def _spare(labels: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """Rows in the order of their distance, farthest first, without the one of each cluster that is nearest."""
    order = np.argsort(-distances, kind="stable")
    _, from_end = np.unique(labels[order[::-1]], return_index=True)
    return np.delete(order, len(order) - 1 - from_end)


def _alike(features_Nd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the first image of each kind, the kind of each image (N,)); images of a kind have equal features.

    By a 64-bit hash, linear in the bits of a row: sorting whole rows takes five times as long.
    """
    factors = np.random.default_rng(0).integers(0, 2**64, features_Nd.shape[1], np.uint64) | np.uint64(1)
    keys = np.concatenate([_bits(features_Nd[rows]) @ factors for rows in _blocks(len(features_Nd))])
    _, first, kind = np.unique(keys, return_index=True, return_inverse=True)
    rank = np.empty_like(first)
    rank[np.argsort(first)] = np.arange(len(first))  # kinds in the order of the rows: of equal distances the first goes
    return np.sort(first), rank[kind]


def _bits(rows_Nd: np.ndarray) -> np.ndarray:
    """uint64 (N, d), equal where the float32 are, low bits set too: a factor carries no bit downwards."""
    bits = (rows_Nd + np.float32(0)).view(np.uint32)  # -0 becomes 0
    return (bits ^ (bits >> np.uint32(16))).astype(np.uint64)


def _squares(rows_Nd: np.ndarray) -> np.ndarray:
    return np.einsum("nd,nd->n", rows_Nd, rows_Nd)


def _blocks(num: int) -> Iterator[slice]:
    return (slice(start, min(num, start + ROWS)) for start in range(0, num, ROWS))
