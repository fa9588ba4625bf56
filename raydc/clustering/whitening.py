"""PCA, whitening and L2 from sums that workers can add up (protocol 1a; faiss.PCAMatrix up to the signs of its
directions and, before the L2, a factor: faiss does not divide the covariance by N).

N images, D feature dimensions, d kept dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh

# Directions that carry less than this share of the strongest one's variance are noise (dead units); whitening would blow
# them up, so they are set to zero. float32 features resolve about 1e-7 of it.
NEGLIGIBLE = 1e-7


@dataclass(frozen=True)
class Moments:
    """Sums over rows of a feature matrix; float64, so that adding rank by rank is exact enough for a PCA."""

    count: int
    total_D: np.ndarray
    gram_DD: np.ndarray

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total_D + other.total_D, self.gram_DD + other.gram_DD)


def moments(features_ND: np.ndarray, rows: int = 16384, gram: bool = True) -> Moments:
    """Sums of the rows and of their outer products, ``rows`` at a time; without ``gram`` only its diagonal, for no PCA."""
    dim = features_ND.shape[1]
    total, outer = np.zeros(dim), np.zeros((dim, dim) if gram else dim)
    for start in range(0, len(features_ND), rows):
        block = features_ND[start : start + rows].astype(np.float64)
        total += block.sum(0)
        outer += block.T @ block if gram else (block**2).sum(0)
    return Moments(len(features_ND), total, outer)


@dataclass(frozen=True)
class Whitening:
    """x -> L2((x - mean) @ matrix), float32; ``project`` stops before the L2. Without a matrix x -> L2(x).

    ``norm``: root mean square length of what ``project`` gives, over the images of the fit; 0 where all are alike.
    """

    mean_D: np.ndarray
    matrix_Dd: np.ndarray | None
    num_negligible: int = 0
    norm: float = 1.0

    def project(self, features_ND: np.ndarray) -> np.ndarray:
        if self.matrix_Dd is None:
            return features_ND
        return (features_ND - self.mean_D) @ self.matrix_Dd

    def __call__(self, features_ND: np.ndarray) -> np.ndarray:
        return l2(self.project(features_ND))


def l2(features: np.ndarray) -> np.ndarray:
    """Rows of length one; 1e-10 keeps a zero row at zero (protocol 1a, MS0's epsilon)."""
    return features / (np.linalg.norm(features, axis=1, keepdims=True) + 1e-10)


def fit_whitening(sums: Moments, dim: int, whiten: bool = True) -> Whitening:
    """The ``dim`` strongest principal directions; with ``whiten`` each is divided by its standard deviation.

    ``dim`` 0: the features as they are, neither centred nor turned.
    """
    if dim == 0:
        return _as_they_are(sums)
    mean = sums.total_D / sums.count
    covariance = sums.gram_DD / sums.count - np.outer(mean, mean)
    last = len(covariance) - 1
    values, vectors = eigh(covariance, subset_by_index=(max(0, last + 1 - dim), last))  # a fraction of the time of all
    values, vectors = values[::-1], vectors[:, ::-1]
    # The largest entry of a direction is positive, so that the outcome does not hang on the LAPACK at hand.
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])])
    # Features that are all alike have nothing but rounding noise, which no share of the strongest direction tells apart.
    noise = 1e-13 * np.trace(sums.gram_DD) / sums.count
    useful = values > max(values[0] * NEGLIGIBLE, noise)
    scale = np.where(useful, 1 / np.sqrt(np.where(useful, values, 1)) if whiten else 1.0, 0.0)
    norm = float(np.sqrt((values * scale**2).sum()))
    return Whitening(mean.astype(np.float32), (vectors * scale).astype(np.float32), int((~useful).sum()), norm)


def _as_they_are(sums: Moments) -> Whitening:
    squares = sums.gram_DD if sums.gram_DD.ndim == 1 else np.diag(sums.gram_DD)
    norm = float(np.sqrt(squares.sum() / sums.count))
    return Whitening(np.zeros(len(sums.total_D), np.float32), None, 0, norm)
