"""Images decoded once into one array, and the two views of it: every image once, and what the plan says.

No Ray here: launch puts the array into the object store, where all workers of a node read the same copy.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch
from threadpoolctl import threadpool_limits

from raydc.clustering.sampling import SamplingPlan
from raydc.config import ImagesConfig
from raydc.data import shards, transforms
from raydc.data.decode import decode
from raydc.data.schema import Manifest
from raydc.seeding import derive
from raydc.storage import Folder

EXTRACT_BATCH = 256  # images; a multiple of what CPUs and GPUs like, small enough for a laptop


@dataclass(frozen=True, eq=False)
class ImageArray:
    """All images of a split, by image_id: RGB uint8, row-major (H, W, 3), one after the other.

    ``pixels`` (bytes,), ``offsets`` int64 (N,), ``heights`` and ``widths`` int64 (N,).
    """

    pixels: np.ndarray
    offsets: np.ndarray
    heights: np.ndarray
    widths: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets)

    @cached_property
    def shape(self) -> tuple[int, int] | None:
        """Height and width, where all images have the same; images that were not decoded have none."""
        kept = self.heights > 0
        shapes = {*zip(self.heights[kept].tolist(), self.widths[kept].tolist(), strict=True)}
        return shapes.pop() if len(shapes) == 1 else None

    def one(self, image_id: int) -> np.ndarray:
        """(H, W, 3), a view."""
        height, width, start = self.heights[image_id], self.widths[image_id], self.offsets[image_id]
        return self.pixels[start : start + height * width * 3].reshape(height, width, 3)

    def stack(self, image_ids: np.ndarray) -> np.ndarray:
        """(B, H, W, 3), a copy; only where all images have one size."""
        height, width = self.shape
        return self.pixels.reshape(-1, height, width, 3)[self.offsets[image_ids] // (height * width * 3)]


def estimate_bytes(folder: Folder, manifest: Manifest, split: str, cache_size: int) -> int:
    """Bytes of the decoded split, from the images of its first shard."""
    first = manifest.splits[split].files[0]
    images = shards.read_shard(folder, first.name, ["image"])["image"]
    sample = images[:64].to_pylist()
    each = np.mean([np.prod(_kept_shape(decode(data).shape, cache_size)) * 3 for data in sample])
    return int(each * manifest.splits[split].rows)


def decode_split(folder: Folder, manifest: Manifest, split: str, cache_size: int = 0, only=None) -> ImageArray:
    """Decode a split, on all CPUs of this machine (decoders release the GIL).

    ``only``: image_ids; all others stay empty, of height and width 0.
    """
    rows = manifest.splits[split].rows
    heights, widths = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    blocks: list[tuple[np.ndarray, list[np.ndarray]]] = []
    with decoders(os.cpu_count() or 1) as pool:
        for file in manifest.splits[split].files:
            table = shards.read_shard(folder, file.name, ["image_id", "image"])
            if only is not None:
                table = table.filter(pa.array(np.isin(table["image_id"].to_numpy(), only)))
            ids = table["image_id"].to_numpy()
            images = list(pool.map(lambda data: _kept(decode(data), cache_size), table["image"].to_pylist()))
            heights[ids], widths[ids] = [i.shape[0] for i in images], [i.shape[1] for i in images]
            blocks.append((ids, images))
    offsets = np.cumsum(heights * widths * 3) - heights * widths * 3
    array = ImageArray(np.empty(int((heights * widths * 3).sum()), np.uint8), offsets, heights, widths)
    while blocks:  # each block is let go once it is copied
        for image_id, image in zip(*blocks.pop(), strict=True):
            array.one(image_id)[:] = image
    return array


def _kept_shape(shape: tuple[int, ...], cache_size: int) -> tuple[int, int]:
    height, width = shape[:2]
    if not 0 < cache_size < min(height, width):
        return height, width
    scale = cache_size / min(height, width)
    return max(round(height * scale), cache_size), max(round(width * scale), cache_size)


def _kept(pixels_HWC: np.ndarray, cache_size: int) -> np.ndarray:
    """The image at the cache's size; never enlarged."""
    shape = _kept_shape(pixels_HWC.shape, cache_size)
    if shape == pixels_HWC.shape[:2]:
        return pixels_HWC
    image = torch.from_numpy(pixels_HWC).permute(2, 0, 1)
    return transforms.TF.resize(image, list(shape), antialias=True).permute(1, 2, 0).numpy()


