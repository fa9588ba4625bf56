"""The features of all images between two epochs: coverage, whitening, k-means and probes.

A plain class; launch makes it a Ray actor. Importing it loads neither faiss nor torch.
"""

from __future__ import annotations

import os
import time
import uuid

import numpy as np
from threadpoolctl import threadpool_limits

from raydc.clustering.assignment import UNREADABLE, Assignment
from raydc.clustering.kmeans import squared_distances
from raydc.clustering.memory import FeatureMemory
from raydc.clustering.online import OnlineClusters
from raydc.clustering.whitening import Moments, Whitening, fit_whitening, l2, moments
from raydc.config import ClusteringConfig, ProbeConfig
from raydc.seeding import derive
from raydc.storage import Folder

ROWS = 65536  # rows that are projected at once


class CoverageError(RuntimeError):
    """The bank does not hold every image exactly as the current pass pushed it; the remedy is to extract again."""


def check_complete(num_images: int, num_missing: int, first: list[int], num_readable: int) -> None:
    """CoverageError where images (``first`` of them) were neither pushed nor skipped, ValueError where all were skipped."""
    if num_missing:
        raise CoverageError(f"{num_missing} of {num_images} images were not extracted (image_id {first}...)")
    if not num_readable:
        raise ValueError("no image could be read; make the shards again with jobs/make_shards.py")


