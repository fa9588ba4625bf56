"""Features extracted once and shared: by backbone, data and view, in a folder of blocks that is whole or not there.

N images, D dimensions. Taps: "avgpool" is the feature before the head, (N, D); "layers" are feature1..feature5, each
average-pooled to the protocol's grid and flattened.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import safetensors.numpy
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF

from raydc import launch, training
from raydc.benchmarks.options import LAYERS, Setting
from raydc.benchmarks.setting import Candidate
from raydc.config import ImagesConfig, RunError, TrainConfig
from raydc.data import shards, transforms
from raydc.data.cache import cut, decoders
from raydc.data.decode import UnreadableImage, decode
from raydc.data.schema import Manifest
from raydc.models.norm import adapt_statistics, folded
from raydc.remote import Shared
from raydc.storage import Folder

# Kernel, stride and padding of the average pools at 224 pixels behind the 7x7 stem, and the grids they give (protocol 2).
POOLS = dict(zip(LAYERS, ((10, 10, 4), (16, 8, 0), (13, 5, 0), (8, 3, 0), (6, 1, 0)), strict=True))
GRIDS = dict(zip(LAYERS, (12, 6, 4, 3, 2), strict=True))
SIDES = dict(zip(LAYERS, (112, 56, 28, 14, 7), strict=True))
BLOCK = 1024  # images in a file
BATCH = 64  # images through the network at once
ADAPT_IMAGES = 1024  # for BatchNorm statistics of fresh weights
INDEX = "index.json"
Taps = Literal["avgpool", "layers"]
Block = tuple[str, np.ndarray]  # the name of a file, and the image_ids in it


def pool(maps: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """feature1..feature5 (B, C, h, w) on the protocol's grids: with its own pools where the maps have its sizes, else
    adaptive pools to the same grids."""
    exact = all(tuple(maps[layer].shape[2:]) == (SIDES[layer], SIDES[layer]) for layer in LAYERS)
    if exact:  # padding counts in the average, as in the references
        return {layer: F.avg_pool2d(maps[layer], *POOLS[layer]) for layer in LAYERS}
    return {layer: F.adaptive_avg_pool2d(maps[layer], GRIDS[layer]) for layer in LAYERS}


class Tapped(torch.nn.Module):
    """Pixels -> a dict of flat features, float; the frozen backbone with its BatchNorms folded away."""

    def __init__(self, candidate: Candidate, taps: Taps) -> None:
        super().__init__()
        self.backbone, self.taps = folded(candidate.build()), taps

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.taps == "avgpool":
            return {"avgpool": self.backbone(pixels)}
        maps = {layer: value.float() for layer, value in self.backbone.taps(pixels).items()}
        return {layer: value.flatten(1) for layer, value in pool(maps).items()}


# --- what is extracted from ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSet:
    """Images with ids 0..rows-1: Parquet files of shards, or image files, whose place in ``paths`` is their id."""

    name: str
    folder: Folder
    rows: int
    fingerprint: str
    files: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()


def shard_split(folder: Folder, manifest: Manifest, split: str) -> ImageSet:
    """A split of a shards folder."""
    files = tuple(shards.shard_paths(folder, manifest, split))
    rows = manifest.splits[split].rows
    return ImageSet(name=split, folder=folder, rows=rows, fingerprint=f"{manifest.fingerprint}/{split}", files=files)


def image_files(folder: Folder, name: str, paths: list[str]) -> ImageSet:
    """Files below ``folder``; told apart from others by their names and sizes."""
    infos = folder.fs.get_file_info([folder.path(path) for path in paths])
    facts = json.dumps([[path, info.size] for path, info in zip(paths, infos, strict=True)])
    digest = hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()
    return ImageSet(name=name, folder=folder, rows=len(paths), fingerprint=digest, paths=tuple(paths))


# --- extraction ---------------------------------------------------------------------------------------------------------


class Extractor:
    """What runs on a worker: a table of (image_id, image or path) -> its features in a file of ``cache``."""

    def __init__(self, candidate: Shared, images: ImageSet, seen: View, taps: Taps, cache: Folder, train, device, of):
        """``of``: how many there are; on a cluster of several nodes a node may have fewer, and CPUs to spare."""
        self.compute, threads = training.open_compute(train, device, of, deterministic=False)
        self.network = self.compute.prepare(Tapped(candidate.get(), taps))
        self.images = images
        self.reader, self.cache = Reader(images.folder, seen, threads), cache

    def blocks(self, piece: str | pa.Table) -> list[Block]:
        """The files of a piece, each with the image_ids it holds."""
        return [self(table) for table in _tables(self.images, piece)]

    def __call__(self, table: pa.Table) -> Block:
        ids = table["image_id"].to_numpy()
        pixels = (self.reader(table.slice(start, BATCH)) for start in range(0, len(table), BATCH))
        batches = [self._features(batch) for batch in training.Prefetch(pixels)]
        arrays = {tap: np.concatenate([batch[tap] for batch in batches]) for tap in batches[0]}
        name = f"block-{uuid.uuid4().hex}.safetensors"
        self.cache.write(name, safetensors.numpy.save(arrays | {"image_id": ids}))
        return name, ids

    @torch.inference_mode()
    def _features(self, pixels: torch.Tensor) -> dict[str, np.ndarray]:
        with self.compute.autocast():
            found = self.network(self.compute.place(pixels))
        return {tap: value.float().cpu().numpy() for tap, value in found.items()}


class ExtractorActor:
    """An Extractor that is made where it runs, again after a restart: an actor's own arguments may be lost by then."""

    def __init__(self) -> None:
        self.extractor: Extractor | None = None

    def blocks(self, arguments: tuple, piece: str | pa.Table) -> list[Block]:
        self.extractor = self.extractor or Extractor(*arguments)
        return self.extractor.blocks(piece)


