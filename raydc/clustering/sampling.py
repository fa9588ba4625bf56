"""Which images an epoch trains on, and how often: uniform over non-empty clusters (paper section 3, "trivial
parametrization"), so that a giant cluster does not become the only lesson."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raydc.seeding import derive, uniforms


@dataclass(frozen=True, eq=False)
class SamplingPlan:
    """counts: int32 (N,), draws of each image_id in this epoch. Its sum is a multiple of the global batch."""

    counts: np.ndarray
    seed: int

    @property
    def num_draws(self) -> int:
        return int(self.counts.sum(dtype=np.int64))

    def draws(self) -> tuple[np.ndarray, np.ndarray]:
        """(image_ids, draw numbers), int32 (sets that are cached have fewer than 2^31 draws), in the epoch's order.

        The draws of an image are spread evenly: its c draws take one slot in each c-th of the epoch, so a cluster of
        one cannot fill a batch with its only image.
        """
        counts = self.counts
        image_ids = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        draws = _numbered(counts)
        slots = uniforms(derive(self.seed, "slot"), image_ids, draws)[:, 0]
        slots += draws
        slots /= np.repeat(counts, counts)
        order = _order(slots)
        return image_ids[order], draws[order]


def plan_length(num_images: int, multiple: float, batch_size: int) -> int:
    """Draws of an epoch: ``multiple`` times the images, rounded to whole global batches (at least one)."""
    return max(1, round(multiple * num_images / batch_size)) * batch_size


def uniform_plan(pseudo_labels: np.ndarray, num_clusters: int, length: int, seed: int) -> SamplingPlan:
    """Draws per non-empty cluster within one of each other, and within a cluster draws per image within one of each other.

    (The original means this and does not do it: protocol 1a, index mismatch.) Images labelled -1 are never drawn.
    """
    ids = np.flatnonzero(pseudo_labels >= 0)
    labels = pseudo_labels[ids]
    sizes = np.bincount(labels, minlength=num_clusters)
    quotas = _share(length, np.flatnonzero(sizes), num_clusters, derive(seed, "clusters"))
    each, more = np.divmod(quotas, np.maximum(sizes, 1))
    drawn = np.repeat(each.astype(np.int32), sizes)  # cluster by cluster
    drawn[np.repeat(np.cumsum(sizes) - sizes, more) + _numbered(more)] += 1
    order = _shuffled_by_cluster(labels, num_clusters, uniforms(derive(seed, "images"), ids)[:, 0])
    counts = np.zeros(len(pseudo_labels), np.int32)
    counts[ids[order]] = drawn
    return SamplingPlan(counts, seed)


def plain_plan(pseudo_labels: np.ndarray, length: int, seed: int) -> SamplingPlan:
    """Every readable image equally often, within one."""
    return uniform_plan(np.where(pseudo_labels >= 0, 0, -1), 1, length, seed)


def cluster_weights(sizes_k: np.ndarray, power: float) -> np.ndarray:
    """float32 (k,): the loss weight of each cluster's images, sizes^-power, 0 for empty ones (protocol 1b.5).

    Scaled so that the mean over all images is 1. The reference scales the weights to sum 1 inside a weighted mean, which
    divides by the weights of the batch at hand. Ours is the same in expectation and needs no division, so gradients keep
    their size (protocol 1b.6c), and micro-batches and ranks add up.
    """
    sizes = np.asarray(sizes_k, np.float64)
    weights = np.where(sizes > 0, np.maximum(sizes, 1) ** -power, 0)
    total = sizes @ weights
    return (weights * (sizes.sum() / total if total else 1)).astype(np.float32)


def _share(total: int, clusters: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    """``total`` split over ``clusters``; who gets one more is drawn anew each epoch."""
    quotas = np.zeros(num_clusters, np.int64)
    quotas[clusters] = total // len(clusters)
    lucky = np.argsort(uniforms(seed, clusters)[:, 0], kind="stable")[: total % len(clusters)]
    quotas[clusters[lucky]] += 1
    return quotas


def _shuffled_by_cluster(labels: np.ndarray, num_clusters: int, key: np.ndarray) -> np.ndarray:
    """Rows of cluster 0 first, and so on, those of a cluster in the order of 16 bits of ``key`` in [0, 1)."""
    order = np.argsort((key * 2.0**16).astype(np.uint16), kind="stable")  # a radix sort, as it is for 16 bits alone
    narrow = labels.astype(np.uint16) if num_clusters <= 1 << 16 else labels
    return order[np.argsort(narrow[order], kind="stable")]


def _numbered(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... counts[0] - 1, 0, 1, ... counts[1] - 1, and so on."""
    numbers = np.arange(counts.sum(), dtype=counts.dtype)
    numbers -= np.repeat(np.cumsum(counts, dtype=counts.dtype) - counts, counts)
    return numbers


def _order(key: np.ndarray) -> np.ndarray:
    """A stable order of numbers in [0, 1) by their first 32 bits: two radix sorts of 16 bits, five times as fast as a
    comparing sort of all bits."""
    bits = (key * 2.0**32).astype(np.uint32)
    order = np.argsort(bits.astype(np.uint16), kind="stable")
    return order[np.argsort((bits >> np.uint32(16)).astype(np.uint16)[order], kind="stable")]
