"""Images from Ray: the cached array as one shared object, or a stream of shards that follows the plan.

A stream reads every shard once an epoch. Rows the plan does not draw are dropped before they are decoded, and no row is
lost on the way: Train's own split drops rows, so the extraction views are split by ``LosslessDataConfig``.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import ray.train

from raydc.clustering.sampling import SamplingPlan
from raydc.config import Config, ImagesConfig, RunError
from raydc.data import cache, shards, transforms
from raydc.data.cache import EXTRACT_BATCH, CachedImages, crops_of, cut
from raydc.data.decode import UnreadableImage, decode
from raydc.data.schema import Manifest
from raydc.launch import Remote, Shared, Worker
from raydc.seeding import derive, uniforms
from raydc.storage import Folder

READERS = 16  # files opened at once: their reading waits for disks and networks, not for a CPU
BLOCK_BYTES = 16 << 20  # a smaller block reaches the first batch sooner than Ray Data's 128 MiB
# Largest share of a global batch that one image may take where its draws leave the stream together; the draws of images
# that are drawn more often travel with other rows, all over the epoch.
TOGETHER = 0.02


# --- driver side --------------------------------------------------------------------------------------------------------


@dataclass
class Streams:
    """What launch hands to the workers: an array in the object store, or datasets and who tells them the plan."""

    config: Config
    sizes: dict[str, int]
    cached: Shared | None = None
    datasets: dict = field(default_factory=dict)
    data_config: ray.train.DataConfig | None = None
    plans: Remote | None = None
    row_index: Shared | None = None
    folder: Folder | None = None

    def open(self, worker: Worker, threads: int):
        """This worker's views; CachedImages and StreamedImages have the same methods."""
        where = {"rank": worker.rank, "world_size": worker.world_size, "device": worker.device, "threads": threads}
        if self.cached is None:
            return StreamedImages(self, worker, threads)
        held = CachedImages(self.cached.get(), self.config.images, **where)
        return PartlyCached(held, StreamedImages(self, worker, threads)) if self.datasets else held


def choose_cache(config: Config, folder: Folder, manifest: Manifest, shares: dict[str, float] | None = None) -> bool:
    """Whether the decoded images are kept in memory: where they fit half of a node's object store.

    ``shares``: what is needed of which splits; all of all of them.
    """
    if config.images.cache != "auto":
        return config.images.cache == "yes"
    shares = dict.fromkeys(manifest.splits, 1.0) if shares is None else shares
    sizes = {s: cache.estimate_bytes(folder, manifest, s, config.images.cache_size) for s in shares}
    need = sum(size * shares[split] for split, size in sizes.items())
    return need <= _object_store_bytes() / 2


def _object_store_bytes() -> float:
    if not ray.is_initialized():
        return 0.3 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(n["Resources"].get("object_store_memory", 0) for n in ray.nodes() if n["Alive"])


def open_streams(
    config: Config,
    folder: Folder,
    manifest: Manifest,
    *,
    cached: bool | Literal["train"],
    local: bool,
    only: np.ndarray | None = None,
) -> Streams:
    """Both views of the shards; decoding into the array happens here, once.

    ``cached`` "train": that split in memory, val as a stream. ``only``: the ids of train that plans will draw.
    """
    splits = [split for split in ("train", "val") if split in manifest.splits and manifest.splits[split].rows]
    sizes = {split: manifest.splits[split].rows for split in splits}
    if cached:
        held = splits if cached is True else ["train"]
        streams = Streams(config, sizes, cached=_decode_all(config, folder, manifest, held, local, only))
        if cached == "train":
            streams.datasets["val"] = _cut(_read(folder, manifest, "val"), config)
            streams.data_config = LosslessDataConfig()
        return streams
    datasets = {"extract": _read(folder, manifest, "train"), "train": _read(folder, manifest, "train", shuffle=config.seed)}
    if "val" in splits:
        datasets["val"] = _read(folder, manifest, "val")
    plans = Remote(PlanBoard, local=local, num_cpus=0)
    datasets["train"] = datasets["train"].map_batches(
        draw_rows, batch_size=None, batch_format="pyarrow", fn_kwargs={"plans": plans}, zero_copy_batch=True
    )
    datasets = {name: _cut(one, config, plans if name == "train" else None) for name, one in datasets.items()}
    index = Shared(_row_index(folder, manifest), local=local)
    return Streams(config, sizes, None, datasets, LosslessDataConfig(), plans, index, folder)