@dataclass(frozen=True, kw_only=True)
class View:
    """How a backbone is shown an image: resized to a short side of ``resize``, then the centre of ``size`` pixels; or, with
    ``squash``, resized once more to a square of ``size`` (protocol 2)."""

    size: int
    resize: int
    squash: bool = False


class Reader:
    """Tables of (image_id, image or path) -> pixels, uint8 (B, 3, size, size)."""

    def __init__(self, folder: Folder, view: View, threads: int) -> None:
        self.folder, self.view = folder, view
        self.pool = decoders(threads)

    def __call__(self, table: pa.Table) -> torch.Tensor:
        if "image" in table.column_names:
            encoded, names = table["image"].to_pylist(), [f"image_id {i}" for i in table["image_id"].to_pylist()]
        else:
            names = table["path"].to_pylist()
            encoded = list(self.pool.map(self.folder.read, names))
        images = list(self.pool.map(self._decode, encoded, names))
        if self.view.squash:
            return torch.stack(list(self.pool.map(self._squash, images)))
        heights, widths = (np.array([image.shape[axis] for image in images], np.int64) for axis in (0, 1))
        config = ImagesConfig(size=self.view.size, resize=self.view.resize)
        return cut(images, transforms.centre_boxes(config, heights, widths), None, self.view.size, self.pool)

    def _squash(self, pixels_HWC: np.ndarray) -> torch.Tensor:
        image = torch.from_numpy(pixels_HWC).permute(2, 0, 1)
        short_side = TF.resize(image, [self.view.resize], antialias=True)
        return TF.resize(short_side, [self.view.size, self.view.size], antialias=True)

    @staticmethod
    def _decode(data: bytes, name: str) -> np.ndarray:
        try:
            return decode(data)
        except UnreadableImage as error:
            raise RunError(f"{name} cannot be read ({error}); replace the file, or make the shards again") from None


def view(candidate: Candidate, squash: bool = False) -> View:
    """How the backbone is shown an image that is not augmented."""
    return View(size=candidate.size, resize=candidate.resize, squash=squash)


def extract(setting: Setting, candidate: Candidate, images: ImageSet, taps: Taps, *, squash: bool = False) -> Extraction:
    """The features of ``images``, from the cache where they are there."""
    gpu = launch.choose_gpu(setting.use_gpu, setting.num_workers)
    seen, train = view(candidate, squash), compute_config(setting, gpu)
    facts = [candidate.fingerprint, images.fingerprint, taps, asdict(seen), train.precision]
    cache = setting.features_folder.child(_key(facts))
    if cache.exists(INDEX):
        print(f"features of {images.rows:,} {images.name} images: {cache.uri} has them", flush=True)
        return Extraction(cache, cache.read_json(INDEX), from_cache=True)
    began = time.perf_counter()
    shared = Shared(candidate, local=setting.num_workers == 0)
    device = torch.device("cuda" if gpu else "cpu")
    arguments = (shared, images, seen, taps, cache, train, device, max(1, setting.num_workers))
    blocks = _extract_on_ray(setting, images, gpu, arguments) if setting.num_workers else _extract_here(images, arguments)
    files = _coverage(blocks, images)
    index = {"facts": facts, "rows": images.rows, "files": files, "backbone": candidate.name, "images": images.name}
    cache.write_json(INDEX, index)
    for left in set(cache.names()) - {INDEX, *files}:  # by a kill, or a block that was done twice
        cache.delete(left)
    seconds = time.perf_counter() - began
    print(
        f"features of {images.rows:,} {images.name} images: {seconds:.1f} s, {images.rows / seconds:,.0f} img/s", flush=True
    )
    return Extraction(cache, index)


def _key(facts: list) -> str:
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=12).hexdigest()


def compute_config(setting: Setting, gpu: bool) -> TrainConfig:
    """How frozen networks are run: as in training, with the same precision."""
    precision = training.choose_precision("auto", "cuda" if gpu else "cpu")
    return TrainConfig(precision=precision, channels_last="yes", threads=setting.threads)


def _pieces(images: ImageSet, block: int = BLOCK) -> Iterator[str | pa.Table]:
    """Parquet files, or tables of (image_id, path)."""
    yield from images.files
    if images.paths:
        table = pa.table({"image_id": np.arange(images.rows), "path": list(images.paths)})
        yield from (table.slice(start, block) for start in range(0, images.rows, block))


