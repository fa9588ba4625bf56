"""How well a feature matrix serves: 20-NN, a linear probe, and k-means against the classes. Plain functions, no Ray.

N training rows, M validation rows, D dimensions.
"""

from __future__ import annotations

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from raydc.clustering.diagnostics import nmi
from raydc.clustering.kmeans import kmeans
from raydc.clustering.whitening import fit_whitening, l2, moments
from raydc.config import ProbeConfig
from raydc.seeding import derive, uniforms

WIDE = 2048  # dimensions above which features (raw pixels, that is) are first reduced by a PCA, to REDUCED
REDUCED = 256


def knn_top1(train_ND, train_labels, val_MD, val_labels, neighbours: int = 20) -> float:
    """Majority of the nearest neighbours by centred cosine, as a fraction."""
    mean = train_ND.mean(0)
    model = KNeighborsClassifier(min(neighbours, len(train_ND)), algorithm="brute")  # on unit rows L2 ranks like cosine
    return float(model.fit(l2(train_ND - mean), train_labels).score(l2(val_MD - mean), val_labels))


def linear_top1(train_ND, train_labels, val_MD, val_labels) -> float:
    """Multinomial logistic regression on standardised features, as a fraction."""
    if len(np.unique(train_labels)) < 2:
        return float((val_labels == train_labels[0]).mean())
    scale = StandardScaler().fit(train_ND)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 200 iterations are the protocol, not a tolerance
        model = LogisticRegression(max_iter=200, C=0.1).fit(scale.transform(train_ND), train_labels)
    return float(model.score(scale.transform(val_MD), val_labels))


def nmi_of_kmeans(features_ND, labels, k: int, *, seed: int, whiten_dim: int = 0) -> float | None:
    """NMI between ``labels`` and k-means with ``k`` clusters on centred, L2-normalised features.

    ``whiten_dim`` prepares the features as the run's own clustering does (PCA, whitening, L2) instead.
    """
    if whiten_dim:
        features_ND = fit_whitening(moments(features_ND), whiten_dim)(features_ND)
    else:
        features_ND = l2(features_ND - features_ND.mean(0))
    result = kmeans(features_ND, min(k, len(features_ND)), seed=derive(seed, "nmi", k))
    return nmi(result.labels_N, labels)


def evaluate(
    train_ids,
    train_ND,
    train_labels,
    val_ids,
    val_MD,
    val_labels,
    config: ProbeConfig,
    *,
    seed: int,
    k: int,
    whiten_dim: int,
) -> dict[str, float | None]:
    """The four figures of a feature matrix, as fractions; None where labels are missing.

    ``k`` is the run's number of clusters, ``whiten_dim`` its PCA (0 for raw pixels: whitening would flatter them).
    """
    known = train_labels >= 0
    if not known.any():
        return dict.fromkeys(("nmi_labels", "nmi_classes", "knn_top1", "linear_top1"))
    train_ids, train_ND, train_labels = train_ids[known], train_ND[known], train_labels[known]
    if train_ND.shape[1] > WIDE:
        reduce = fit_whitening(moments(train_ND), REDUCED, whiten=False).project
        train_ND, val_MD = reduce(train_ND), reduce(val_MD) if len(val_MD) else val_MD
    num_classes = len(np.unique(train_labels))
    figures = {
        "nmi_labels": nmi_of_kmeans(train_ND, train_labels, k, seed=seed, whiten_dim=whiten_dim),
        "nmi_classes": nmi_of_kmeans(train_ND, train_labels, num_classes, seed=seed),
        "knn_top1": None,
        "linear_top1": None,
    }
    held = val_labels >= 0
    if held.any():
        val_MD, val_labels = val_MD[held], val_labels[held]
        few = pick_per_class(train_ids, train_labels, config.images_per_class, seed)
        figures["knn_top1"] = knn_top1(train_ND, train_labels, val_MD, val_labels, config.num_neighbours)
        figures["linear_top1"] = linear_top1(train_ND[few], train_labels[few], val_MD, val_labels)
    return figures


def pick_per_class(image_ids: np.ndarray, labels: np.ndarray, per_class: int | np.ndarray, seed: int) -> np.ndarray:
    """Positions of ``per_class`` rows of each class, chosen by image_id alone (0: all rows that have a label).

    An array gives each label a number of its own.
    """
    known = np.flatnonzero(labels >= 0)
    if np.isscalar(per_class) and per_class == 0:
        return known
    order = known[np.argsort(uniforms(derive(seed, "labels"), image_ids[known])[:, 0], kind="stable")]
    by_class = order[np.argsort(labels[order], kind="stable")]
    _, start, sizes = np.unique(labels[by_class], return_index=True, return_counts=True)
    rank = np.arange(len(by_class)) - np.repeat(start, sizes)
    return np.sort(by_class[rank < (per_class if np.isscalar(per_class) else per_class[labels[by_class]])])
