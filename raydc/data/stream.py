"""Images from Ray: the cached array as one shared object, or a stream of shards that follows the plan.

A stream reads every shard once an epoch. Rows the plan does not draw are dropped before they are decoded, and no row is
lost on the way: Train's own split drops rows, so the extraction views are split by ``LosslessDataConfig``.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.train
import torch

from raydc.clustering.sampling import SamplingPlan
from raydc.config import Config, ImagesConfig, RunError
from raydc.data import cache, rows, shards, transforms
from raydc.data.cache import EXTRACT_BATCH, CachedImages, as_batch, cut, cut_into, empty_crops, views_of
from raydc.data.decode import UnreadableImage, decode, image_size
from raydc.data.draws import PlanBoard, current_travel, draw_rows, own_counts, plan_travel
from raydc.data.schema import Manifest
from raydc.launch import Worker
from raydc.remote import Remote, Shared
from raydc.seeding import derive
from raydc.storage import Folder
from raydc.training import Prefetch

PIECE = 8  # images that a decoding thread takes at once
IN_FLIGHT = 2  # batches that are decoded while the one before them is waited for: no thread is idle at a batch's end
TASK_BYTES = 32 << 20  # of small files that one task reads; no file is parted
BLOCK_BYTES = 16 << 20  # a smaller block reaches the first batch sooner than Ray Data's 128 MiB


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
    index = Shared({split: rows.index_rows(folder, manifest, split) for split in splits}, local=local)
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
    context = ray.data.DataContext.get_current().copy()  # the process's own stays as it is
    context.enable_progress_bars = False
    context.target_max_block_size = BLOCK_BYTES
    # The second version of Ray Data's reader starts, in each pass, an actor that reads the files' footers and new processes
    # beside it: seconds of every CPU. And never more tasks than files: blocks that are split again stall the stream.
    context.use_datasource_v2 = False
    files = manifest.splits[split].files
    tasks = min(len(files), -(-sum(file.bytes for file in files) // TASK_BYTES))
    order = None
    if shuffle is not None:
        order = ray.data.FileShuffleConfig(seed=derive(shuffle, "files") % 2**31, reseed_after_execution=True)
    options = {"columns": ["image_id", "image"], "filesystem": folder.fs, "shuffle": order, "override_num_blocks": tasks}
    logging.getLogger("ray.data._internal.datasource.parquet_datasource").setLevel(logging.WARNING)  # sizes of its batches
    with ray.data.DataContext.current(context):
        try:
            return ray.data.read_parquet(shards.shard_paths(folder, manifest, split), **options)
        except ray.exceptions.RayTaskError as error:
            raise RunError(f"the shards in {folder.uri} cannot be read: {str(error).strip().splitlines()[-1]}") from None


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


# --- decoding in data tasks ----------------------------------------------------------------------------------------------


def cut_rows(table: pa.Table, config: ImagesConfig, plans: Remote | None) -> pa.Table:
    """Decode in a data task: the crop (3 x size x size bytes) in place of the encoded image; null if unreadable."""
    return cut_table(table, config, None if plans is None else current_travel(plans).seed)


def cut_table(table: pa.Table, config: ImagesConfig, seed: int | None) -> pa.Table:
    """The same for training crops of a seed or, without one, for central ones."""
    ids, payload = table["image_id"].to_numpy(), table["image"].to_pylist()
    heights, widths = sizes_of(payload)
    if seed is None:
        boxes, flips, columns = transforms.centre_boxes(config, heights, widths), np.zeros(len(ids), bool), {}
    else:
        draws = table["draw"].to_numpy()
        drawn = transforms.draw_augmentation(config, seed, ids, draws, heights, widths)
        boxes, flips, columns = drawn.box, drawn.flip, {"draw": draws}
    crops = [
        None if image is None else cut([image], box[None], [flip], config.size, _Inline).numpy().tobytes()
        for image, box, flip in zip(map(_try_decode, payload), boxes, flips, strict=True)
    ]
    return pa.table({"image_id": ids, **columns, "crop": pa.array(crops, pa.binary())})


class _Inline:
    map = staticmethod(map)


def _try_decode(data: bytes) -> np.ndarray | None:
    try:
        return decode(data)
    except UnreadableImage:
        return None


# --- worker side --------------------------------------------------------------------------------------------------------


class StreamedImages:
    """Both views of streamed shards for one worker; the same methods as CachedImages."""

    def __init__(self, streams: Streams, worker: Worker, threads: int) -> None:
        self.streams, self.worker, self.config = streams, worker, streams.config.images
        self.indices = streams.row_index.get() if streams.row_index else {}
        self.unreadable: dict[str, list[int]] = {}
        self.reading: dict[str, tuple[threading.Event, threading.Thread]] = {}
        self.pool = cache.decoders(threads)

    def extract(self, split: str, image_ids: np.ndarray | None = None) -> Iterator:
        """(image_ids, pixels (B, 3, S, S)) of whatever rows this rank is given; unreadable ones go to ``unreadable``."""
        self.unreadable[split] = []
        tables = self._extract_tables(split)
        if image_ids is not None:
            wanted = np.zeros(self.streams.sizes[split], bool)
            wanted[image_ids] = True
            tables = (_only(table, wanted) for table in tables)
        return self._extracted(split, tables)

    def _extract_tables(self, split: str) -> Iterator[pa.Table]:
        """First the rows that this rank reads itself, then the stream's but for those that any rank reads itself."""
        stream = self._stream("extract" if split == "train" else split)
        index = self.indices.get(split)
        if index is None:
            return stream
        heads = rows.head_groups(index, self.worker.world_size, derive(self.streams.config.seed, "head", split))
        outside = np.ones(len(index.ids), bool)
        for group in itertools.chain(*heads):
            outside[index.ids_of(group)] = False
        mine = heads[self.worker.rank]
        images = rows.read_groups(self.streams.folder, index, mine)
        head = ({"image_id": index.ids_of(group), "image": column} for group, column in zip(mine, images, strict=False))
        return itertools.chain(_joined(map(pa.table, head), EXTRACT_BATCH), (_only(table, outside) for table in stream))

    def _stream(self, view: str) -> Prefetch:
        """Tables of a pass, which begins at once."""
        if view in self.reading:  # a pass that was given up: its end, if it came later, would be taken for this one's
            stopped, thread = self.reading[view]
            stopped.set()
            thread.join()
        shard = ray.train.get_dataset_shard(view)
        tables = Prefetch(shard.iter_batches(batch_size=EXTRACT_BATCH, batch_format="pyarrow", prefetch_batches=2))
        self.reading[view] = tables.stopped, tables.thread
        return tables

    def _extracted(self, split: str, tables: Iterator[pa.Table]) -> Iterator:
        def begun() -> Iterator[Callable]:
            for table in tables:
                ids = table["image_id"].to_numpy()
                if "crop" in table.column_names:
                    good = np.array(table["crop"].is_valid().to_numpy(zero_copy_only=False), bool)
                    yield lambda ids=ids, good=good, crops=table["crop"]: (
                        ids,
                        good,
                        self._unpack(crops.filter(pa.array(good))),
                    )
                    continue
                payload = table["image"].to_pylist()
                boxes = transforms.centre_boxes(self.config, *sizes_of(payload))
                waiting = self._cut(payload, [(boxes, np.zeros(len(ids), bool), self.config.size)])

                def finished(ids=ids, waiting=waiting):
                    (crops,), good = waiting()
                    return ids, good, crops if good.all() else crops[torch.from_numpy(good)]

                yield finished

        for ids, good, pixels in in_flight(begun()):
            self.unreadable[split] += ids[~good].tolist()
            if good.any():
                yield ids[good], pixels.to(self.worker.device)

    def train(self, plan: SamplingPlan, seed: int, batch_size: int, views: list[ImagesConfig] | None = None) -> Iterator:
        """This rank's share of the plan's draws, in parts of global batches: (image_ids, augmented pixels)."""
        return in_flight(self._start_batch(batch, seed, views) for batch in self.draws(plan, seed, batch_size))

    def draws(self, plan: SamplingPlan, seed: int, batch_size: int) -> Iterator[list[tuple[int, int, bytes]]]:
        """The same, before decoding: lists of (image_id, draw, encoded image or crop). The plan is published at once."""
        index, part = self.indices["train"], batch_size // self.worker.world_size
        counts = own_counts(plan, batch_size)
        heads = rows.plan_heads(counts, index, self.worker.world_size, part, derive(plan.seed, "head"))
        if self.worker.is_first:
            travel = plan_travel(plan, batch_size, seed, self._hot_images, heads)
            self.streams.plans.publish([Shared(travel, local=False)])
        self.worker.barrier()  # a plan is in force before anybody's reading begins
        stream = self._stream("train")
        head = rows.head_rows(self.streams.folder, index, heads[self.worker.rank], counts)
        if decode_in_tasks(self.streams.config):
            head = (cut_table(table, self.config, seed) for table in head)
        return mixed(_each(itertools.chain(head, stream)), part, self.config.shuffle_buffer, seed)

    def _start_batch(self, batch: list[tuple[int, int, bytes]], seed: int, views: list[ImagesConfig] | None) -> Callable:
        """Decoding and cutting begin; what it returns waits for (image_ids, augmented pixels)."""
        ids, draws = (np.array(column, np.int64) for column in zip(*((i, d) for i, d, _ in batch), strict=True))
        payload = [data for _, _, data in batch]
        if None in payload:
            raise _no_longer_readable(ids[payload.index(None)])
        if decode_in_tasks(self.streams.config):
            drawn = transforms.draw_augmentation(self.config, seed, ids, draws, *np.ones((2, len(ids)), np.int64))
            crops = self._unpack(pa.array(payload, pa.binary()))
            return lambda: (ids, transforms.augment(crops.to(self.worker.device), drawn, self.config))
        kinds, sizes = views_of(self.config, views, seed), sizes_of(payload)
        drawn = [transforms.draw_augmentation(config, own, ids, draws, *sizes) for config, own in kinds]
        waiting = self._cut(
            payload, [(one.box, one.flip, config.size) for one, (config, _) in zip(drawn, kinds, strict=True)]
        )

        def finished():
            crops, good = waiting()
            if not good.all():
                raise _no_longer_readable(ids[good.argmin()])
            crops = [one.to(self.worker.device) for one in crops]
            kind = zip(crops, drawn, kinds, strict=True)
            return ids, as_batch([transforms.augment(one, how, config) for one, how, (config, _) in kind], views)

        return finished

    def _cut(self, payload: list[bytes], views: list[tuple[np.ndarray, np.ndarray, int]]) -> Callable:
        """Begin to decode images and to cut (boxes, flips, size) of each view; what it returns waits for
        (crops of each view, which images could be read)."""
        crops, good = [empty_crops(len(payload), size) for _, _, size in views], np.ones(len(payload), bool)

        def work(start: int) -> None:
            for row in range(start, min(start + PIECE, len(payload))):
                image = _try_decode(payload[row])
                if image is None:
                    good[row] = False
                    continue
                for view, (boxes, flips, _) in zip(crops, views, strict=True):
                    cut_into(view[row], image, boxes[row], flips[row])

        pieces = [self.pool.submit(work, start) for start in range(0, len(payload), PIECE)]

        def finished() -> tuple[list[torch.Tensor], np.ndarray]:
            for piece in pieces:
                piece.result()
            return crops, good

        return finished

    def _unpack(self, crops: pa.Array) -> torch.Tensor:
        pixels = np.frombuffer(b"".join(crops.to_pylist()), np.uint8).copy()
        return torch.from_numpy(pixels).view(-1, 3, self.config.size, self.config.size)

    def _hot_images(self, ids: np.ndarray) -> list[bytes]:
        """Encoded images by id, from the row groups that hold them."""
        return rows.read_rows(self.streams.folder, self.indices["train"], ids)


