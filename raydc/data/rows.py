"""Rows of shards that a worker reads itself: some images again, and the head of a streamed pass.

Ray Data takes seconds to start. A pass therefore begins with a few row groups that each worker reads straight from the
shards; the stream leaves them out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydc.clustering.sampling import numbered
from raydc.data import shards
from raydc.data.schema import Manifest
from raydc.seeding import random_bits
from raydc.storage import Folder

READERS = 16  # files opened at once: their reading waits for disks and networks, not for a CPU
HEAD_ROWS = 8192  # that a worker reads itself: some seconds of a GPU or of a few CPUs
HEAD_SHARE = 4  # at most one in so many of a split's row groups, and of a plan's draws


@dataclass(frozen=True, eq=False)
class RowIndex:
    """Where each image_id of a split is. A place is a row's number in all files; N images in G row groups.

    ids, places: int32 (N,), the image_id at each place and the place of each image_id. ends: int64 (G,), the place after
    a group. files, groups: int32 (G,), number of a group's file, and the group's in it.
    """

    paths: list[str]
    ids: np.ndarray
    places: np.ndarray
    ends: np.ndarray
    files: np.ndarray
    groups: np.ndarray

    def ids_of(self, group: int) -> np.ndarray:
        return self.ids[self.ends[group - 1] if group else 0 : self.ends[group]]


def index_rows(folder: Folder, manifest: Manifest, split: str) -> RowIndex:
    paths = shards.shard_paths(folder, manifest, split)

    def read(path: str) -> tuple[np.ndarray, list[int]]:
        with pq.ParquetFile(path, filesystem=folder.fs) as file:
            lengths = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            return file.read(columns=["image_id"])["image_id"].to_numpy(), lengths

    with ThreadPoolExecutor(READERS) as pool:
        ids, lengths = zip(*pool.map(read, paths), strict=True)
    ids, places = np.concatenate(ids).astype(np.int32), np.empty(manifest.splits[split].rows, np.int32)
    places[ids] = np.arange(len(ids), dtype=np.int32)
    files = np.repeat(np.arange(len(paths), dtype=np.int32), [len(some) for some in lengths])
    groups = np.concatenate([np.arange(len(some), dtype=np.int32) for some in lengths])
    return RowIndex(paths, ids, places, np.cumsum(np.concatenate(lengths)), files, groups)


def read_rows(folder: Folder, index: RowIndex, ids: np.ndarray) -> list[bytes]:
    """The encoded images of ``ids``, in their order, reading only the row groups that hold one."""
    group_of = np.searchsorted(index.ends, index.places[ids], side="right")
    wanted = np.unique(group_of)
    found: dict[int, bytes] = {}
    for group, images in zip(wanted.tolist(), read_groups(folder, index, wanted), strict=True):
        here = ids[group_of == group]
        rows = index.places[here] - (index.ends[group] - len(images))
        found.update(zip(here.tolist(), images.take(pa.array(rows)).to_pylist(), strict=True))
    return [found[image_id] for image_id in ids.tolist()]


def read_groups(folder: Folder, index: RowIndex, groups: np.ndarray) -> Iterator[pa.ChunkedArray]:
    """The encoded images of row groups, in this order, some of them ahead."""

    def read(group: int) -> pa.ChunkedArray:
        with pq.ParquetFile(index.paths[index.files[group]], filesystem=folder.fs) as file:
            return file.read_row_group(int(index.groups[group]), columns=["image"])["image"]

    with ThreadPoolExecutor(READERS) as pool:
        ahead: deque = deque()
        for group in groups.tolist():
            ahead.append(pool.submit(read, group))
            if len(ahead) >= READERS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


# --- the head of a pass -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Head:
    """What a rank reads itself: row groups, and of each of their images how many draws, its last ones."""

    groups: np.ndarray
    image_ids: np.ndarray
    draws: np.ndarray


def head_groups(index: RowIndex, world_size: int, seed: int) -> list[np.ndarray]:
    """Row groups of each rank, as many for everyone, drawn at random; none where there are few."""
    num = len(index.ends)
    rows = max(1, len(index.ids) // num)
    each = min(HEAD_ROWS // rows, num // (HEAD_SHARE * world_size))
    order = np.argsort(random_bits(seed, np.arange(num)), kind="stable")
    return [order[rank : each * world_size : world_size] for rank in range(world_size)]


def plan_heads(counts: np.ndarray, index: RowIndex, world_size: int, part: int, seed: int) -> list[Head]:
    """The head of a training pass for each rank: as many draws for everyone, whole batches of ``part`` draws.

    ``counts``: int (N,), the draws of each image that may be in it.
    """
    groups = head_groups(index, world_size, seed)
    ids = [np.concatenate([index.ids_of(one) for one in some] or [np.empty(0, np.int32)]) for some in groups]
    most = int(counts.sum(dtype=np.int64)) // (HEAD_SHARE * world_size)
    length = min(most, *(int(counts[some].sum()) for some in ids)) // part * part
    heads = []
    for some, own in zip(groups, ids, strict=True):
        before = np.cumsum(counts[own]) - counts[own]
        heads.append(Head(some, own, np.clip(length - before, 0, counts[own])))
    return heads


def head_rows(folder: Folder, index: RowIndex, head: Head, counts: np.ndarray) -> Iterator[pa.Table]:
    """The draws of a head as rows (image_id, draw, image); ``counts``: all draws of each image."""
    end = 0
    for images in read_groups(folder, index, head.groups):
        ids, taken = (column[end : end + len(images)] for column in (head.image_ids, head.draws))
        end += len(images)
        rows = np.repeat(np.arange(len(ids)), taken)
        draws = counts[ids[rows]] - taken[rows] + numbered(taken)
        yield pa.table({"image_id": ids[rows], "draw": draws, "image": images.take(pa.array(rows))})
