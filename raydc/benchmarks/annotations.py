"""Annotated images: one as a reader makes it, and all of a split as a few flat arrays that every process can share.

n objects of one image; N images, M objects of all. Boxes are x1, y1, x2, y2 in pixels from the left and the top.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

Mask = tuple[np.ndarray, ...] | np.ndarray
"""A tuple is polygons, float64 (points, 2) as x, y; an array is runs, uint32, down the columns, the first one outside."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AnnotatedImage:
    """One image; ``path`` is relative to the set's folder."""

    path: str
    width: int
    height: int
    boxes: np.ndarray
    """float32 (n, 4), each inside the image and with an area."""
    labels: np.ndarray
    """int64 (n,), from 0."""
    difficult: np.ndarray
    """bool (n,): VOC's objects that no one is asked to find."""
    crowd: np.ndarray
    """bool (n,): COCO's regions of many objects."""
    masks: tuple[Mask, ...] | None
    """n of them, still encoded; None in VOC."""


class AnnotatedImages(Sequence):
    """The images of a split. COCO's train is a dozen arrays here, and a million objects to pickle as a list.

    An image is made when it is asked for; its arrays are views.
    """

    def __init__(self, images: Iterable[AnnotatedImage]) -> None:
        images = list(images)
        self.paths = np.array([image.path for image in images], str)
        self.sizes = np.array([(image.height, image.width) for image in images], np.int32).reshape(-1, 2)
        self.objects = _offsets(len(image.labels) for image in images)
        self.boxes = _joined([image.boxes for image in images], np.empty((0, 4), np.float32))
        self.labels = _joined([image.labels for image in images], np.empty(0, np.int64))
        self.flags = _joined([np.stack([image.difficult, image.crowd], 1) for image in images], np.empty((0, 2), bool))
        self.masked = any(image.masks is not None for image in images)
        masks = [mask for image in images for mask in image.masks or ()]
        polygons = [() if isinstance(mask, np.ndarray) else mask for mask in masks]
        self.polygons = _offsets(map(len, polygons))  # of each object, none where it has runs
        parts = [part for polygon in polygons for part in polygon]
        self.parts = _offsets(map(len, parts))
        self.points = _joined(parts, np.empty((0, 2)))
        runs = [mask if isinstance(mask, np.ndarray) else np.empty(0, np.uint32) for mask in masks]
        self.run_offsets, self.runs = _offsets(map(len, runs)), _joined(runs, np.empty(0, np.uint32))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> AnnotatedImage:
        index = range(len(self))[operator.index(index)]
        height, width = self.sizes[index].tolist()
        mine = slice(*self.objects[index : index + 2].tolist())
        return AnnotatedImage(
            path=str(self.paths[index]),
            width=width,
            height=height,
            boxes=self.boxes[mine],
            labels=self.labels[mine],
            difficult=self.flags[mine, 0],
            crowd=self.flags[mine, 1],
            masks=tuple(map(self._mask, range(mine.start, mine.stop))) if self.masked else None,
        )

    def _mask(self, number: int) -> Mask:
        first, end = self.polygons[number : number + 2].tolist()
        if first == end:
            return self.runs[slice(*self.run_offsets[number : number + 2].tolist())]
        return tuple(self.points[slice(*self.parts[part : part + 2].tolist())] for part in range(first, end))


def _offsets(lengths: Iterable[int]) -> np.ndarray:
    """int64: where each begins, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(np.fromiter(lengths, np.int64), dtype=np.int64)])


def _joined(arrays: list[np.ndarray], empty: np.ndarray) -> np.ndarray:
    return np.concatenate([empty, *arrays])
