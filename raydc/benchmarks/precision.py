"""The metrics of detection and segmentation, in percent: COCO's AP, VOC2007's 11-point AP and mIoU. Neither Ray nor torch.

n objects or detections of one image of H x W pixels, N and M detections and objects of all images; K classes. Figures have
the names of the scorecard's columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from faster_coco_eval import COCO
from faster_coco_eval.core import mask as coco_masks
from faster_coco_eval.core.faster_eval_api import COCOeval_faster

from raydc.benchmarks.annotations import AnnotatedImage, Mask
from raydc.benchmarks.masks import IGNORE_MASK
from raydc.config import RunError

COCO_FIGURES = ("AP", "AP50", "AP75")  # the first three of COCO's summary, in its order
VOC_OVERLAPS = tuple(range(50, 100, 5))  # percent
VOC_POINTS = 11


@dataclass(frozen=True, kw_only=True, eq=False)
class Masks:
    """n masks of one image, run-length encoded: kilobytes where the pixels are megabytes."""

    height: int
    width: int
    runs: tuple[bytes, ...]
    """COCO's compressed runs, one for each mask."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Detections:
    """What a detector found in one image, in the image's own pixels. RunError where it is not made of numbers."""

    boxes: np.ndarray
    """float32 (n, 4): x1, y1, x2, y2, as the annotations have them."""
    scores: np.ndarray
    """float32 (n,), falling or not."""
    labels: np.ndarray
    """int64 (n,), from 0."""
    masks: Masks | None = None

    def __post_init__(self) -> None:
        n = len(self.scores)
        num_masks = n if self.masks is None else len(self.masks.runs)
        if self.boxes.shape != (n, 4) or self.scores.shape != (n,) or self.labels.shape != (n,) or num_masks != n:
            raise ValueError(
                f"boxes {self.boxes.shape}, scores {self.scores.shape}, labels {self.labels.shape} and {num_masks} masks "
                "are not of the same detections"
            )
        if not (np.isfinite(self.boxes).all() and np.isfinite(self.scores).all()):
            raise RunError(
                "the detector's boxes or scores are not finite numbers: its training has diverged; train it again with a "
                "lower learning rate"
            )


def encode(masks_nHW: np.ndarray) -> Masks:
    """The masks, bool or uint8 of 0 and 1, without their pixels."""
    if masks_nHW.ndim != 3 or masks_nHW.dtype not in (np.bool_, np.uint8):
        raise ValueError(f"masks are {masks_nHW.dtype} {masks_nHW.shape}; give bool or uint8 of n, H, W")
    n, height, width = masks_nHW.shape
    pixels = np.asfortranarray(masks_nHW.transpose(1, 2, 0).astype(np.uint8))
    runs = tuple(one["counts"] for one in coco_masks.encode(pixels)) if n else ()
    return Masks(height=height, width=width, runs=runs)


# --- COCO


def coco_precision(found: Sequence[Detections], true: Sequence[AnnotatedImage], *, masks: bool) -> dict[str, float]:
    """AP (mean over IoU .5 to .95), AP50 and AP75 of boxes; with ``masks`` also "mask AP", "mask AP50", "mask AP75".

    Of an image at most 100 detections a class count. A detection that lies on a crowd region or a difficult object (its
    overlap is measured as a share of the detection) counts neither way; classes without any other object are in no mean.
    Widths are x2 - x1. RunError where there is no object to find.
    """
    _check_pairs(found, true)
    sizes = [{"id": number, "height": one.height, "width": one.width} for number, one in enumerate(true, 1)]
    classes = [{"id": label, "name": str(label)} for label in np.flatnonzero(_count_objects(true)).tolist()]
    truth = _index(sizes, classes, (_objects(one, number, masks) for number, one in enumerate(true, 1)))
    answer = _index(sizes, classes, (_answers(one, size, masks) for one, size in zip(found, sizes, strict=True)))
    figures = {}
    for kind, prefix in (("bbox", ""), ("segm", "mask "))[: 2 if masks else 1]:
        evaluation = COCOeval_faster(truth, answer, kind)
        evaluation.run()
        figures |= {prefix + name: 100 * float(value) for name, value in zip(COCO_FIGURES, evaluation.stats, strict=False)}
    return figures


def _ignored(image: AnnotatedImage) -> np.ndarray:
    return image.crowd | image.difficult