def _cut(dataset, config: Config, plans: Remote | None = None):
    """The same rows, decoded and cut in data tasks where that is chosen."""
    if not decode_in_tasks(config):
        return dataset
    arguments = {"config": config.images, "plans": plans}
    return dataset.map_batches(cut_rows, batch_size=32, batch_format="pyarrow", fn_kwargs=arguments)


def decode_in_tasks(config: Config) -> bool:
    if config.images.decode != "auto":
        return config.images.decode == "tasks"
    if config.algorithm == "deepcluster_v2":  # a task cuts one crop of a draw
        return False
    return ray.is_initialized() and ray.cluster_resources().get("CPU", 0) > 4 * max(1, config.num_workers)


def _decode_all(config: Config, folder: Folder, manifest: Manifest, splits: list[str], local: bool, only) -> Shared:
    def decode_all():
        wanted = {split: only if split == "train" else None for split in splits}
        size = config.images.cache_size
        return {split: cache.decode_split(folder, manifest, split, size, ids) for split, ids in wanted.items()}

    # A task's result has a lineage: it is made again should its node be lost.
    return Shared(decode_all() if local else ray.remote(decode_all).remote(), local=local)


def _read(folder: Folder, manifest: Manifest, split: str, shuffle: int | None = None):
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = BLOCK_BYTES
    order = None
    if shuffle is not None:
        order = ray.data.FileShuffleConfig(seed=derive(shuffle, "files") % 2**31, reseed_after_execution=True)
    paths = shards.shard_paths(folder, manifest, split)
    return ray.data.read_parquet(paths, columns=["image_id", "image"], filesystem=folder.fs, shuffle=order)


class LosslessDataConfig(ray.train.DataConfig):
    """Splits the extraction views without dropping a row (a rank may get fewer, or none), the train view evenly."""

    def configure(self, datasets, world_size, worker_handles, worker_node_ids, **kwargs):
        plain = {name: dataset for name, dataset in datasets.items() if name == "train"}
        output = super().configure(plain, world_size, worker_handles, worker_node_ids, **kwargs)
        for name, dataset in datasets.items():
            if name not in plain:
                splits = dataset.streaming_split(world_size, equal=False, locality_hints=worker_node_ids)
                for iterators, split in zip(output, splits, strict=True):
                    iterators[name] = split
        return output


# --- the plan, for data tasks -------------------------------------------------------------------------------------------


class PlanBoard:
    """Which plan the data tasks follow. The driver makes it, so that it outlives a worker group."""

    def __init__(self) -> None:
        self.key, self.refs = "", []

    def publish(self, refs: list) -> None:
        # No counter: a data process may serve another run, or a board that was restarted, and must not take their plan.
        self.key, self.refs = uuid.uuid4().hex, refs

    def current(self) -> tuple[str, list]:
        return self.key, self.refs


@dataclass(frozen=True, eq=False)
class Travel:
    """A plan as data tasks read it. Draws of images drawn often travel with another row, their carrier, picked by hash:
    so they are spread over the epoch in whatever order rows come. A carrier itself need not be drawn.

    counts: int32 (N,), draws that leave with their own row. carriers (sorted), image_ids, draws: the travelling ones.
    hot_ids (sorted), hot_images: the encoded bytes of the images that travel.
    """

    counts: np.ndarray
    carriers: np.ndarray
    image_ids: np.ndarray
    draws: np.ndarray
    hot_ids: np.ndarray
    hot_images: pa.Array
    seed: int


