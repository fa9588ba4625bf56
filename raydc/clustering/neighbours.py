"""Exact nearest neighbours by cosine, on faiss."""

from __future__ import annotations

import numpy as np

from raydc.clustering.whitening import l2

ROWS = 4096  # queries at once: their similarities are found block by block


def nearest(train_ND: np.ndarray, query_MD: np.ndarray, k: int, *, gpu: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Cosine similarities and positions of each query's ``k`` nearest rows of train, both (M, k), best first."""
    import faiss  # lazily: only the process that searches loads it

    index = faiss.IndexFlatIP(train_ND.shape[1])
    if gpu and faiss.get_num_gpus():
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    index.add(np.ascontiguousarray(l2(train_ND), np.float32))
    queries = np.ascontiguousarray(l2(query_MD), np.float32)
    found = [index.search(queries[start : start + ROWS], k) for start in range(0, len(queries), ROWS)]
    return np.concatenate([similar for similar, _ in found]), np.concatenate([rows for _, rows in found])