def _count_objects(true: Sequence[AnnotatedImage]) -> np.ndarray:
    """int64 (K,): objects of each class that are to be found; K ends with the last class that has one."""
    labels = [one.labels[~_ignored(one)] for one in true]
    if not sum(map(len, labels)):
        raise RunError(
            f"the {len(true):,} images of the split have no object that is to be found (crowds and difficult ones are not), "
            "so no precision can be measured; give a split with annotated objects"
        )
    return np.bincount(np.concatenate(labels))


def _check_pairs(found: Sequence[Detections], true: Sequence[AnnotatedImage]) -> None:
    if len(found) != len(true):
        raise ValueError(f"detections of {len(found):,} images and annotations of {len(true):,} are not of the same images")


def _index(sizes: list[dict], classes: list[dict], entries: Iterable[list[dict]]) -> COCO:
    entries = [entry | {"id": number} for number, entry in enumerate((one for some in entries for one in some), 1)]
    return COCO({"images": sizes, "categories": classes, "annotations": entries})


def _objects(image: AnnotatedImage, number: int, masks: bool) -> list[dict]:
    columns = {"iscrowd": _ignored(image).astype(int).tolist()}
    if masks:
        if image.masks is None:
            raise ValueError(f"{image.path} has boxes only, no masks to compare with")
        columns["segmentation"] = [_outline(mask, image.height, image.width) for mask in image.masks]
    return _entries(number, image.boxes, image.labels, columns)


def _outline(mask: Mask, height: int, width: int) -> dict | list:
    if isinstance(mask, np.ndarray):
        return {"size": [height, width], "counts": mask.tolist()}
    return [polygon.ravel().tolist() for polygon in mask]


def _answers(found: Detections, size: dict, masks: bool) -> list[dict]:
    columns = {"score": found.scores.tolist(), "iscrowd": [0] * len(found.scores)}
    if masks and len(found.scores):
        columns["segmentation"] = _segmentations(found.masks, [size["height"], size["width"]])
    return _entries(size["id"], found.boxes, found.labels, columns)


def _segmentations(masks: Masks | None, size: list[int]) -> list[dict]:
    """ValueError for masks of another size than the image, which would silently overlap with nothing."""
    if masks is None or [masks.height, masks.width] != size:
        what = "no masks" if masks is None else f"masks of {masks.height} x {masks.width}"
        raise ValueError(f"detections have {what} in an image of {size[0]} x {size[1]} (height x width)")
    return [{"size": size, "counts": one} for one in masks.runs]


def _entries(number: int, boxes: np.ndarray, labels: np.ndarray, columns: dict[str, list]) -> list[dict]:
    corners, sides = boxes[:, :2].astype(np.float64), np.diff(boxes.reshape(-1, 2, 2).astype(np.float64), axis=1)[:, 0]
    columns = columns | {
        "bbox": np.hstack([corners, sides]).tolist(),
        "area": sides.prod(1).tolist(),
        "category_id": labels.tolist(),
    }
    rows = zip(*columns.values(), strict=True)
    return [dict(zip(columns, row, strict=True), image_id=number) for row in rows]


# --- VOC2007


def voc07_precision(found: Sequence[Detections], true: Sequence[AnnotatedImage], num_classes: int) -> dict[str, float]:
    """11-point AP at IoU .5 and .75, and its mean over .5 to .95; x2 and y2 are the last pixels (VOC2007's devkit).

    Means are over classes with an object to find. A detection belongs to the object of its class that it overlaps most,
    and is wrong if one of a higher score took it already; on a difficult object it counts neither way. RunError where
    there is no object to find.
    """
    _check_pairs(found, true)
    num_objects = _count_objects(true)
    boxes, keys = _flatten(found, num_classes)
    objects, object_keys = _flatten(true, num_classes)
    overlap, nearest = _match(boxes, keys, objects, object_keys)
    ignored = np.append(np.concatenate([_ignored(one) for one in true]), False)[nearest]
    falling = np.argsort(-np.concatenate([one.scores for one in found]), kind="stable")
    overlap, nearest, ignored, labels = overlap[falling], nearest[falling], ignored[falling], keys[falling] % num_classes

    def at(least: float) -> float:
        hit = overlap >= least
        counted = ~(hit & ignored)
        correct = _first_hits(hit[counted], nearest[counted])
        classes = labels[counted]
        points = [_eleven_points(correct[classes == one], num_objects[one]) for one in np.flatnonzero(num_objects)]
        return 100 * float(np.mean(points))

    every = {least: at(least / 100) for least in VOC_OVERLAPS}
    return {"VOC07 AP50": every[50], "VOC07 AP": float(np.mean(list(every.values()))), "VOC07 AP75": every[75]}


