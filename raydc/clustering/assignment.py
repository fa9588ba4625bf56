"""The outcome of a clustering: a pseudo-label for each image_id."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raydc.clustering.whitening import Whitening

UNREADABLE = -1  # the pseudo-label of an image whose features could not be had; it is never drawn


@dataclass(frozen=True, eq=False)
class Assignment:
    """Arrays are indexed by image_id (N,) or by cluster (k, ...).

    Attributes:
        epoch: the epoch that trains on it.
        pseudo_labels: int32 (N,), -1 where the image was unreadable.
        distances: float32 (N,), squared L2 to the own centroid.
        centroids: float32 (k, d), in the space that was clustered.
        objective: sum of ``distances``.
        weights_hash: hash of the weights whose features these are.
        whitening: from features to the space that was clustered.
        num_repaired: empty clusters that got images again, over all iterations.
    """

    epoch: int
    pseudo_labels: np.ndarray
    distances: np.ndarray
    centroids: np.ndarray
    objective: float
    weights_hash: str
    whitening: Whitening | None = None
    num_repaired: int = 0

    @property
    def num_clusters(self) -> int:
        return len(self.centroids)

    @property
    def sizes(self) -> np.ndarray:
        """int64 (k,): images in each cluster."""
        return np.bincount(self.pseudo_labels[self.pseudo_labels >= 0], minlength=self.num_clusters)

    @property
    def num_empty_clusters(self) -> int:
        return int((self.sizes == 0).sum())