def plan_travel(plan: SamplingPlan, batch_size: int, seed: int, hot_images) -> Travel:
    """Split a plan; ``hot_images(ids)`` gives the encoded images of the ids."""
    hot_ids = np.flatnonzero(plan.counts > max(1, int(TOGETHER * batch_size)))
    image_ids = np.repeat(hot_ids, plan.counts[hot_ids])
    first = np.cumsum(plan.counts[hot_ids]) - plan.counts[hot_ids]
    draws = np.arange(len(image_ids)) - np.repeat(first, plan.counts[hot_ids])
    carriers = (uniforms(derive(plan.seed, "carrier"), image_ids, draws)[:, 0] * len(plan.counts)).astype(np.int64)
    order = np.argsort(carriers, kind="stable")
    counts = plan.counts.copy()
    counts[hot_ids] = 0
    encoded = pa.array(hot_images(hot_ids), pa.large_binary())  # Arrow: read in place by every data process of a node
    return Travel(counts, carriers[order], image_ids[order], draws[order], hot_ids, encoded, seed)


_plan: dict = {}  # of this data process: the current plan, fetched once an epoch


def current_travel(plans: Remote) -> Travel:
    key, refs = plans.current()
    if _plan.get("key") != key:
        _plan.update(key=key, travel=refs[0].get())
    return _plan["travel"]


def draw_rows(table: pa.Table, plans: Remote) -> pa.Table:
    """Rows (image_id, image) of a block -> one row (image_id, draw, image) for each draw that leaves here."""
    travel = current_travel(plans)
    ids = table["image_id"].to_numpy()
    counts = travel.counts[ids]
    rows = np.repeat(np.arange(len(ids)), counts)
    first = np.cumsum(counts) - counts
    own = pa.table(
        {
            "image_id": ids[rows],
            "draw": np.arange(len(rows)) - np.repeat(first, counts),
            "image": table["image"].take(pa.array(rows)).combine_chunks(),
        }
    )
    start, stop = np.searchsorted(travel.carriers, ids, "left"), np.searchsorted(travel.carriers, ids, "right")
    carried = np.concatenate([np.arange(a, b) for a, b in zip(start, stop, strict=True) if b > a] or [np.empty(0, int)])
    where = np.searchsorted(travel.hot_ids, travel.image_ids[carried])
    guests = pa.table(
        {
            "image_id": travel.image_ids[carried],
            "draw": travel.draws[carried],
            "image": travel.hot_images.take(pa.array(where)),
        }
    )
    return pa.concat_tables([own, guests.cast(own.schema)])


def cut_rows(table: pa.Table, config: ImagesConfig, plans: Remote | None) -> pa.Table:
    """Decode in a data task: the crop (3 x size x size bytes) in place of the encoded image; null if unreadable."""
    ids, images = table["image_id"].to_numpy(), [_try_decode(data) for data in table["image"].to_pylist()]
    heights, widths = _sizes(images)
    if plans is None:
        boxes, flips, columns = transforms.centre_boxes(config, heights, widths), np.zeros(len(ids), bool), {}
    else:
        draws = table["draw"].to_numpy()
        drawn = transforms.draw_augmentation(config, current_travel(plans).seed, ids, draws, heights, widths)
        boxes, flips, columns = drawn.box, drawn.flip, {"draw": draws}
    crops = [
        None if image is None else cut([image], box[None], np.array([flip]), config.size, _Inline).numpy().tobytes()
        for image, box, flip in zip(images, boxes, flips, strict=True)
    ]
    return pa.table({"image_id": ids, **columns, "crop": pa.array(crops, pa.binary())})


class _Inline:
    map = staticmethod(map)


def _try_decode(data: bytes) -> np.ndarray | None:
    try:
        return decode(data)
    except UnreadableImage:
        return None


def _sizes(images: list) -> tuple[np.ndarray, np.ndarray]:
    """Heights and widths, int64; 1 for an image that is None."""
    shapes = np.array([(1, 1) if image is None else image.shape[:2] for image in images], np.int64).reshape(-1, 2)
    return shapes[:, 0], shapes[:, 1]


# --- worker side --------------------------------------------------------------------------------------------------------