def _first_hits(hit_N: np.ndarray, nearest_N: np.ndarray) -> np.ndarray:
    """bool (N,): of those that hit an object, the first."""
    hits = np.flatnonzero(hit_N)
    first = np.zeros(len(hit_N), bool)
    first[hits[np.unique(nearest_N[hits], return_index=True)[1]]] = True
    return first


def _flatten(images: Sequence[Detections] | Sequence[AnnotatedImage], num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes, float64 (N, 4), and their keys, int64 (N,), equal for the same class in the same image."""
    labels = np.concatenate([one.labels for one in images])
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(f"labels reach from {labels.min()} to {labels.max()}, classes from 0 to {num_classes - 1}")
    place = np.repeat(np.arange(len(images)), [len(one.labels) for one in images])
    return np.concatenate([one.boxes for one in images]).astype(np.float64), place * num_classes + labels.astype(np.int64)


def _match(boxes_N4, keys_N, objects_M4, keys_M) -> tuple[np.ndarray, np.ndarray]:
    """Of each box the largest overlap with an object of the same key, and that object's row; 0 and -1 without any."""
    order = np.argsort(keys_M, kind="stable")
    start, end = (np.searchsorted(keys_M[order], keys_N, side) for side in ("left", "right"))
    number = end - start
    box = np.repeat(np.arange(len(boxes_N4)), number)  # one row for each pair of a box and an object
    step = np.arange(len(box)) - np.repeat(np.cumsum(number) - number, number)
    thing = order[start[box] + step]
    overlap = _overlap(boxes_N4[box], objects_M4[thing])
    best = np.lexsort((-overlap, box))
    rows, first = np.unique(box[best], return_index=True)
    overlap_N, nearest_N = np.zeros(len(boxes_N4)), np.full(len(boxes_N4), -1)
    overlap_N[rows], nearest_N[rows] = overlap[best[first]], thing[best[first]]
    return overlap_N, nearest_N


def _overlap(boxes_N4: np.ndarray, others_N4: np.ndarray) -> np.ndarray:
    """IoU of each pair, with both corners' pixels inside."""
    low, high = np.maximum(boxes_N4[:, :2], others_N4[:, :2]), np.minimum(boxes_N4[:, 2:], others_N4[:, 2:])
    shared = _area(low, high)
    return shared / (_area(boxes_N4[:, :2], boxes_N4[:, 2:]) + _area(others_N4[:, :2], others_N4[:, 2:]) - shared)


def _area(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return np.maximum(high - low + 1, 0).prod(1)


def _eleven_points(correct_N: np.ndarray, num_objects: int) -> float:
    """Mean over recalls of 0, .1, ... 1 of the best precision from there on; detections by falling score."""
    hits = np.cumsum(correct_N)
    precision = hits / np.arange(1, len(hits) + 1)
    # in whole numbers: 3 hits of 10 reach a recall of .3, which 3 * .1 > .3 would deny
    reached = [hits * (VOC_POINTS - 1) >= point * num_objects for point in range(VOC_POINTS)]
    return float(np.mean([precision[one].max(initial=0) for one in reached]))


# --- segmentation


def confusion(predicted_HW: np.ndarray, labels_HW: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 (K, K): pixels by true class (row) and predicted class (column), without those labelled 255; add them up."""
    if predicted_HW.shape != labels_HW.shape:
        raise ValueError(f"predictions {predicted_HW.shape} and labels {labels_HW.shape} are not of the same pixels")
    counted = labels_HW != IGNORE_MASK
    labels, predicted = labels_HW[counted].astype(np.int64), predicted_HW[counted]
    highest = max(labels.max(initial=0), predicted.max(initial=0))
    if highest >= num_classes:
        raise ValueError(f"a label or prediction is {highest}; there are {num_classes} classes, from 0")
    return np.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def per_class(matrix_KK: np.ndarray) -> np.ndarray:
    """IoU of each class in percent, float64 (K,); NaN for a class that is neither in truth nor in prediction."""
    both = np.diag(matrix_KK)
    either = matrix_KK.sum(0) + matrix_KK.sum(1) - both
    return np.divide(100 * both, either, out=np.full(len(both), np.nan), where=either > 0)


def mean_iou(matrix_KK: np.ndarray) -> float:
    """mIoU in percent over the classes in truth or prediction; RunError without any labelled pixel."""
    if not matrix_KK.any():
        raise RunError("the split has no labelled pixel, so no mIoU can be measured; give a split with label images")
    return float(np.nanmean(per_class(matrix_KK)))
