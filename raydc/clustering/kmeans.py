"""k-means on the faiss index: 20 Lloyd iterations from random points, empty clusters split (protocol 1a)."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class KMeans:
    """Result for N points of d dimensions and k clusters; ``objectives`` holds the sum of squared distances before each
    iteration's update."""

    centroids_kd: np.ndarray
    labels_N: np.ndarray
    distances_N: np.ndarray
    objectives: np.ndarray

    @property
    def objective(self) -> float:
        return float(self.distances_N.sum(dtype=np.float64))


def kmeans(
    features_Nd: np.ndarray, k: int, *, iterations: int = 20, seed: int = 0, threads: int = 0, gpu: bool = False
) -> KMeans:
    """Lloyd's algorithm as faiss runs it, on ``gpu`` where there is one; ValueError if k > N or not finite."""
    import faiss  # its wheel and torch's are built for different CUDA versions: only the process that clusters loads it

    num, dim = features_Nd.shape
    if k > num:
        raise ValueError(f"num_clusters {k} is above the number of images {num}; lower clustering.num_clusters")
    features_Nd = np.ascontiguousarray(features_Nd, np.float32)
    if not np.isfinite(features_Nd).all():
        raise ValueError("features are not finite; lower train.lr or start again from an earlier checkpoint")
    clustering = faiss.Clustering(dim, k)
    clustering.niter = iterations
    clustering.seed = seed & 0x7FFFFFFF  # a C int
    clustering.max_points_per_centroid = 10_000_000  # no subsampling, as in the reference
    clustering.min_points_per_centroid = 1  # small clusters are reported by the diagnostics, not by faiss's warning
    index = _index(faiss, dim, gpu)
    with _threads(faiss, threads):
        clustering.train(features_Nd, index)
        distances, labels = index.search(features_Nd, 1)
    stats = clustering.iteration_stats
    return KMeans(
        faiss.vector_to_array(clustering.centroids).reshape(k, dim).copy(),
        labels[:, 0].astype(np.int32),
        np.maximum(distances[:, 0], 0),  # ||x||^2 - 2xc + ||c||^2 can round below zero
        np.array([stats.at(i).obj for i in range(stats.size())]),
    )


@contextlib.contextmanager
def _threads(faiss, threads: int):
    """The setting is the whole process's: torch, where it trains in this one, must find it as it was."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads or before)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _index(faiss, dim: int, gpu: bool):
    """A process may see a GPU that is not its own: it is used only where the bank was given a share of it."""
    if not gpu or faiss.get_num_gpus() == 0:
        return faiss.IndexFlatL2(dim)
    return faiss.GpuIndexFlatL2(faiss.StandardGpuResources(), dim, faiss.GpuIndexFlatConfig())
