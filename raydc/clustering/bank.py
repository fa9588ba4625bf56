"""The features of all images between two epochs: coverage, whitening, k-means and probes.

A plain class; launch makes it a Ray actor. Importing it loads neither faiss nor torch.
"""

from __future__ import annotations

import os
import uuid

import numpy as np
from threadpoolctl import threadpool_limits

from raydc.clustering.assignment import UNREADABLE, Assignment
from raydc.clustering.whitening import Moments, Whitening, fit_whitening
from raydc.config import ClusteringConfig, ProbeConfig
from raydc.seeding import derive


class CoverageError(RuntimeError):
    """The bank does not hold every image exactly as the current pass pushed it; the remedy is to extract again."""


class FeatureBank:
    """Holds the reduced features (N, d) of one extraction pass.

    Every call names the pass by the token that ``open`` gave out, so nothing that an earlier pass or a dead worker
    group still sends gets in, and a bank that lost its memory says so. Pushes write by image_id and may be repeated.
    """

    def __init__(self, num_images: int, config: ClusteringConfig, *, threads: int = 0, gpu: bool = False) -> None:
        self.num_images, self.config = num_images, config
        self.threads, self.gpu = threads or os.cpu_count() or 1, gpu
        self.token = ""

    def open(self) -> str:
        """Begin a pass and forget the last one; the token of the new one."""
        self.token = uuid.uuid4().hex
        self.moments: dict[int, Moments] = {}
        self.whitening_: Whitening | None = None
        self.features: np.ndarray | None = None
        self.covered = np.zeros(self.num_images, bool)
        self.unreadable = np.zeros(self.num_images, bool)
        self.probe: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {}
        return self.token

    def _check(self, token: str) -> None:
        if token != self.token:
            raise CoverageError("the bank knows another pass (it restarted, or the sender is late); extract again")

    def add_moments(self, token: str, rank: int, sums: Moments) -> None:
        self._check(token)
        self.moments[rank] = sums

    def whitening(self, token: str) -> Whitening:
        """Fitted once, on the sums of all ranks in rank order, so that it does not hang on who came first."""
        self._check(token)
        if self.whitening_ is None:
            sums = [self.moments[rank] for rank in sorted(self.moments)]
            expected = self.num_images - int(self.unreadable.sum())
            summed = sum(one.count for one in sums)
            if summed != expected:
                raise CoverageError(f"the ranks' sums hold {summed} images where {expected} were expected")
            if not expected:
                raise ValueError("no image could be read; make the shards again with jobs/make_shards.py")
            total = sum(sums[1:], start=sums[0])
            if not np.isfinite(total.gram_DD).all():
                raise ValueError("features are not finite; lower train.lr and start a new run directory")
            with threadpool_limits(self.threads):  # Ray starts actors with one BLAS thread
                self.whitening_ = fit_whitening(total, self.config.pca_dim, self.config.whiten)
        return self.whitening_

    def push(self, token: str, image_ids: np.ndarray, features_Bd: np.ndarray) -> None:
        """Reduced features of some images; a second push of an id replaces the first."""
        self._check(token)
        if self.features is None:
            self.features = np.zeros((self.num_images, features_Bd.shape[1]), np.float32)
        self._check_ids(image_ids)
        self.features[image_ids] = features_Bd
        self.covered[image_ids] = True

    def skip(self, token: str, image_ids: np.ndarray) -> None:
        """Images that could not be read in this pass; they get no pseudo-label."""
        self._check(token)
        self._check_ids(image_ids)
        self.unreadable[image_ids] = True

    def _check_ids(self, image_ids: np.ndarray) -> None:
        ids = np.asarray(image_ids)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.num_images:
            raise CoverageError(f"an image_id is outside 0..{self.num_images - 1}; the shards changed under the run")

    def cluster(self, token: str, epoch: int, seed: int, weights_hash: str) -> Assignment:
        """k-means of every readable image; CoverageError if one is missing, ValueError if k is above their number."""
        from raydc.clustering.kmeans import kmeans

        self._check(token)
        self.covered &= ~self.unreadable
        if self.unreadable.all():
            raise ValueError("no image could be read; make the shards again with jobs/make_shards.py")
        missing = ~(self.covered | self.unreadable)
        if missing.any():
            first = np.flatnonzero(missing)[:3].tolist()
            raise CoverageError(f"{missing.sum()} of {self.num_images} images were not extracted (image_id {first}...)")
        rows = np.flatnonzero(self.covered)
        features = self.features if len(rows) == self.num_images else self.features[rows]
        result = kmeans(
            features,
            self.config.num_clusters,
            iterations=self.config.iterations,
            seed=derive(seed, "kmeans", epoch),
            threads=self.threads,
            gpu=self.gpu,
        )
        labels = np.full(self.num_images, UNREADABLE, np.int32)
        distances = np.zeros(self.num_images, np.float32)
        labels[rows], distances[rows] = result.labels_N, result.distances_N
        return Assignment(epoch, labels, distances, result.centroids_kd, result.objective, weights_hash)

    # --- probes: raw features of a labelled part of the images ---------------------------------------------------------

    def push_probe(self, token: str, name: str, image_ids: np.ndarray, features_BD: np.ndarray) -> None:
        """Raw features for a probe; ``name`` is e.g. train or val."""
        self._check(token)
        ids, features = self.probe.setdefault(name, ([], []))
        ids.append(np.array(image_ids))
        features.append(np.array(features_BD, np.float32))

    def run_probe(self, token: str, names: tuple[str, str], config: ProbeConfig, labels: tuple, **options) -> dict:
        """``probe.evaluate`` on what was pushed under the two names, in the order of image_id, whoever pushed it."""
        from raydc.probe import evaluate

        self._check(token)
        sides = []
        for name, by_id in zip(names, labels, strict=True):
            # A split that is not there (no val was set aside) is one without rows.
            parts = self.probe.get(name, ([np.empty(0, np.int64)], [np.empty((0, 1), np.float32)]))
            ids, features = (np.concatenate(part) for part in parts)
            ids, first = np.unique(ids, return_index=True)
            sides += [ids, features[first], by_id[ids]]
        with threadpool_limits(self.threads):
            return evaluate(*sides, config, **options)
