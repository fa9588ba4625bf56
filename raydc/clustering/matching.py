"""Which new cluster continues which previous one: the numbers of a clustering are arbitrary, a head's rows are not."""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_array, csr_array, eye_array, hstack
from scipy.sparse.csgraph import min_weight_full_bipartite_matching


def match(previous_N: np.ndarray, current_N: np.ndarray, k_previous: int, k_current: int) -> np.ndarray:
    """For each new cluster the previous one it takes over, so that as many images as can be stay in theirs.

    int64 (k_current,): each previous cluster at most once, -1 where none was left to share an image with. Images that
    either side labels -1 do not count. Exact, and equal to the Hungarian method on the full table, which at 10,000
    clusters would be 800 MB.
    """
    shared = _shared_images(previous_N, current_N, (k_current, k_previous))
    # A matching must be full here, so each new cluster gets a partner of its own that is worth nothing. One is added to
    # all, for a weight of zero is no edge; as each new cluster has one partner, this changes no preference.
    shared.data += 1
    graph = hstack([shared, eye_array(k_current)]).tocsr()
    current, partner = min_weight_full_bipartite_matching(graph, maximize=True)
    taken = np.full(k_current, -1, np.int64)
    taken[current] = np.where(partner < k_previous, partner, -1)
    return taken


def _shared_images(previous_N: np.ndarray, current_N: np.ndarray, shape: tuple[int, int]) -> csr_array:
    """How many images each pair (new cluster, previous cluster) shares; only pairs that share one are stored."""
    known = (previous_N >= 0) & (current_N >= 0)
    ones = np.ones(np.count_nonzero(known))
    return coo_array((ones, (current_N[known], previous_N[known])), shape=shape).tocsr()
