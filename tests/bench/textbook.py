"""A plain DeepCluster of our own, as one would write it from the paper (section 3, protocol 1a): lists of Python numbers.

The rival of bookkeeping.py. It is written for clarity, as most code of its time was, and does nothing slow on purpose.
"""

from __future__ import annotations

import numpy as np
from sklearn.metrics import normalized_mutual_info_score


def cluster_lists(labels: list[int], k: int) -> list[list[int]]:
    """The images of each cluster."""
    lists: list[list[int]] = [[] for _ in range(k)]
    for image, label in enumerate(labels):
        lists[label].append(image)
    return lists


def pseudo_labelled(lists: list[list[int]], paths: list[str]) -> list[tuple[str, int]]:
    """(path, pseudo-label) of every image, labels without gaps: the data set of the next epoch."""
    filled = [images for images in lists if images]
    return [(paths[image], label) for label, images in enumerate(filled) for image in images]


def labels_of(lists: list[list[int]]) -> np.ndarray:
    """The label of each image, from what is kept of an epoch."""
    labels = [0] * sum(len(images) for images in lists)
    for label, images in enumerate(lists):
        for image in images:
            labels[image] = label
    return np.array(labels)


def uniform_indices(lists: list[list[int]], length: int, random: np.random.RandomState) -> list[int]:
    """An epoch's draws, equally many of each cluster that has images, in random order."""
    filled = [images for images in lists if images]
    each = length // len(filled) + 1
    draws = [random.choice(images, each, replace=len(images) < each) for images in filled]
    indices = np.concatenate(draws)
    random.shuffle(indices)
    return indices[:length].tolist()


def bookkeeping(labels_N: np.ndarray, previous: list[list[int]], paths: list[str], k: int, length: int, seed: int) -> dict:
    """Everything between two clusterings that has to do with labels, and nothing else; ``previous``: the last lists."""
    lists = cluster_lists(labels_N.tolist(), k)
    dataset = pseudo_labelled(lists, paths)
    indices = uniform_indices(lists, length, np.random.RandomState(seed))
    nmi = normalized_mutual_info_score(labels_of(previous), labels_of(lists))
    return {"sizes": [len(images) for images in lists], "dataset": dataset, "indices": indices, "nmi": nmi}
