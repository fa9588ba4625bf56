"""Power iteration clustering of the graph of nearest neighbours (protocol 1a, PIC): k is found, not given.

N images, d dimensions, n neighbours.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array

from raydc.clustering.kmeans import KMeans, checked, faiss_threads, flat_index, means, squared_distances

ITERATIONS = 200
ALPHA = 0.001  # the share of the graph in an iteration; the rest is uniform


def pic(features_Nd: np.ndarray, *, neighbours: int = 5, sigma: float = 0.2, threads: int = 0, gpu: bool = False) -> KMeans:
    """Images climb from neighbour to neighbour to the local maxima of a stationary vector; those are the clusters.

    ValueError where that gives one cluster, or as many as images.
    """
    features_Nd = checked(features_Nd)
    _check_number(len(features_Nd), neighbours)
    ids, squared = _nearest_others(features_Nd, neighbours, threads, gpu)
    graph = _graph(ids, squared, sigma)
    labels = _join_singletons(_climb(graph, _stationary(graph)), ids)
    k = int(labels.max()) + 1
    _check_clusters(k, len(labels))
    centroids = means(features_Nd, labels, k)
    return KMeans(centroids, labels, squared_distances(features_Nd, labels, centroids), np.empty(0))


def _check_number(num: int, neighbours: int) -> None:
    if num <= neighbours:
        raise ValueError(
            f"clustering.neighbours {neighbours} needs more images than the {num} there are; lower clustering.neighbours"
        )


def _check_clusters(k: int, num: int) -> None:
    if k == num:
        raise ValueError(
            f"PIC left each of the {num} images alone; raise clustering.sigma or neighbours in a new run directory"
        )
    if k == 1:
        raise ValueError(
            f"PIC put all {num} images into one cluster; lower clustering.sigma or neighbours in a new run directory"
        )


def _nearest_others(features_Nd: np.ndarray, neighbours: int, threads: int, gpu: bool) -> tuple[np.ndarray, np.ndarray]:
    """Positions and squared L2 distances (N, n) of the nearest images other than the image itself, best first."""
    import faiss  # lazily: only the process that clusters loads it

    index = flat_index(faiss, features_Nd.shape[1], gpu)
    index.add(features_Nd)
    with faiss_threads(threads):
        squared, ids = index.search(features_Nd, neighbours + 1)
    own = ids == np.arange(len(ids))[:, None]
    own[~own.any(1), -1] = True  # among many copies an image need not be found itself
    return ids[~own].reshape(-1, neighbours), np.maximum(squared[~own].reshape(-1, neighbours), 0)


def _graph(ids: np.ndarray, squared: np.ndarray, sigma: float) -> csr_array:
    """(N, N), symmetric: Gaussian weights exp(-d / sigma^2) of d squared L2, added up where two are mutual neighbours."""
    num, neighbours = ids.shape
    weights = np.exp(-squared.astype(np.float64) / sigma**2)
    directed = csr_array((weights.ravel(), ids.ravel(), np.arange(num + 1) * neighbours), shape=(num, num))
    graph = (directed + directed.T).tocsr()
    graph.sort_indices()
    return graph


def _stationary(graph: csr_array) -> np.ndarray:
    """(N,), sum 1: large where an image has many and close neighbours."""
    num = graph.shape[0]
    vector = np.full(num, 1 / num)
    for _ in range(ITERATIONS):
        vector = ALPHA * (graph @ vector) + (1 - ALPHA) / num
        vector /= vector.sum()
    return vector


def _climb(graph: csr_array, vector: np.ndarray) -> np.ndarray:
    """(N,): the local maximum each image ends at when it always goes to the neighbour with the steepest weighted rise."""
    num = graph.shape[0]
    rows, cols = np.repeat(np.arange(num), np.diff(graph.indptr)), graph.indices
    rise = graph.data * (vector[cols] - vector[rows])
    steepest = np.zeros(num)
    np.maximum.at(steepest, rows, rise)
    best = np.flatnonzero((rise > 0) & (rise == steepest[rows]))[::-1]  # of equals the first: it is written last
    goal = np.arange(num)
    goal[rows[best]] = cols[best]
    while not np.array_equal(goal, further := goal[goal]):  # doubles the number of steps taken
        goal = further
    return goal


def _join_singletons(clusters: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """int32 labels 0..k-1; an image that is alone joins its nearest neighbour that is not, if one of them is not."""
    _, labels, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    alone = np.flatnonzero(sizes[labels] == 1)
    in_company = sizes[labels[ids[alone]]] > 1
    joins = in_company.any(1)
    host = ids[alone[joins], in_company[joins].argmax(1)]
    labels[alone[joins]] = labels[host]
    return np.unique(labels, return_inverse=True)[1].astype(np.int32)
