"""Labels that follow the features step by step: the two memories of online deep clustering.

Zhan et al., Online Deep Clustering for Unsupervised Representation Learning, CVPR 2020, section 3; the settings and the
order within a step are those of the published configuration r50_v1 (protocol 1d and its lines in section 12).

N images, B images of a batch, k clusters, d dimensions.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
from threadpoolctl import threadpool_limits

from raydc.clustering.whitening import l2
from raydc.seeding import derive

ROWS = 1024  # images at once: ImageNet's k is 10,000, and they are compared with every centroid


class OnlineClusters:
    """Labels (N,) and centroids (k, d) over a memory of features that somebody else holds.

    ``features_Nd`` (float32, unit rows) is kept by reference and written in place; ``labels_N`` is copied, and an image
    labelled -1 (unreadable) is never touched. Clusters that are empty at the start are filled at once, which ``num_split``
    counts: read ``labels`` afterwards. One that never had an image has NaN for its centroid. ValueError if features are
    not finite.
    """

    def __init__(
        self,
        features_Nd: np.ndarray,
        labels_N: np.ndarray,
        num_clusters: int,
        *,
        momentum: float = 0.5,
        centroids_every: int = 10,
        min_cluster: int = 20,
        seed: int,
    ) -> None:
        readable = _check(features_Nd, labels_N, num_clusters)
        shape = (num_clusters, features_Nd.shape[1])
        start = {
            "labels": np.asarray(labels_N, np.int32),
            "centroids": np.full(shape, np.nan, np.float32),
            "sums": np.zeros(shape),
            "counts": np.zeros(num_clusters, np.int64),
            "step": np.array(0),
            "totals": np.zeros(2, np.int64),
        }
        options = {"momentum": momentum, "centroids_every": centroids_every, "min_cluster": min_cluster, "seed": seed}
        self._hold(features_Nd, start, **options)
        self._put_in(readable, self.labels[readable])
        if not np.isfinite(self.sums).all():
            raise ValueError("features are not finite; lower train.lr or start again from an earlier checkpoint")
        self._centre(np.flatnonzero(self.counts))
        self._fill_empty()

    def _hold(self, features_Nd, state, *, momentum: float, centroids_every: int, min_cluster: int, seed: int) -> None:
        """Take over copies of a state's arrays; everything else follows from them."""
        self.features = features_Nd
        self.momentum, self.centroids_every, self.min_cluster = momentum, centroids_every, min_cluster
        self.seed = seed
        self.labels, self.centroids = np.array(state["labels"]), np.array(state["centroids"])
        self.sums, self.counts = np.array(state["sums"]), np.array(state["counts"])
        self.step = int(state["step"])
        self.num_split, self.num_dissolved = (int(total) for total in state["totals"])
        self.moved: list[tuple[np.ndarray, np.ndarray]] = []

    # --- what is asked and saved ----------------------------------------------------------------------------------------

    @property
    def sizes(self) -> np.ndarray:
        """int64 (k,): images in each cluster."""
        return self.counts.copy()

    @property
    def num_empty_clusters(self) -> int:
        return int((self.counts == 0).sum())

    def reset_counts(self) -> None:
        """``num_split`` and ``num_dissolved`` count clusters from here on."""
        self.num_split = self.num_dissolved = 0

    def state(self) -> dict[str, np.ndarray]:
        """Everything but the features, as copies; with the features of the same step, ``load`` goes on bit by bit."""
        arrays = {name: getattr(self, name).copy() for name in ("labels", "centroids", "sums", "counts")}
        return arrays | {"step": np.array(self.step), "totals": np.array([self.num_split, self.num_dissolved])}

    @classmethod
    def load(
        cls,
        features_Nd: np.ndarray,
        state: dict[str, np.ndarray],
        *,
        momentum: float,
        centroids_every: int,
        min_cluster: int,
        seed: int,
    ) -> OnlineClusters:
        """Go on where ``state()`` was taken; ``features_Nd`` is the memory as it was then."""
        _check(features_Nd, state["labels"], len(state["counts"]))
        self = cls.__new__(cls)
        options = {"momentum": momentum, "centroids_every": centroids_every, "min_cluster": min_cluster, "seed": seed}
        self._hold(features_Nd, state, **options)
        return self

    # --- one step -------------------------------------------------------------------------------------------------------

    def update(self, image_ids: np.ndarray, features_Bd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One global batch, of raw features; (image_ids, labels) of all images whose label changed, each once, ascending.

        Of an id that comes twice the last row counts. ValueError if a feature is not finite; nothing has changed then.
        """
        ids, rows = self._batch(image_ids, features_Bd)
        self.step += 1
        self.moved = []
        remembered = l2((1 - self.momentum) * self.features[ids] + self.momentum * l2(rows))
        self._take_out(ids)
        self.features[ids] = remembered
        self._put_in(ids, self._nearest(ids, ~np.isnan(self.centroids[:, 0])))
        if self.step % self.centroids_every == 0:
            self._centre(np.flatnonzero(self.counts))
        self._dissolve_small()
        self._fill_empty()
        return self._changes()

    def _batch(self, image_ids: np.ndarray, features_Bd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Readable ids, ascending and each once, and the last row of each."""
        ids, rows = np.asarray(image_ids, np.int64), np.asarray(features_Bd, np.float32)
        if rows.shape != (len(ids), self.features.shape[1]):
            raise ValueError(f"features of shape {rows.shape} for {len(ids)} images of {self.features.shape[1]} dimensions")
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(self.labels):
            raise ValueError(f"an image_id is outside 0..{len(self.labels) - 1}; the shards changed under the run")
        if not np.isfinite(rows).all():
            raise ValueError("features are not finite; lower train.lr or start again from an earlier checkpoint")
        ids, from_the_end = np.unique(ids[::-1], return_index=True)
        readable = self.labels[ids] >= 0
        return ids[readable], rows[::-1][from_the_end[readable]]

    def _changes(self) -> tuple[np.ndarray, np.ndarray]:
        """Against the labels that images had when they were first taken out in this step."""
        ids, before = (np.concatenate(part) for part in zip(*self.moved, strict=True))
        ids, first = np.unique(ids, return_index=True)
        changed = ids[self.labels[ids] != before[first]]
        return changed, self.labels[changed]

    # --- small and empty clusters ---------------------------------------------------------------------------------------

    @property
    def _least(self) -> int:
        """Images that a cluster needs to stay."""
        return max(self.min_cluster, 1)

    def _dissolve_small(self) -> None:
        """Members of small clusters go to the nearest one that is not; where all are small, the largest one stays."""
        stays = self.counts >= self._least
        if not stays.any():
            stays[self.counts.argmax()] = True
        small = (self.counts > 0) & ~stays
        if small.any():
            ids = np.flatnonzero(small[self.labels] & (self.labels >= 0))
            self._take_out(ids)
            self._put_in(ids, self._nearest(ids, stays))
            self.num_dissolved += int(small.sum())

    def _fill_empty(self) -> None:
        """Each empty cluster gets half of the largest, until halves would be small: the remaining ones stay empty."""
        for empty in np.flatnonzero(self.counts == 0):
            largest = self.counts.argmax()
            if self.counts[largest] < 2 * self._least:
                break
            ids = np.flatnonzero(self.labels == largest)
            ids = ids[self._half(ids, derive(self.seed, "split", self.step, int(empty)))]
            self._take_out(ids)
            self._put_in(ids, np.full(len(ids), empty, np.int32))
            self._centre(np.array([largest, empty]))
            self.num_split += 1

    def _half(self, ids: np.ndarray, seed: int) -> np.ndarray:
        """Which of ``ids`` leave, as 2-means has it; a random half where it would leave a cluster too small."""
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning

        model = KMeans(2, max_iter=20, n_init=1, random_state=seed % 2**32)
        # More threads add up in the order in which they finish, which is another one each time.
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.simplefilter("ignore", ConvergenceWarning)  # images that are all alike: the random half is for them
            leaves = model.fit_predict(self.features[ids]) == 1
        if min(leaves.sum(), (~leaves).sum()) < self._least:
            leaves = np.random.default_rng(seed).permutation(len(ids)) < len(ids) // 2
        return leaves

    # --- sums, counts and centroids -------------------------------------------------------------------------------------

    def _nearest(self, ids: np.ndarray, allowed_k: np.ndarray) -> np.ndarray:
        """int32 labels: the largest inner product with a centroid of the ``allowed_k`` clusters, as in the published code.

        Centroids are means of unit vectors, so a diffuse cluster, whose mean is short, wins fewer images than by cosine.
        """
        clusters = np.flatnonzero(allowed_k)
        centroids = self.centroids[clusters]
        best = [(self.features[part] @ centroids.T).argmax(1) for part in _parts(ids)]
        return clusters[np.concatenate([*best, np.empty(0, np.int64)])].astype(np.int32)

    def _take_out(self, ids: np.ndarray) -> None:
        """Out of the sums, while their labels and features are still those that went in."""
        self.moved.append((ids, self.labels[ids]))
        self._add(ids, -1)

    def _put_in(self, ids: np.ndarray, labels: np.ndarray) -> None:
        self.labels[ids] = labels
        self._add(ids, 1)

    def _add(self, ids: np.ndarray, sign: int) -> None:
        """Features and numbers of some images to their clusters' sums and counts."""
        for part in _parts(ids):
            labels = self.labels[part]
            order = np.argsort(labels, kind="stable")
            clusters, first, sizes = np.unique(labels[order], return_index=True, return_counts=True)
            self.sums[clusters] += sign * np.add.reduceat(self.features[part[order]], first, axis=0, dtype=np.float64)
            self.counts[clusters] += sign * sizes

    def _centre(self, clusters: np.ndarray) -> None:
        """Centroids of clusters that are not empty: means of their members, not made unit vectors again."""
        self.centroids[clusters] = self.sums[clusters] / self.counts[clusters, None]


def _parts(ids: np.ndarray) -> Iterator[np.ndarray]:
    return (ids[start : start + ROWS] for start in range(0, len(ids), ROWS))


def _check(features_Nd: np.ndarray, labels_N: np.ndarray, num_clusters: int) -> np.ndarray:
    """The ids of readable images; ValueError if there are none, or if the arrays do not belong together."""
    if len(features_Nd) != len(labels_N):
        raise ValueError(f"{len(features_Nd)} features and {len(labels_N)} labels; the shards changed under the run")
    if labels_N.max(initial=-1) >= num_clusters:
        raise ValueError(
            f"label {labels_N.max()} is above the {num_clusters} clusters; leave clustering.num_clusters as it was"
        )
    readable = np.flatnonzero(np.asarray(labels_N) >= 0)
    if not len(readable):
        raise ValueError("no image could be read; make the shards again with jobs/make_shards.py")
    return readable
