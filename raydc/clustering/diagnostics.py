"""Is this clustering healthy? Counts, agreement with other partitions, and a verdict with its remedy."""

from __future__ import annotations

import numpy as np

from raydc.clustering.assignment import Assignment


def nmi(a: np.ndarray, b: np.ndarray) -> float | None:
    """Normalised mutual information, geometric mean (paper section 4.1); rows where either is negative are left out."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} labels cannot be compared with {len(b)}")
    if min(a.min(initial=0), b.min(initial=0)) < 0:
        known = (a >= 0) & (b >= 0)
        a, b = a[known], b[known]
    if not len(a):
        return None
    sizes_a, sizes_b = np.bincount(a), np.bincount(b)
    parts = (sizes_a > 0).sum(), (sizes_b > 0).sum()
    if min(parts) == 1:
        return float(max(parts) == 1)
    # Pairs of labels as one number, counted by a sort; scikit-learn's table takes ten times as long at 10,000 clusters.
    pairs = np.multiply(
        a, len(sizes_b), dtype=np.uint32 if len(sizes_a) * len(sizes_b) < 2**32 else np.uint64, casting="unsafe"
    )
    np.add(pairs, b, out=pairs, casting="unsafe")
    pairs.sort()
    ends = np.flatnonzero(pairs[1:] != pairs[:-1])
    joint = np.diff(ends, prepend=-1, append=len(pairs) - 1)
    in_a, in_b, in_both = map(_entropy, (sizes_a, sizes_b, joint))
    return float(np.clip((in_a + in_b - in_both) / np.sqrt(in_a * in_b), 0, 1))


def _entropy(sizes: np.ndarray) -> float:
    """Of a partition into parts of these sizes; parts of one size are reckoned together, for most of them are small."""
    times = np.bincount(sizes)
    size = np.flatnonzero(times[1:]) + 1
    total = times[size] @ size
    return float(np.log(total) - times[size] @ (size * np.log(size)) / total)


def health(assignment: Assignment) -> dict:
    """Counts of the clusters: empty ones, singletons, the largest one's share, and the effective number (exp entropy)."""
    sizes = assignment.sizes
    share = sizes[sizes > 0] / max(sizes.sum(), 1)
    return {
        "num_clusters": assignment.num_clusters,
        "num_empty_clusters": assignment.num_empty_clusters,
        "num_repaired": assignment.num_repaired,
        "num_singletons": int((sizes == 1).sum()),
        "largest_cluster": float(share.max()),
        "effective_clusters": float(np.exp(_entropy(sizes))),
        "objective": assignment.objective,
    }


def verdict(counts: dict, num_images: int, method: str = "kmeans") -> str | None:
    """One sentence and its remedy where the clustering looks ill, else None."""
    k = counts["num_clusters"]
    if k >= 10 and counts["largest_cluster"] > 0.5:
        if method == "pic":
            return (
                f"one cluster holds {counts['largest_cluster']:.0%} of the images; lower clustering.sigma or "
                "clustering.neighbours, or take another clustering.method"
            )
        return (
            f"one cluster holds {counts['largest_cluster']:.0%} of the images: the features have collapsed; "
            "lower train.lr or add augmentation"
        )
    if counts["num_empty_clusters"] > 0.2 * k:
        return f"{counts['num_empty_clusters']} of {k} clusters are empty; lower clustering.num_clusters"
    if num_images < 5 * k:
        return f"{num_images} images make {k} clusters of fewer than 5; lower clustering.num_clusters"
    return None
