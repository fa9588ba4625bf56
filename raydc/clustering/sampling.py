"""Which images an epoch trains on, and how often: uniform over non-empty clusters (paper section 3, "trivial
parametrization"), so that a giant cluster does not become the only lesson."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from raydc.seeding import BLOCK, derive, random_bits, uniforms

MANY = 4  # draws of an image; more of them are rare


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
        # One sort of 64-bit numbers: the slot in the high bits, whose draw it is in the low ones.
        id_bits, draw_bits = _width(len(self.counts)), _width(self.counts.max(initial=1))
        slot_bits, seed = 64 - id_bits - draw_bits, derive(self.seed, "slot")
        keys, end = np.empty(self.num_draws, np.uint64), 0
        for image_ids, draws, counts in self._unfolded():
            key = random_bits(seed, image_ids, draws)
            key >>= 64 - slot_bits
            key += draws << slot_bits
            key //= counts
            key <<= id_bits
            key |= image_ids.view(np.uint64)
            key <<= draw_bits
            key |= draws
            keys[end : (end := end + len(key))] = key
        keys.sort()
        return _field(keys, draw_bits, id_bits), _field(keys, 0, draw_bits)

    def _unfolded(self) -> Iterator[tuple[np.ndarray, np.ndarray | int, np.ndarray]]:
        """(image_ids int64, draw numbers, counts; both uint64) of all draws, in parts that stay in a core's cache."""
        for start in range(0, len(self.counts), BLOCK):
            counts = self.counts[start : start + BLOCK]
            for draw in range(min(MANY, counts.max())):  # three times as fast as np.repeat, where most counts are small
                image_ids = np.flatnonzero(counts > draw)
                yield image_ids + start, draw, counts[image_ids].astype(np.uint64)
        image_ids = np.flatnonzero(self.counts > MANY)
        draws = numbered(self.counts[image_ids] - MANY) + MANY
        image_ids = np.repeat(image_ids, self.counts[image_ids] - MANY)
        yield image_ids, draws.astype(np.uint64), self.counts[image_ids].astype(np.uint64)


def plan_length(num_images: int, multiple: float, batch_size: int) -> int:
    """Draws of an epoch: ``multiple`` times the images, rounded to whole global batches (at least one)."""
    return max(1, round(multiple * num_images / batch_size)) * batch_size


def uniform_plan(pseudo_labels: np.ndarray, num_clusters: int, length: int, seed: int) -> SamplingPlan:
    """Draws per non-empty cluster within one of each other, and within a cluster draws per image within one of each other.

    (The original means this and does not do it: protocol 1a, index mismatch.) Images labelled -1 are never drawn.
    """
    known = pseudo_labels if pseudo_labels.min() >= 0 else pseudo_labels[pseudo_labels >= 0]
    sizes = np.bincount(known, minlength=num_clusters)
    quotas = _share(length, np.flatnonzero(sizes), num_clusters, derive(seed, "clusters"))
    each, more = np.divmod(quotas, np.maximum(sizes, 1))
    lucky = np.zeros(len(pseudo_labels), bool)
    lucky[_some_of_each(pseudo_labels, sizes, more, derive(seed, "images"))] = True
    counts = np.append(each, 0).astype(np.int32)[pseudo_labels]  # label -1: the 0 at the end
    counts += lucky
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


def numbered(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... counts[0] - 1, 0, 1, ... counts[1] - 1, and so on."""
    numbers = np.arange(counts.sum(), dtype=counts.dtype)
    numbers -= np.repeat(np.cumsum(counts, dtype=counts.dtype) - counts, counts)
    return numbers


def _share(total: int, clusters: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    """``total`` split over ``clusters``; who gets one more is drawn anew each epoch."""
    quotas = np.zeros(num_clusters, np.int64)
    quotas[clusters] = total // len(clusters)
    lucky = np.argsort(uniforms(seed, clusters)[:, 0], kind="stable")[: total % len(clusters)]
    quotas[clusters[lucky]] += 1
    return quotas


def _some_of_each(pseudo_labels: np.ndarray, sizes_k: np.ndarray, more_k: np.ndarray, seed: int) -> np.ndarray:
    """Of each cluster as many images as ``more_k`` says, drawn at random."""
    # One sort of 64-bit numbers: the cluster in the high bits (-1 comes last), then random ones, the image in the low ones.
    label_bits, id_bits = _width(len(sizes_k) + 1), _width(len(pseudo_labels))
    keys = np.empty(len(pseudo_labels), np.uint64)
    for start in range(0, len(keys), BLOCK):
        labels = pseudo_labels[start : start + BLOCK].astype(np.uint64)
        image_ids = np.arange(start, start + len(labels))
        key = random_bits(seed, image_ids)
        key >>= label_bits + id_bits
        key <<= id_bits
        key |= image_ids.astype(np.uint64)
        key |= labels << (64 - label_bits)
        keys[start : start + BLOCK] = key
    keys.sort()
    chosen = np.repeat(np.cumsum(sizes_k - more_k) - (sizes_k - more_k), more_k)  # how far each stands behind its place
    chosen += np.arange(len(chosen))
    return _field(keys[chosen], 0, id_bits)


def _field(keys: np.ndarray, low: int, width: int) -> np.ndarray:
    """int32: ``width`` bits of each number, above the ``low`` lowest."""
    found = np.empty(len(keys), np.int32)
    for rows in (slice(start, start + BLOCK) for start in range(0, len(keys), BLOCK)):
        found[rows] = (keys[rows] >> low) & ((1 << width) - 1)
    return found


def _width(num: int) -> int:
    """Bits that the numbers below ``num`` take."""
    return int(num - 1).bit_length()
