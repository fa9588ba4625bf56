"""The bank over several actors: each holds the features of a range of image_ids, the first one drives Lloyd's iterations.

What travels in an iteration, for each further shard: k centroids to it (float32), k sums (float32) and counts (int32) back,
8 bytes for each of the k x d numbers and 4 for each cluster. Labels and distances stay beside their features until the last
assignment is done. Random draws are those that faiss would make, so the outcome is one bank's but for the rounding of sums:
where that decides (the halves of a split, images as near to two centroids) labels may differ.

N images, n of them in a shard, d dimensions, k clusters. Like the bank itself this runs without Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from scipy.sparse import csr_array

from raydc.clustering.assignment import UNREADABLE, Assignment
from raydc.clustering.bank import CoverageError, FeatureBank, check_complete
from raydc.clustering.kmeans import checked, faiss_threads, flat_index, squared_distances
from raydc.clustering.whitening import Whitening
from raydc.config import ClusteringConfig, ProbeConfig
from raydc.seeding import derive

BLOCK = 16384  # rows that are searched and summed at once


def bounds(num_images: int, num_shards: int) -> np.ndarray:
    """Shard s holds the image_ids from ``bounds[s]`` to ``bounds[s + 1]``: a rank's slice of the images meets few shards,
    and labels are put together by concatenation."""
    return np.linspace(0, num_images, num_shards + 1).astype(np.int64)


class ShardedBank:
    """A bank as workers and the driver see it, over ``shards`` (Remotes of Shard), each of its range of image_ids."""

    def __init__(self, shards: list, num_images: int, config: ClusteringConfig) -> None:
        self.shards, self.num_images, self.config = shards, num_images, config
        self.bounds = bounds(num_images, len(shards))

    def open(self) -> str:
        """Begin a pass in every shard; one token that names the pass of each."""
        return ".".join(self._all("open"))

    def cpu_s(self) -> float:
        return sum(self._all("cpu_s"))

    def send(self, method: str, token: str, *args) -> None:
        """Without waiting: rows go where their image_ids belong, everything else to the first shard."""
        tokens = token.split(".")
        if method not in ("push", "skip"):
            self.shards[0].send(method, tokens[0], *args)
            return
        for shard, where, ids in self._parts(args[0]):
            self.shards[shard].send(method, tokens[shard], ids, *(rows[where] for rows in args[1:]))

    def flush(self) -> None:
        for shard in self.shards:
            shard.flush()

    def _parts(self, image_ids: np.ndarray) -> Iterator[tuple[int, slice | np.ndarray, np.ndarray]]:
        """(shard, its rows, their ids within the shard)."""
        ids = np.asarray(image_ids)
        if not len(ids):
            return
        if not 0 <= ids.min() <= ids.max() < self.num_images:
            raise CoverageError(f"an image_id is outside 0..{self.num_images - 1}; the shards changed under the run")
        owners = np.searchsorted(self.bounds, ids, side="right") - 1
        for shard in np.unique(owners):
            where = owners == shard
            rows = slice(None) if where.all() else where  # a slice copies nothing
            yield int(shard), rows, ids[rows] - self.bounds[shard]

    def whitening(self, token: str) -> Whitening:
        """Of the first shard, which has the sums of all ranks; every image must be in them, wherever its features go."""
        first, *tokens = token.split(".")
        waiting = [shard.start("num_readable", one) for shard, one in zip(self.shards[1:], tokens, strict=True)]
        return self.shards[0].whitening(first, sum(wait() for wait in waiting))

    def run_probe(self, token: str, names: tuple[str, str], config: ProbeConfig, labels: tuple, **options) -> dict:
        return self.shards[0].run_probe(token.split(".")[0], names, config, labels, **options)

    def cluster(
        self, token: str, epoch: int, seed: int, weights_hash: str, previous_labels: np.ndarray | None = None
    ) -> Assignment:
        """As FeatureBank.cluster. The labels come straight from the shards; the one that drives never sees them."""
        tokens = token.split(".")
        warm = self.config.start == "warm" and previous_labels is not None
        sizes = self._begin(tokens, previous_labels if warm else None)
        seed = derive(seed, "kmeans", epoch)
        centroids, num_repaired, whitening = self.shards[0].lead(tokens, self.shards[1:], sizes, warm, seed)
        labels, distances = np.empty(self.num_images, np.int32), np.empty(self.num_images, np.float32)
        for rows, one, shard in zip(self._ranges(), tokens, self.shards, strict=True):
            labels[rows], distances[rows] = shard.result(one)
        objective = float(distances.sum(dtype=np.float64))
        return Assignment(epoch, labels, distances, centroids, objective, weights_hash, whitening, num_repaired)

    def _begin(self, tokens: list[str], labels_N: np.ndarray | None) -> list[int]:
        """Images to cluster in each shard; CoverageError if one is missing anywhere, ValueError if they are fewer than k."""
        starts = [None if labels_N is None else labels_N[rows] for rows in self._ranges()]
        missing, first, sizes = zip(*self._all("begin", list(zip(tokens, starts, strict=True))), strict=True)
        named = [int(low) + local_id for low, ids in zip(self.bounds[:-1], first, strict=True) for local_id in ids]
        check_complete(self.num_images, sum(missing), named[:3], sum(sizes))
        if self.config.num_clusters > sum(sizes):
            raise ValueError(
                f"num_clusters {self.config.num_clusters} is above the number of images {sum(sizes)}; "
                "lower clustering.num_clusters"
            )
        return list(sizes)

    def _ranges(self) -> list[slice]:
        return [slice(low, high) for low, high in zip(self.bounds[:-1], self.bounds[1:], strict=True)]

    def _all(self, method: str, arguments: list[tuple] | None = None) -> list:
        """The answer of each shard, while all of them work."""
        arguments = arguments or [()] * len(self.shards)
        waiting = [shard.start(method, *some) for shard, some in zip(self.shards, arguments, strict=True)]
        return [wait() for wait in waiting]


class Shard(FeatureBank):
    """The features of a range of image_ids, numbered from 0. ``sharing``: how many of its like share a machine's threads."""

    def __init__(self, num_images: int, config: ClusteringConfig, *, sharing: int = 1, **options) -> None:
        super().__init__(num_images, config, **options)
        self.threads = max(1, self.threads // sharing)

    def begin(self, token: str, previous_labels: np.ndarray | None = None) -> tuple[int, list[int], int]:
        """Ready for a clustering: (images missing, the first of them, images to cluster); ValueError if not finite."""
        self._check(token)
        self.labels, self.distances, self.kinds, self.index = previous_labels, None, None, None
        coverage = self._coverage()
        for _, features in self._blocks():
            checked(features)
        return coverage

    def _blocks(self) -> Iterator[tuple[slice | np.ndarray, np.ndarray]]:
        """(ids, features (n, d)) of the images to cluster; a block that lacks none is no copy."""
        for start in range(0, self.num_images if self.features is not None else 0, BLOCK):
            rows = slice(start, min(self.num_images, start + BLOCK))
            here = self.covered[rows]
            ids = rows if here.all() else start + np.flatnonzero(here)
            if here.any():
                yield ids, self.features[ids]

    def dim(self, token: str) -> int:
        """0 where no image could be read."""
        self._check(token)
        return 0 if self.features is None else self.features.shape[1]

    def points(self, token: str, dim: int, positions: np.ndarray) -> np.ndarray:
        """Features of some of the images to cluster, by their place among them."""
        self._check(token)
        if not len(positions):
            return np.zeros((0, dim), np.float32)
        return self.features[positions if self.covered.all() else np.flatnonzero(self.covered)[positions]]

    def sums(self, token: str, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """(float64 (k, d) sums, (k,) images) of the clusters of the labels before; images of none are left out."""
        self._check(token)
        sums, counts = np.zeros((shape[0] + 1, shape[1])), np.zeros(shape[0] + 1, np.int64)
        for ids, features in self._blocks():
            _add(sums, counts, features, self.labels[ids] + 1)
        return sums[1:], counts[1:]

    def assign(self, token: str, centroids_kd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(float32 (k, d) sums of the differences from the nearest centroid, int32 (k,) images).

        A difference is small where a sum is not: in float32 it tells the new centroid as well as a float64 sum would.
        """
        sums, counts = np.zeros(centroids_kd.shape), np.zeros(len(centroids_kd), np.int64)
        for _, features, labels, _ in self._nearest(token, centroids_kd):
            _add(sums, counts, features, labels)
        return (sums - counts[:, None] * centroids_kd.astype(np.float64)).astype(np.float32), counts.astype(np.int32)

    def settle(self, token: str, centroids_kd: np.ndarray) -> np.ndarray:
        """The last assignment, which is kept here; (k,) images."""
        self.labels = np.full(self.num_images, UNREADABLE, np.int32)
        self.distances = np.zeros(self.num_images, np.float32)
        for ids, features, labels, found in self._nearest(token, centroids_kd):
            spherical = self.config.method == "spherical"
            self.labels[ids] = labels
            # ||x||^2 - 2xc + ||c||^2 can round below zero
            self.distances[ids] = squared_distances(features, labels, centroids_kd) if spherical else np.maximum(found, 0)
        return self._sizes(len(centroids_kd))

    def _nearest(self, token: str, centroids_kd: np.ndarray) -> Iterator[tuple]:
        """(ids, features, labels, what the index found) of each block."""
        import faiss

        self._check(token)
        if self.index is None:  # kept while a clustering lasts: a GPU's buffers take time to be had
            self.index = flat_index(faiss, centroids_kd.shape[1], self.gpu, self.config.method == "spherical")
        self.index.reset()
        self.index.add(np.ascontiguousarray(centroids_kd))
        for ids, features in self._blocks():
            with faiss_threads(self.threads):
                found, labels = (column[:, 0] for column in self.index.search(features, 1))
            yield ids, features, labels, found

    def _sizes(self, k: int) -> np.ndarray:
        return np.bincount(self.labels[self.labels >= 0], minlength=k)

    def result(self, token: str) -> tuple[np.ndarray, np.ndarray]:
        """(int32 labels (n,), float32 distances (n,)); kept, for Ray may repeat a call."""
        self._check(token)
        return self.labels, self.distances

    def lead(
        self, tokens: list[str], others: list, sizes: list[int], warm: bool, seed: int
    ) -> tuple[np.ndarray, int, Whitening | None]:
        """Lloyd's iterations over this shard and ``others``: (centroids, how many were repaired, the pass's whitening)."""

        def ask(method: str, *args, own: list | None = None) -> list:
            """Every shard's answer; the others work while this one does. ``own``: one more argument for each."""
            calls = [(token, *args) for token in tokens]
            if own is not None:
                calls = [(*call, more) for call, more in zip(calls, own, strict=True)]
            waiting = [other.start(method, *call) for other, call in zip(others, calls[1:], strict=True)]
            return [getattr(self, method)(*calls[0]), *(wait() for wait in waiting)]

        k, spherical = self.config.num_clusters, self.config.method == "spherical"
        start = warm_start(ask, k, sizes, seed) if warm else points(ask, first_draws(sum(sizes), k, seed), sizes)
        return *lloyd(ask, start, sum(sizes), self.config.iterations, spherical), self.whitening_

    # --- clusters that are empty at the end: images that are alike are of one kind, and move together ---

    def nearest_kinds(self, token: str, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(distance, key) of the kind that lies nearest to the centroid of each cluster; infinite where there is none."""
        self._check(token)
        self.kinds = self._find_kinds()
        first, keys = self.kinds
        distances, nearest = np.full(k, np.inf, np.float32), np.zeros(k, np.uint64)
        order = np.argsort(-self.distances[first], kind="stable")
        distances[self.labels[first[order]]] = self.distances[first[order]]  # of several writes the last, nearest one stays
        nearest[self.labels[first[order]]] = keys[first[order]]
        return distances, nearest

    def _find_kinds(self) -> tuple[np.ndarray, np.ndarray]:
        """(id of the first image of each kind, uint64 key of each image (n,)); equal features have equal keys."""
        keys, ids = np.zeros(self.num_images, np.uint64), np.flatnonzero(self.covered)
        for rows, features in self._blocks():
            keys[rows] = _keys(features)
        _, first = np.unique(keys[ids], return_index=True)
        return ids[np.sort(first)], keys

    def farthest_kinds(self, token: str, dim: int, num: int, kept: np.ndarray) -> tuple[np.ndarray, ...]:
        """(distances, keys, features) of the ``num`` kinds farthest from their centroids that are not among ``kept``."""
        self._check(token)
        first, keys = self.kinds
        first = first[~np.isin(keys[first], kept)]
        first = first[np.argsort(-self.distances[first], kind="stable")][:num]
        rows = self.features[first] if len(first) else np.zeros((0, dim), np.float32)
        return self.distances[first], keys[first], rows

    def move_kinds(self, token: str, moved: np.ndarray, clusters: np.ndarray) -> None:
        """The images of each key become those of a cluster, at its centroid."""
        self._check(token)
        order = np.argsort(moved)
        places = np.searchsorted(moved[order], self.kinds[1]).clip(max=len(moved) - 1)
        here = self.covered & (moved[order][places] == self.kinds[1])
        self.labels[here], self.distances[here] = clusters[order][places[here]], 0


def _add(sums_kd: np.ndarray, counts_k: np.ndarray, features_nd: np.ndarray, labels_n: np.ndarray) -> None:
    """To the float64 sums and the counts of each label."""
    num, k = len(labels_n), len(counts_k)
    members = csr_array((np.ones(num), labels_n, np.arange(num + 1)), shape=(num, k)).T
    sums_kd += members @ features_nd.astype(np.float64)
    counts_k += np.bincount(labels_n, minlength=k)


def _keys(features_nd: np.ndarray) -> np.ndarray:
    """uint64 (n,): a hash of each row, linear in its bits."""
    bits = (features_nd + np.float32(0)).view(np.uint32)  # -0 becomes 0
    bits = (bits ^ (bits >> np.uint32(16))).astype(np.uint64)
    return bits @ (np.random.default_rng(0).integers(0, 2**64, bits.shape[1], np.uint64) | np.uint64(1))


# --- what the leading shard does; ``ask(method, ...)`` has the answer of every shard ---------------------------------------


def lloyd(ask: Callable, centroids_kd: np.ndarray, num: int, iterations: int, spherical: bool) -> tuple[np.ndarray, int]:
    """(centroids, empty clusters that were given images), after ``iterations`` over ``num`` images or when nothing moves."""
    finish = _unit if spherical else np.ascontiguousarray
    centroids, num_split = finish(centroids_kd), 0
    for _ in range(iterations):
        before = centroids
        sums, counts = zip(*ask("assign", centroids), strict=True)
        counts = sum(one.astype(np.int64) for one in counts)
        moves = sum(one.astype(np.float64) for one in sums) / np.maximum(counts, 1)[:, None]
        centroids = (centroids + moves).astype(np.float32)
        num_split += split_for_empty(centroids, counts, num)
        centroids = finish(centroids)
        if np.array_equal(centroids, before):
            break
    return centroids, num_split + fill_empty(ask, centroids, sum(ask("settle", centroids)))


def _unit(rows_kd: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows_kd.astype(np.float64), axis=1, keepdims=True)
    return (rows_kd / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def first_draws(num: int, k: int, seed: int) -> np.ndarray:
    """The k of ``num`` points that faiss begins with: the head of its Fisher-Yates shuffle, which keeps only what moved."""
    draws = np.random.RandomState(((seed & 0x7FFFFFFF) + 1) % 2**32).randint(0, 2**32, k, np.uint32).tolist()
    moved: dict[int, int] = {}
    found = []
    for place, draw in enumerate(draws):
        other = place + draw % (num - place)
        found.append(moved.get(other, other))
        moved[other] = moved.get(place, place)
    return np.array(found)


def points(ask: Callable, positions: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Features of the images at these places among all that are clustered."""
    ends = np.cumsum(sizes)
    owners = np.searchsorted(ends, positions, side="right")
    dim = max(ask("dim"))
    rows = np.empty((len(positions), dim), np.float32)
    own = [positions[owners == shard] - (ends[shard] - sizes[shard]) for shard in range(len(sizes))]
    for shard, found in enumerate(ask("points", dim, own=own)):
        rows[owners == shard] = found
    return rows


def warm_start(ask: Callable, k: int, sizes: list[int], seed: int) -> np.ndarray:
    """Means of the clusters before; an empty one begins at an image that is drawn, each at another (as kmeans does)."""
    sums, counts = (sum(some) for some in zip(*ask("sums", (k, max(ask("dim")))), strict=True))
    empty = np.flatnonzero(counts == 0)
    start = (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
    drawn = np.random.default_rng(seed).choice(sum(sizes), len(empty), replace=False)
    start[empty] = points(ask, drawn, sizes)
    return start


def split_for_empty(centroids_kd: np.ndarray, counts_k: np.ndarray, num: int) -> int:
    """Each empty cluster takes half of one that is drawn by its size, as faiss draws, and the two move a little apart.

    In place; how many were empty.
    """
    sizes, rng, draws = counts_k.astype(np.float32), np.random.RandomState(1234), np.empty(0, np.float32)
    empty, k = np.flatnonzero(sizes == 0), len(sizes)
    apart = np.where(np.arange(centroids_kd.shape[1]) % 2 == 0, 1, -1) / np.float32(1024)
    for taker in empty:
        with np.errstate(divide="ignore", invalid="ignore"):
            chances = (sizes - 1) / np.float32(num - k)
        while True:
            if len(draws) < k:
                draws = np.append(draws, rng.randint(0, 2**32, k, np.uint32).astype(np.float32) / np.float32(2**32 - 1))
            hits = np.flatnonzero(draws[:k] < chances)
            if len(hits):
                break
            draws = draws[k:]
        giver, draws = hits[0], draws[hits[0] + 1 :]
        centroids_kd[taker], centroids_kd[giver] = centroids_kd[giver] * (1 + apart), centroids_kd[giver] * (1 - apart)
        sizes[taker] = sizes[giver] / 2
        sizes[giver] -= sizes[taker]
    return len(empty)


def fill_empty(ask: Callable, centroids_kd: np.ndarray, counts_k: np.ndarray) -> int:
    """Each empty cluster takes the images farthest from their centroid, of a cluster that keeps others; in place.

    How many were filled.
    """
    empty = np.flatnonzero(counts_k == 0)
    if not len(empty):
        return 0
    k, dim = centroids_kd.shape
    nearest, kept = np.full(k, np.inf, np.float32), np.zeros(k, np.uint64)
    for distances, keys in ask("nearest_kinds", k):
        closer = np.isfinite(distances) & (distances <= nearest)
        nearest[closer], kept[closer] = distances[closer], keys[closer]
    found = ask("farthest_kinds", dim, len(empty), np.delete(kept, empty))
    distances, keys, rows = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(-distances, kind="stable")
    _, first = np.unique(keys[order], return_index=True)
    order = order[np.sort(first)][: len(empty)]  # a kind that two shards have moves once
    filled = empty[: len(order)]
    centroids_kd[filled] = rows[order]
    if len(filled):
        ask("move_kinds", keys[order], filled)
    return len(filled)