class FeatureBank:
    """Holds the reduced features (N, d) of one extraction pass.

    Every call of a pass names it by the token that ``open`` gave out, so nothing that an earlier pass or a dead worker
    group still sends gets in, and a bank that lost its memory says so. Pushes write by image_id and may be repeated.
    Beside the pass it holds what is remembered from training, which each start reads anew from the last commit point.
    """

    def __init__(self, num_images: int, config: ClusteringConfig, *, threads: int = 0, gpu: bool = False) -> None:
        self.num_images, self.config = num_images, config
        self.threads, self.gpu = threads or os.cpu_count() or 1, gpu
        self.token = ""
        self.memory: FeatureMemory | None = None
        self.online: OnlineClusters | None = None
        self.num_split = 0  # of ODC's clusters, in the last epoch

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

    def cpu_s(self) -> float:
        """CPU seconds of this process so far."""
        return time.process_time()

    def add_moments(self, token: str, rank: int, sums: Moments) -> None:
        self._check(token)
        self.moments[rank] = sums

    def num_readable(self, token: str) -> int:
        """Images that were not skipped so far."""
        self._check(token)
        return self.num_images - int(self.unreadable.sum())

    def whitening(self, token: str, elsewhere: int = 0) -> Whitening:
        """Fitted once, on the sums of all ranks in rank order, so that it does not hang on who came first.

        ``elsewhere``: readable images that are in the sums, but not in this bank.
        """
        self._check(token)
        if self.whitening_ is None:
            sums = [self.moments[rank] for rank in sorted(self.moments)]
            expected = self.num_readable(token) + elsewhere
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

    def cluster(
        self, token: str, epoch: int, seed: int, weights_hash: str, previous_labels: np.ndarray | None = None
    ) -> Assignment:
        """Cluster every readable image; CoverageError if one is missing, ValueError if k is above their number.

        ``previous_labels``: where k-means begins if it starts warm.
        """
        self._check(token)
        check_complete(self.num_images, *self._coverage())
        rows = np.flatnonzero(self.covered)
        features = self.features if len(rows) == self.num_images else self.features[rows]
        facts = {"epoch": epoch, "weights_hash": weights_hash, "whitening": self.whitening_}
        return self._cluster(features, rows, derive(seed, "kmeans", epoch), previous_labels, facts)

    def _coverage(self) -> tuple[int, list[int], int]:
        """(images neither pushed nor skipped, the first three of them, images to cluster)."""
        self.covered &= ~self.unreadable
        missing = ~(self.covered | self.unreadable)
        return int(missing.sum()), np.flatnonzero(missing)[:3].tolist(), int(self.covered.sum())

    def _cluster(self, features_nd: np.ndarray, rows: np.ndarray, seed: int, previous_labels, facts: dict) -> Assignment:
        """``features_nd`` are those of the images ``rows``; all other images get no pseudo-label."""
        from raydc.clustering.kmeans import kmeans, means
        from raydc.clustering.pic import pic

        config = self.config
        if config.method == "pic":
            where = {"neighbours": config.neighbours, "sigma": config.sigma}
            result = pic(features_nd, **where, threads=self.threads, gpu=self.gpu)
        else:
            start = None
            if config.start == "warm" and previous_labels is not None:
                start = means(features_nd, previous_labels[rows], config.num_clusters)
            where = {"threads": self.threads, "gpu": self.gpu, "engine": config.engine}
            how = {"iterations": config.iterations, "spherical": config.method == "spherical", "start_kd": start}
            result = kmeans(features_nd, config.num_clusters, seed=seed, **how, **where)
        labels = np.full(self.num_images, UNREADABLE, np.int32)
        distances = np.zeros(self.num_images, np.float32)
        labels[rows], distances[rows] = result.labels_N, result.distances_N
        return Assignment(
            pseudo_labels=labels,
            distances=distances,
            centroids=result.centroids_kd,
            objective=result.objective,
            num_repaired=result.num_repaired,
            **facts,
        )

    # --- memory: features of the last time an image was trained on; it outlives the passes ------------------------------

    def open_memory(self, num_views: int = 1) -> None:
        """Forget what was remembered."""
        self.memory, self.online = FeatureMemory(self.num_images, num_views), None

    def remember(self, view: int, image_ids: np.ndarray, steps: np.ndarray, features_Bd: np.ndarray) -> None:
        self._check_memory()
        self._check_ids(image_ids)
        self.memory.write(view, image_ids, steps, features_Bd)

    def _check_memory(self) -> FeatureMemory:
        if self.memory is None:
            raise CoverageError("the bank restarted and remembers nothing")
        return self.memory

    def cluster_memory(
        self, view: int, unreadable: np.ndarray, epoch: int, seed: int, weights_hash: str, previous_labels=None
    ) -> Assignment:
        """Cluster what is remembered of every image that is not ``unreadable`` (ids); CoverageError if one is missing."""
        memory = self._check_memory()
        wanted = np.ones(self.num_images, bool)
        wanted[unreadable] = False
        if not wanted.any():
            raise ValueError("no image could be read; make the shards again with jobs/make_shards.py")
        missing = wanted & memory.missing()
        if missing.any():
            first = np.flatnonzero(missing)[:3].tolist()
            raise CoverageError(f"{missing.sum()} of {self.num_images} images are not remembered (image_id {first}...)")
        rows = np.flatnonzero(wanted)
        features = memory.features[view] if wanted.all() else memory.features[view][rows]
        with threadpool_limits(self.threads):
            sums = moments(features, gram=self.config.pca_dim > 0)
            if not np.isfinite(sums.total_D).all():
                raise ValueError("features are not finite; lower train.lr and start a new run directory")
            whitening = fit_whitening(sums, self.config.pca_dim, self.config.whiten)
            reduced = np.concatenate([whitening(features[at : at + ROWS]) for at in range(0, len(rows), ROWS)])
        facts = {"epoch": epoch, "weights_hash": weights_hash, "whitening": whitening}
        return self._cluster(reduced, rows, derive(seed, "kmeans", epoch, view), previous_labels, facts)

    def num_older(self, step: int) -> int:
        """Images whose remembered feature is of before ``step``."""
        return self._check_memory().num_older(step)

    def save_memory(self, folder: Folder, file: str) -> None:
        """Commit what is remembered, beside and renamed; 4 V d bytes an image. ValueError where there is no room."""
        from safetensors.numpy import save

        state = self._check_memory().state()
        if self.online is not None:
            self.num_split = self.online.num_split
            self.online.reset_counts()
            state["num_split"] = np.array(self.num_split)
            state |= {f"online.{key}": value for key, value in self.online.state().items()}
        try:
            folder.write(file, save({key: np.asarray(value, order="C") for key, value in state.items()}))
        except OSError as error:
            raise ValueError(
                f"{folder.uri}/{file} could not be written ({error.strerror or error}); what was committed before is "
                "intact: free some space and give the same command again"
            ) from None

    def load_memory(self, folder: Folder, file: str, online: dict | None = None) -> bool:
        """Go on with what was committed; False where nothing was. ``online``: options of OnlineClusters, for ODC."""
        from safetensors.numpy import load

        self.memory = self.online = None
        if not folder.exists(file):
            return False
        state = load(folder.read(file))
        self.memory = FeatureMemory.load(state)
        if online is not None:
            kept = {key.removeprefix("online."): value for key, value in state.items() if key.startswith("online.")}
            self.online = OnlineClusters.load(self.memory.features[0], kept, **online)
            self.num_split = int(state["num_split"])
        return True

    # --- online labels (ODC) ---------------------------------------------------------------------------------------------

    def open_online(self, labels: np.ndarray, num_clusters: int, options: dict) -> np.ndarray:
        """Labels that change with each step, beginning with ``labels``, over what is remembered; the labels in force."""
        features = self._check_memory().features[0]
        features[:] = l2(features)
        with threadpool_limits(self.threads):
            self.online = OnlineClusters(features, labels, num_clusters, **options)
        return self.online.labels.copy()

    def _check_online(self) -> OnlineClusters:
        if self.online is None:
            raise CoverageError("the bank restarted and remembers nothing")
        return self.online

    def update_online(self, image_ids: np.ndarray, features_Bd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A global batch's new features; (image_ids, labels) of all images whose label changed."""
        with threadpool_limits(self.threads):
            return self._check_online().update(image_ids, features_Bd)

    def online_assignment(self, epoch: int, weights_hash: str) -> Assignment:
        """The labels in force, as a clustering; ``num_repaired`` are the splits of the epoch before."""
        online = self._check_online()
        labels, centroids = online.labels.copy(), online.centroids.astype(np.float32)
        known, distances = np.flatnonzero(labels >= 0), np.zeros(len(labels), np.float32)
        distances[known] = squared_distances(online.features[known], labels[known], centroids)
        objective = float(distances.sum(dtype=np.float64))
        return Assignment(epoch, labels, distances, centroids, objective, weights_hash, None, self.num_split)

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