def in_flight(begun: Iterator[Callable]) -> Iterator:
    """What the waiting functions give, in order, while the work of the next ones goes on."""
    ahead: deque[Callable] = deque()
    for one in begun:
        ahead.append(one)
        if len(ahead) > IN_FLIGHT:
            yield ahead.popleft()()
    while ahead:
        yield ahead.popleft()()


def sizes_of(payload: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Heights and widths of encoded images, int64; 1 where it cannot be told."""
    shapes = np.ones((len(payload), 2), np.int64)
    for row, data in enumerate(payload):
        with contextlib.suppress(UnreadableImage):
            shapes[row] = image_size(data)
    return shapes[:, 0], shapes[:, 1]


def _no_longer_readable(image_id: int) -> RunError:
    return RunError(f"image_id {image_id} can no longer be read; the shards changed under the run")


def _only(table: pa.Table, wanted: np.ndarray) -> pa.Table:
    """Rows whose image_id is wanted, bool (N,)."""
    mask = wanted[table["image_id"].to_numpy()]
    return table if mask.all() else table.filter(pa.array(mask))


def _joined(tables: Iterator[pa.Table], num_rows: int) -> Iterator[pa.Table]:
    """Tables of at least so many rows, but for the last."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(map(len, held)) >= num_rows:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


def _each(tables: Iterator[pa.Table]) -> Iterator[tuple[int, int, bytes]]:
    for table in tables:
        payload = table["crop" if "crop" in table.column_names else "image"]
        yield from zip(table["image_id"].to_pylist(), table["draw"].to_pylist(), payload.to_pylist(), strict=True)


class PartlyCached:
    """Training images from memory, val as a stream: a small part of the labels of a set that does not fit."""

    def __init__(self, cached: CachedImages, streamed: StreamedImages) -> None:
        self.train, self.extract, self.unreadable = cached.train, streamed.extract, streamed.unreadable


def mixed(rows: Iterator, batch_size: int, buffer_size: int, seed: int) -> Iterator[list]:
    """Whole batches of rows taken at random from a bounded buffer, which grows while the first of them leave."""
    random = np.random.default_rng(derive(seed, "buffer"))
    buffer: list = []
    kept = min(batch_size, buffer_size)
    for row in rows:
        buffer.append(row)
        if len(buffer) >= kept + batch_size:
            yield _pop(buffer, batch_size, random)
            kept = min(kept + batch_size, buffer_size)
    while len(buffer) >= batch_size:
        yield _pop(buffer, batch_size, random)
    if buffer:
        raise RunError(f"the stream ended {len(buffer)} draws into a batch; the shards changed under the run")


def _pop(buffer: list, num: int, random: np.random.Generator) -> list:
    """So many rows at random; the last ones move into their places."""
    taken = []
    for position in random.integers(len(buffer) - np.arange(num)).tolist():
        buffer[position], buffer[-1] = buffer[-1], buffer[position]
        taken.append(buffer.pop())
    return taken