def _tables(images: ImageSet, piece: str | pa.Table) -> Iterator[pa.Table]:
    """(image_id, image or path), at most BLOCK rows each."""
    if isinstance(piece, pa.Table):
        yield piece
        return
    for batch in pq.ParquetFile(piece, filesystem=images.folder.fs).iter_batches(BLOCK, columns=["image_id", "image"]):
        yield pa.Table.from_batches([batch])


def _extract_here(images: ImageSet, arguments: tuple) -> Iterator[Block]:
    extractor = Extractor(*arguments)
    for piece in _pieces(images):
        yield from extractor.blocks(piece)


def _extract_on_ray(setting: Setting, images: ImageSet, gpu: bool, arguments: tuple) -> Iterator[Block]:
    """The same on actors; one that dies is made again, and its piece with it."""
    import ray
    from ray.util import ActorPool

    actor = ray.remote(ExtractorActor).options(
        num_cpus=1, num_gpus=int(gpu), max_restarts=setting.max_failures, max_task_retries=-1
    )
    actors = [actor.remote() for _ in range(setting.num_workers)]
    block = max(BATCH, min(BLOCK, -(-images.rows // (4 * setting.num_workers))))
    try:
        pool = ActorPool(actors)
        for blocks in pool.map_unordered(lambda one, piece: one.blocks.remote(arguments, piece), _pieces(images, block)):
            yield from blocks
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise RunError(f"the extraction failed ({str(error).splitlines()[0][:200]}); the same command tries again") from None
    finally:
        for one in actors:
            ray.kill(one)


def _coverage(blocks: Iterator[Block], images: ImageSet) -> list[str]:
    """The files that together hold each image once; RunError where some image is in none."""
    owner = np.full(images.rows, -1, np.int64)
    files: list[str] = []
    for file, ids in blocks:
        owner[ids] = len(files)
        files.append(file)
    if (owner < 0).any():
        raise RunError(f"{int((owner < 0).sum())} of {images.rows:,} {images.name} images were not extracted; run it again")
    used = set(owner.tolist())
    return [file for number, file in enumerate(files) if number in used]


@dataclass(frozen=True, eq=False)
class Extraction:
    """Features on disk; ``load`` brings one tap into memory, by image_id."""

    folder: Folder
    index: dict
    from_cache: bool = False

    def load(self, tap: str) -> np.ndarray:
        """(N, D) float32."""
        features = None
        for file in self.index["files"]:
            ids, block = _read_arrays(self.folder, file, ("image_id", tap))
            if features is None:
                features = np.empty((self.index["rows"], block.shape[1]), np.float32)
            features[ids] = block
        return features


def _read_arrays(folder: Folder, file: str, names: tuple[str, ...]) -> list[np.ndarray]:
    """Some arrays of a safetensors file, without reading the others (five layers of a block are 180 MB)."""
    types = {"I64": np.int64, "F32": np.float32}
    with folder.fs.open_input_file(folder.path(file)) as source:
        size = int.from_bytes(source.read(8), "little")
        header, arrays = json.loads(source.read(size)), []
        for name in names:
            start, stop = header[name]["data_offsets"]
            source.seek(8 + size + start)
            data = np.frombuffer(source.read(stop - start), types[header[name]["dtype"]])
            arrays.append(data.reshape(header[name]["shape"]))
    return arrays


# --- fresh weights ------------------------------------------------------------------------------------------------------


def variants(setting: Setting, candidate: Candidate, images: ImageSet, *, squash: bool = False) -> list[Candidate]:
    """The candidate; for fresh weights also with BatchNorm statistics of some of the images, the first ones of the set.

    Those are kept beside the features, so that a later start measures the same network.
    """
    if not candidate.is_random:
        return [candidate]
    seen = view(candidate, squash)
    name = f"adapted-{_key([candidate.fingerprint, images.fingerprint, asdict(seen)])}.safetensors"
    folder = setting.features_folder
    if not folder.exists(name):
        folder.write(name, safetensors.torch.save(_adapted(candidate, images, seen)))
    tensors = safetensors.torch.load(folder.read(name))
    return [candidate, replace(candidate, tensors=tensors, statistics="adapted")]


def _adapted(candidate: Candidate, images: ImageSet, seen: View) -> dict[str, torch.Tensor]:
    reader, backbone = Reader(images.folder, seen, os.cpu_count() or 1), candidate.build()
    table = pa.concat_tables(list(_first(images, ADAPT_IMAGES)))
    batches = (table.slice(start, BATCH) for start in range(0, len(table), BATCH))
    adapt_statistics(backbone, (reader(batch).float() for batch in batches if len(batch) > 1))
    return {key: value.contiguous() for key, value in backbone.state_dict().items()}


def _first(images: ImageSet, num: int) -> Iterator[pa.Table]:
    for table in itertools.chain.from_iterable(_tables(images, piece) for piece in _pieces(images)):
        yield table.slice(0, num)
        num -= len(table)
        if num <= 0:
            return