class StreamedImages:
    """Both views of streamed shards for one worker; the same methods as CachedImages."""

    def __init__(self, streams: Streams, worker: Worker, threads: int) -> None:
        self.streams, self.worker, self.config = streams, worker, streams.config.images
        self.unreadable: dict[str, list[int]] = {}
        self.pool = ThreadPoolExecutor(threads)

    def extract(self, split: str, image_ids: np.ndarray | None = None) -> Iterator:
        """(image_ids, pixels (B, 3, S, S)) of whatever rows this rank is given; unreadable ones go to ``unreadable``."""
        wanted = None
        if image_ids is not None:
            wanted = np.zeros(self.streams.sizes[split], bool)
            wanted[image_ids] = True
        self.unreadable[split] = []
        shard = ray.train.get_dataset_shard("extract" if split == "train" else split)
        for table in shard.iter_batches(batch_size=EXTRACT_BATCH, batch_format="pyarrow", prefetch_batches=2):
            if wanted is not None:
                table = table.filter(pa.array(wanted[table["image_id"].to_numpy()]))
            ids, pixels = self._extract_batch(table)
            self.unreadable[split] += table["image_id"].to_numpy()[~np.isin(table["image_id"].to_numpy(), ids)].tolist()
            if len(ids):
                yield ids, pixels.to(self.worker.device)

    def _extract_batch(self, table: pa.Table):
        ids = table["image_id"].to_numpy()
        if "crop" in table.column_names:
            good = np.array(table["crop"].is_valid().to_numpy(zero_copy_only=False), bool)
            return ids[good], self._unpack(table["crop"].filter(pa.array(good)))
        images = list(self.pool.map(_try_decode, table["image"].to_pylist()))
        good = np.array([image is not None for image in images], bool)
        images = [image for image in images if image is not None]
        if not images:
            return ids[good], None
        boxes = transforms.centre_boxes(self.config, *_sizes(images))
        return ids[good], cut(images, boxes, None, self.config.size, self.pool)

    def train(self, plan: SamplingPlan, seed: int, batch_size: int, views: list[ImagesConfig] | None = None) -> Iterator:
        """This rank's share of the plan's draws, in parts of global batches: (image_ids, augmented pixels)."""
        return (self._train_batch(batch, seed, views) for batch in self.draws(plan, seed, batch_size))

    def draws(self, plan: SamplingPlan, seed: int, batch_size: int) -> Iterator[list[tuple[int, int, bytes]]]:
        """The same, before decoding: lists of (image_id, draw, encoded image or crop). The plan is published at once."""
        if self.worker.is_first:
            travel = plan_travel(plan, batch_size, seed, self._hot_images)
            self.streams.plans.publish([Shared(travel, local=False)])
        self.worker.barrier()  # a plan is in force before anybody's reading begins
        return mixed(self._rows(), batch_size // self.worker.world_size, self.config.shuffle_buffer, seed)

    def _rows(self) -> Iterator[tuple[int, int, bytes]]:
        shard = ray.train.get_dataset_shard("train")
        for table in shard.iter_batches(batch_size=256, batch_format="pyarrow", prefetch_batches=2):
            payload = table["crop" if "crop" in table.column_names else "image"]
            yield from zip(table["image_id"].to_pylist(), table["draw"].to_pylist(), payload.to_pylist(), strict=True)

    def _train_batch(self, batch: list[tuple[int, int, bytes]], seed: int, views: list[ImagesConfig] | None):
        ids, draws = (np.array(column, np.int64) for column in zip(*((i, d) for i, d, _ in batch), strict=True))
        payload = [data for _, _, data in batch]
        if None in payload:
            bad = ids[payload.index(None)]
            raise RunError(f"image_id {bad} can no longer be read; the shards changed under the run")
        if decode_in_tasks(self.streams.config):
            crops = self._unpack(pa.array(payload, pa.binary()))
            sizes = np.ones(len(ids), np.int64), np.ones(len(ids), np.int64)
            augmentation = transforms.draw_augmentation(self.config, seed, ids, draws, *sizes)
            return ids, transforms.augment(crops.to(self.worker.device), augmentation, self.config)
        images = list(self.pool.map(_try_decode, payload))
        if any(image is None for image in images):
            raise RunError(f"image_id {ids[images.index(None)]} can no longer be read; the shards changed under the run")

        def augmented(config: ImagesConfig, seed: int):
            augmentation = transforms.draw_augmentation(config, seed, ids, draws, *_sizes(images))
            crops = cut(images, augmentation.box, augmentation.flip, config.size, self.pool)
            return transforms.augment(crops.to(self.worker.device), augmentation, config)

        return ids, crops_of(self.config, views, seed, augmented)

    def _unpack(self, crops: pa.Array):
        import torch

        pixels = np.frombuffer(b"".join(crops.to_pylist()), np.uint8).copy()
        return torch.from_numpy(pixels).view(-1, 3, self.config.size, self.config.size)

    def _hot_images(self, ids: np.ndarray) -> list[bytes]:
        """Encoded images by id, from the row groups that hold them."""
        return read_rows(self.streams.folder, self.streams.row_index.get(), ids)


class PartlyCached:
    """Training images from memory, val as a stream: a small part of the labels of a set that does not fit."""

    def __init__(self, cached: CachedImages, streamed: StreamedImages) -> None:
        self.train, self.extract, self.unreadable = cached.train, streamed.extract, streamed.unreadable


def mixed(rows: Iterator, batch_size: int, buffer_size: int, seed: int) -> Iterator[list]:
    """Whole batches of rows taken at random from a bounded buffer of encoded images."""
    random = np.random.default_rng(derive(seed, "buffer"))
    buffer: list = []
    for row in rows:
        buffer.append(row)
        if len(buffer) >= buffer_size + batch_size:
            yield [_pop(buffer, random) for _ in range(batch_size)]
    while len(buffer) >= batch_size:
        yield [_pop(buffer, random) for _ in range(batch_size)]
    if buffer:
        raise RunError(f"the stream ended {len(buffer)} draws into a batch; the shards changed under the run")


def _pop(buffer: list, random: np.random.Generator):
    position = int(random.integers(len(buffer)))
    buffer[position], buffer[-1] = buffer[-1], buffer[position]
    return buffer.pop()


# --- reading some rows again --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RowIndex:
    """Where each image_id of the train split is: file number, row group, and row in it."""

    paths: list[str]
    file: np.ndarray
    group: np.ndarray
    row: np.ndarray


def _row_index(folder: Folder, manifest: Manifest) -> RowIndex:
    num, paths = manifest.splits["train"].rows, shards.shard_paths(folder, manifest, "train")
    file, group, row = np.zeros(num, np.int32), np.zeros(num, np.int32), np.zeros(num, np.int32)

    def read(path: str) -> tuple[np.ndarray, list[int]]:
        parquet = pq.ParquetFile(path, filesystem=folder.fs)
        lengths = [parquet.metadata.row_group(g).num_rows for g in range(parquet.num_row_groups)]
        return parquet.read(columns=["image_id"])["image_id"].to_numpy(), lengths

    with ThreadPoolExecutor(READERS) as pool:
        for number, (ids, lengths) in enumerate(pool.map(read, paths)):
            file[ids] = number
            group[ids] = np.repeat(np.arange(len(lengths)), lengths)
            row[ids] = np.concatenate([np.arange(length) for length in lengths])
    return RowIndex(paths, file, group, row)


def read_rows(folder: Folder, index: RowIndex, ids: np.ndarray) -> list[bytes]:
    """The encoded images of ``ids``, in their order, reading only the row groups that hold one."""

    def read(number: int) -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        parquet = pq.ParquetFile(index.paths[number], filesystem=folder.fs)
        here = ids[index.file[ids] == number]
        for group in np.unique(index.group[here]):
            wanted = here[index.group[here] == group]
            column = parquet.read_row_group(int(group), columns=["image"])["image"]
            found.update(zip(wanted.tolist(), column.take(pa.array(index.row[wanted])).to_pylist(), strict=True))
        return found

    everything: dict[int, bytes] = {}
    with ThreadPoolExecutor(READERS) as pool:
        for found in pool.map(read, np.unique(index.file[ids])):
            everything |= found
    return [everything[i] for i in ids.tolist()]