def decoders(threads: int) -> ThreadPoolExecutor:
    """Threads that decode and cut, each on one CPU: torch would share out every small operation of theirs among all CPUs
    and, where these are at work already, take several times as long."""

    def alone() -> None:
        torch.get_num_threads()  # what torch sets up in a new thread would undo the limit if it came later
        threadpool_limits(1, user_api="openmp")

    return ThreadPoolExecutor(threads, initializer=alone)


def cut(images: list[np.ndarray], boxes: np.ndarray, flips, size: int, pool: ThreadPoolExecutor) -> torch.Tensor:
    """Crops of images of any sizes: uint8 (B, 3, size, size), channels last in memory."""
    crops = empty_crops(len(images), size)
    flips = np.zeros(len(images), bool) if flips is None else flips
    deque(pool.map(cut_into, crops, images, boxes, flips), maxlen=0)
    return crops


def empty_crops(num: int, size: int) -> torch.Tensor:
    return torch.empty(num, size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)


def cut_into(crop: torch.Tensor, image_HWC: np.ndarray, box: np.ndarray, flip: bool) -> None:
    """One of them, in place."""
    found = transforms.crop_one(image_HWC, box, crop.shape[-1])
    crop.copy_(found.flip(2) if flip else found)


class Crops(tuple):
    """Several crops of a batch's images, each (B, 3, S, S) with its own S; a slice cuts every one of them."""

    def __getitem__(self, rows):
        return Crops(crop[rows] for crop in self)


def views_of(config: ImagesConfig, views: list[ImagesConfig] | None, seed: int) -> list[tuple[ImagesConfig, int]]:
    """How each crop of an image is cut, with a seed of its own; ``views``: None for one crop, as ``config`` has it."""
    return [(config, seed)] if views is None else [(one, derive(seed, "view", number)) for number, one in enumerate(views)]


def as_batch(crops: list[torch.Tensor], views: list[ImagesConfig] | None) -> torch.Tensor | Crops:
    return crops[0] if views is None else Crops(crops)


class CachedImages:
    """Both views of a cached train split (and the plain view of others) for one worker of ``world_size``."""

    def __init__(
        self, arrays: dict[str, ImageArray], config: ImagesConfig, *, rank: int, world_size: int, device, threads: int
    ) -> None:
        self.arrays, self.config = arrays, config
        self.rank, self.world_size, self.device = rank, world_size, device
        self.pool = decoders(threads)

    def extract(self, split: str, image_ids: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """(image_ids, pixels (B, 3, S, S)) of this rank's contiguous slice of the ids; rows of all ranks are all ids."""
        ids = np.arange(len(self.arrays[split])) if image_ids is None else image_ids
        mine = ids[len(ids) * self.rank // self.world_size : len(ids) * (self.rank + 1) // self.world_size]
        for start in range(0, len(mine), EXTRACT_BATCH):
            batch = mine[start : start + EXTRACT_BATCH]
            array = self.arrays[split]
            boxes = transforms.centre_boxes(self.config, array.heights[batch], array.widths[batch])
            yield batch, self._crops(array, batch, boxes, None, self.config.size)

    def train(
        self, plan: SamplingPlan, seed: int, batch_size: int, views: list[ImagesConfig] | None = None
    ) -> Iterator[tuple[np.ndarray, torch.Tensor | Crops]]:
        """This rank's part of every global batch of the plan: (image_ids, augmented pixels (B, 3, S, S)).

        ``views``: how each of several crops is cut; they come as ``Crops``.
        """
        image_ids, draws = plan.draws()
        part = batch_size // self.world_size
        for start in range(self.rank * part, len(image_ids), batch_size):
            ids, numbers = (column[start : start + part].astype(np.int64) for column in (image_ids, draws))
            crops = [self._augmented(ids, numbers, *view) for view in views_of(self.config, views, seed)]
            yield ids, as_batch(crops, views)

    def _augmented(self, ids: np.ndarray, draws: np.ndarray, config: ImagesConfig, seed: int) -> torch.Tensor:
        array = self.arrays["train"]
        augmentation = transforms.draw_augmentation(config, seed, ids, draws, array.heights[ids], array.widths[ids])
        crops = self._crops(array, ids, augmentation.box, augmentation.flip, config.size)
        return transforms.augment(crops, augmentation, config)

    def _crops(self, array: ImageArray, ids: np.ndarray, boxes: np.ndarray, flips, size: int) -> torch.Tensor:
        if array.shape and array.shape[0] * array.shape[1] <= 96 * 96:
            pixels = torch.from_numpy(array.stack(ids)).to(self.device)
            return transforms.crop_batch(pixels, boxes, flips, size)
        return cut([array.one(i) for i in ids], boxes, flips, size, self.pool).to(self.device)
