"""Exact nearest neighbours by cosine, on faiss."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from raydc.clustering.whitening import l2

ROWS = 4096  # queries at once: their similarities are found block by block


def nearest(train_ND: np.ndarray, query_MD: np.ndarray, k: int) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """For each block of queries: where they are, cosine similarities and positions of the ``k`` nearest rows of train.

    Both are (rows, k), best first. faiss holds the one copy of train that is made.
    """
    import faiss  # lazily: only the process that searches loads it

    index = faiss.IndexFlatIP(train_ND.shape[1])
    for block in _blocks(len(train_ND)):
        index.add(np.ascontiguousarray(l2(train_ND[block]), np.float32))
    for block in _blocks(len(query_MD)):
        similar, rows = index.search(np.ascontiguousarray(l2(query_MD[block]), np.float32), k)
        yield block, similar, rows


def _blocks(num: int) -> Iterator[slice]:
    return (slice(start, min(num, start + ROWS)) for start in range(0, num, ROWS))
