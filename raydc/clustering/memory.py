"""What is remembered of every image between two clusterings: the feature it had when it was last trained on."""

from __future__ import annotations

import numpy as np


class FeatureMemory:
    """Features of N images in V views: float32 (V, N, d); ``when`` int64 (V, N) is the step of each one, -1 where none is.

    Steps count through the whole run, so what comes late never overwrites what is newer, whoever sends it.
    """

    def __init__(self, num_images: int, num_views: int) -> None:
        self.when = np.full((num_views, num_images), -1, np.int64)
        self.features: np.ndarray | None = None

    def write(self, view: int, image_ids: np.ndarray, steps: np.ndarray, features_Bd: np.ndarray) -> None:
        """``steps`` (B,) do not fall within a call, so of an image that comes twice the last one stays."""
        if self.features is None:
            self.features = np.zeros((*self.when.shape, features_Bd.shape[1]), np.float32)
        newer = steps >= self.when[view, image_ids]
        self.features[view, image_ids[newer]] = features_Bd[newer]
        self.when[view, image_ids[newer]] = steps[newer]

    def missing(self) -> np.ndarray:
        """bool (N,): images of which a view is not there."""
        return (self.when < 0).any(0)

    def num_older(self, step: int) -> int:
        """Images whose feature is of before ``step``."""
        return int(((self.when >= 0) & (self.when < step)).any(0).sum())

    def state(self) -> dict[str, np.ndarray]:
        return {"when": self.when} | ({} if self.features is None else {"features": self.features})

    @classmethod
    def load(cls, state: dict[str, np.ndarray]) -> FeatureMemory:
        views, images = state["when"].shape
        memory = cls(images, views)
        memory.when = state["when"].copy()
        memory.features = state["features"].copy() if "features" in state else None
        return memory
