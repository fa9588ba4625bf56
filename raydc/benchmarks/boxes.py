"""Readers of detection sets, VOC and COCO, from the folders their publishers ship, and their masks. Neither Ray nor torch.

n objects of one image of H x W pixels. Boxes are x1, y1, x2, y2 in pixels from the left and the top. In VOC x2 is the last
pixel (the XML's integers minus 1, as in the reference), in COCO the right edge (x + w).
"""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from raydc.benchmarks.annotations import AnnotatedImage, AnnotatedImages, Mask
from raydc.benchmarks.datasets import IMAGES, LISTS, VOC_CLASSES
from raydc.config import UsageError
from raydc.data.decode import UnreadableImage, decode
from raydc.storage import Folder

ANNOTATIONS = "Annotations"
VOC_YEARS = ("VOC2007", "VOC2012")
VOC_SPLITS = ("train", "val", "trainval", "test")
COCO_SPLITS = ("train", "val")
CORNERS = ("xmin", "ymin", "xmax", "ymax")
FINE = 5  # pycocotools draws polygons on a grid this much finer than the pixels
NUM_THREADS = 16  # they wait for files, not for the processor
COUNTED = {
    "empty": "image(s) have no objects",
    "without_area": "object(s) have a box without area and are left out",
    "without_mask": "object(s) have no outline of three points or more and are left out",
    "clipped": "box(es) reach over the edge of their image and are cut there",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class DetectionSet:
    """One split. ``notes`` says in words what the counts say in numbers, and which years are missing."""

    folder: Folder
    split: str
    classes: tuple[str, ...]
    images: AnnotatedImages
    notes: tuple[str, ...]
    num_empty: int
    num_without_area: int
    num_without_mask: int
    num_clipped: int


@dataclass(frozen=True, kw_only=True)
class _Object:
    """As the file has it; ``what`` names it in messages."""

    what: str
    box: tuple[float, float, float, float]
    label: int
    difficult: bool = False
    crowd: bool = False
    mask: Mask | None = None


# --- VOC


def read_voc_detection(
    folder: Folder | os.PathLike | str, years: Sequence[str] = VOC_YEARS, split: str = "trainval"
) -> DetectionSet:
    """The split of each of ``years`` in ``folder``, which holds VOC2007 and VOC2012 or one of them (or is one).

    Of the test splits only VOC2007's has public objects, so test is VOC2007's alone. UsageError where a devkit is not whole.
    """
    folder = as_folder(folder)
    _check_split(split, VOC_SPLITS)
    asked = [year for year in years if split != "test" or year == "VOC2007"]
    found = {year: place for year in asked if (place := _find_year(folder, year)) is not None}
    if not found:
        raise UsageError(
            f"{folder.uri} holds no {' or '.join(asked or ['VOC2007'])} with {split}; give the folder that the VOC archives "
            "unpack VOC2007 and VOC2012 to"
        )
    counts: Counter[str] = Counter()
    images = [image for place in found.values() for image in _read_year(folder, place, split, counts)]
    notes = [f"{year} is not in {folder.uri}; {split} is {' and '.join(found)} alone" for year in asked if year not in found]
    return _detection_set(folder, split, VOC_CLASSES, images, counts, notes)


def _find_year(folder: Folder, year: str) -> str | None:
    """What leads from the folder to the year's devkit, with a slash at its end; None where it is not there."""
    if folder.root.rpartition("/")[2] == year and folder.exists(IMAGES):
        return ""
    return next((f"{place}/" for place in (year, f"VOCdevkit/{year}") if folder.exists(place)), None)


def _read_year(folder: Folder, place: str, split: str, counts: Counter) -> list[AnnotatedImage]:
    ids = read_names(folder, f"{place}{LISTS}/{split}.txt")
    for part, extension in ((IMAGES, ".jpg"), (ANNOTATIONS, ".xml")):
        check_files(folder, [f"{place}{part}/{image}{extension}" for image in ids], f"{split}'s list names")
    files = [f"{place}{ANNOTATIONS}/{image}.xml" for image in ids]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        texts = pool.map(folder.read, files)
        return [
            _read_xml(text, folder.path(file), f"{place}{IMAGES}/{image}.jpg", counts)
            for text, file, image in zip(texts, files, ids, strict=True)
        ]


def _read_xml(text: bytes, file: str, path: str, counts: Counter) -> AnnotatedImage:
    try:
        root = ET.fromstring(text)
        width, height = (int(root.findtext(f"size/{side}", "")) for side in ("width", "height"))
        objects = [_voc_object(one, f"object {n} of {file}") for n, one in enumerate(root.iterfind("object"), 1)]
    except (ET.ParseError, ValueError, OverflowError) as error:
        raise UsageError(
            f"{file} is no VOC annotation with a size and objects with boxes ({error}); unpack the devkit again"
        ) from None
    _check_size(width, height, path, file)
    return _annotated(path, width, height, objects, counts)


def _voc_object(one: ET.Element, what: str) -> _Object:
    """A corner may be written as 45.7 (VOC2012 has some): the reference cuts it to 45."""
    name = one.findtext("name", "").strip()
    if name not in VOC_CLASSES:
        raise UsageError(f"{what} is a {name!r}, which is none of VOC's 20 classes; correct its name or remove the object")
    x1, y1, x2, y2 = (int(float(one.findtext(f"bndbox/{corner}", "nothing"))) - 1 for corner in CORNERS)
    difficult = int(one.findtext("difficult", "0")) != 0
    return _Object(what=what, box=(x1, y1, x2, y2), label=VOC_CLASSES.index(name), difficult=difficult)


# --- COCO


def read_coco(folder: Folder | os.PathLike | str, split: str) -> DetectionSet:
    """``split``, train or val, of COCO 2017: annotations/instances_SPLIT2017.json and the images of SPLIT2017.

    Classes are numbered from 0 in the order of the file's categories. UsageError where files are missing or contradict
    themselves.
    """
    folder = as_folder(folder)
    _check_split(split, COCO_SPLITS)
    name = f"annotations/instances_{split}2017.json"
    content = _read_json(folder, name)
    place, counts = folder.path(name), Counter()
    images = _by_id(content["images"], place)
    check_files(folder, [f"{split}2017/{image['file_name']}" for image in images.values()], f"{place} lists")
    classes = _by_id(content["categories"], place)
    dense = {identity: label for label, identity in enumerate(classes)}
    of_image = _group(content["annotations"], images, dense, place)
    annotated = [
        _coco_image(image, f"{split}2017", of_image.get(identity, ()), dense, counts, place)
        for identity, image in images.items()
    ]
    if counts["without_mask"] and not any(len(image.boxes) for image in annotated):
        raise UsageError(f"no object of {place} has an outline (segmentation), only boxes; give the instance annotations")
    return _detection_set(folder, split, tuple(str(one["name"]) for one in classes.values()), annotated, counts, [])


def _read_json(folder: Folder, name: str) -> dict:
    """The file's content, with every field that is needed checked to be there."""
    place = folder.path(name)
    if not folder.exists(name):
        raise UsageError(f"{place} does not exist; give the folder that holds COCO's annotations, train2017 and val2017")
    fields = {
        "images": ("id", "file_name", "width", "height"),
        "annotations": ("id", "image_id", "category_id", "bbox"),
        "categories": ("id", "name"),
    }
    try:
        content = json.loads(folder.read(name))
        for part, needed in fields.items():
            for one in content[part]:
                for key in needed:
                    one[key]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{place} is no file of COCO instances ({error!r}); unpack the annotations again") from None
    return content


def _by_id(entries: list[dict], place: str) -> dict:
    """In the file's order."""
    found = {one["id"]: one for one in entries}
    if len(found) < len(entries) or not entries:
        repeated = next((one for one, number in Counter(one["id"] for one in entries).items() if number > 1), None)
        said = f"has two entries with the id {repeated}" if entries else "lists no images or no categories"
        raise UsageError(f"{place} {said}; unpack the annotations again")
    return found


def _group(annotations: list[dict], images: dict, dense: dict, place: str) -> dict[int, list[dict]]:
    """Annotations of each image."""
    of_image: dict[int, list[dict]] = {}
    for one in annotations:
        for key, known in (("image_id", images), ("category_id", dense)):
            if one[key] not in known:
                raise UsageError(
                    f"annotation {one['id']} of {place} has the {key} {one[key]}, which the file does not list; "
                    "unpack the annotations again, or remove it"
                )
        of_image.setdefault(one["image_id"], []).append(one)
    return of_image


def _coco_image(
    image: dict, prefix: str, annotations: Iterable[dict], dense: dict, counts: Counter, place: str
) -> AnnotatedImage:
    width, height, path = image["width"], image["height"], f"{prefix}/{image['file_name']}"
    _check_size(width, height, path, place)
    objects = []
    for one in annotations:
        what = f"annotation {one['id']} of {place}"
        try:
            objects.append(_coco_object(one, dense[one["category_id"]], height, width, what))
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise UsageError(f"{what} has no box x, y, w, h or no proper outline ({error}); correct it") from None
    kept = [one for one in objects if one.mask is not None]
    counts["without_mask"] += len(objects) - len(kept)
    return _annotated(path, width, height, kept, counts, masked=True)


def _coco_object(one: dict, label: int, height: int, width: int, what: str) -> _Object:
    x, y, w, h = map(float, one["bbox"])
    mask = _encoded(one.get("segmentation") or [], height, width, what)
    return _Object(what=what, box=(x, y, x + w, y + h), label=label, crowd=bool(one.get("iscrowd", 0)), mask=mask)


def _encoded(segmentation: dict | list, height: int, width: int, what: str) -> Mask | None:
    """Of polygons those with three points or more; None where there is none."""
    if isinstance(segmentation, dict):
        return _checked_runs(segmentation, height, width, what)
    polygons = [np.array(one, np.float64) for one in segmentation if len(one) >= 6 and len(one) % 2 == 0]
    if not all(np.isfinite(one).all() for one in polygons):
        raise ValueError("a corner is no number")
    size = np.array([width, height])
    # a corner absurdly far outside must not become a line of 10^9 points
    return tuple(np.clip(one.reshape(-1, 2), -size, 2 * size) for one in polygons) or None


def _checked_runs(rle: dict, height: int, width: int, what: str) -> np.ndarray:
    if isinstance(rle["counts"], str):
        raise UsageError(f"{what} has compressed runs, which are not read; store counts as a list of numbers")
    runs = np.array(rle["counts"], np.int64)
    if list(rle["size"]) != [height, width] or runs.min(initial=0) < 0 or runs.sum() != height * width:
        raise UsageError(
            f"{what} has a mask of {rle['size']} with {runs.sum():,} pixels, its image is {height} x {width}; "
            "unpack the annotations again, or correct it"
        )
    return runs.astype(np.uint32)


# --- what both have


def _annotated(
    path: str, width: int, height: int, objects: list[_Object], counts: Counter, *, masked: bool = False
) -> AnnotatedImage:
    """Without the objects whose boxes have no area."""
    kept = [(one, box) for one in objects if (box := _inside(one, width, height, counts)) is not None]
    counts["empty"] += not kept
    return AnnotatedImage(
        path=path,
        width=width,
        height=height,
        boxes=np.array([box for _, box in kept], np.float32).reshape(-1, 4),
        labels=np.array([one.label for one, _ in kept], np.int64),
        difficult=np.array([one.difficult for one, _ in kept], bool),
        crowd=np.array([one.crowd for one, _ in kept], bool),
        masks=tuple(one.mask for one, _ in kept) if masked else None,
    )


def _check_size(width: int, height: int, path: str, place: str) -> None:
    if not (isinstance(width, int) and isinstance(height, int) and min(width, height) >= 1):
        raise UsageError(f"{place} says that {path} is {width!r} x {height!r} pixels; correct it, or unpack it again")


def _inside(one: _Object, width: int, height: int, counts: Counter) -> np.ndarray | None:
    """The box cut to its image, float32 (4,); None without an area, as VOC's boxes of one pixel's width have none here."""
    box = np.array(one.box, np.float32)
    if not (box[2:] > box[:2]).all():
        counts["without_area"] += 1
        return None
    cut = np.clip(box, 0, np.array([width, height] * 2, np.float32))
    if not (cut[2:] > cut[:2]).all():
        raise UsageError(
            f"{one.what} has the box {[round(float(side), 1) for side in box]}, outside its image of {width} x {height}; "
            "annotations and images belong to different sets or sizes, or the box must be corrected"
        )
    counts["clipped"] += bool((cut != box).any())
    return cut


def _detection_set(folder, split, classes, images: list[AnnotatedImage], counts: Counter, notes: list[str]) -> DetectionSet:
    notes = notes + [f"{counts[key]:,} {phrase}" for key, phrase in COUNTED.items() if counts[key]]
    numbers = {f"num_{key}": counts[key] for key in COUNTED}
    return DetectionSet(
        folder=folder, split=split, classes=classes, images=AnnotatedImages(images), notes=tuple(notes), **numbers
    )


def as_folder(folder: Folder | os.PathLike | str) -> Folder:
    folder = folder if isinstance(folder, Folder) else Folder(folder)
    if not folder.exists():
        raise UsageError(f"{folder.uri} does not exist; give the folder that the set's archives unpack to")
    return folder


def _check_split(split: str, splits: tuple[str, ...]) -> None:
    if split not in splits:
        raise UsageError(f"there is no split {split!r}; give {', '.join(splits)}")


def read_names(folder: Folder, name: str) -> list[str]:
    """One name a line, in the file's order."""
    place = folder.path(name)
    if not folder.exists(name):
        raise UsageError(f"{place} does not exist; unpack the archive that holds it into the same folder")
    names = folder.read(name).decode("utf-8", "replace").split("\n")
    names = [line.strip() for line in names if line.strip()]
    odd = next((line for line, number in Counter(names).items() if number > 1 or len(line.split()) > 1), None)
    if odd or not names:
        said = f"has the line {odd[:60]!r}" if odd else "is empty"
        raise UsageError(f"{place} {said}; it takes one name a line, each once: unpack the lists again")
    return names


def check_files(folder: Folder, paths: list[str], who: str) -> None:
    """UsageError that counts the files that are not there; each folder is listed once."""
    inside = {place: set(folder.names(place)) for place in {path.rpartition("/")[0] for path in paths}}
    missing = [path for path in paths if path.rpartition("/")[2] not in inside[path.rpartition("/")[0]]]
    if missing:
        raise UsageError(
            f"{len(missing):,} of {len(paths):,} files that {who} are not there, first {folder.path(missing[0])}; "
            "unpack the archive that holds them into the same folder"
        )


def image_size(folder: Folder, path: str) -> tuple[int, int]:
    """H, W of the pixels as stored. The whole image is decoded: one that ends early is a UsageError here, and not later."""
    try:
        return decode(folder.read(path)).shape[:2]
    except (UnreadableImage, OSError) as error:
        raise UsageError(f"{folder.path(path)} cannot be read as an image ({error}); unpack it again") from None


def check_images(dataset: DetectionSet) -> None:
    """Every image can be opened and has the size its annotation states, else UsageError; before a run rather than in it."""

    def fault(one: AnnotatedImage) -> str | None:
        found = image_size(dataset.folder, one.path)
        stated = one.height, one.width
        return None if found == stated else f"is {found[0]} x {found[1]} and annotated as {stated[0]} x {stated[1]}"

    refuse_faults(dataset.folder, [one.path for one in dataset.images], lambda n: fault(dataset.images[n]))


def refuse_faults(folder: Folder, paths: Sequence[str], fault: Callable[[int], str | None]) -> None:
    """UsageError with the first fault and their number; ``fault`` of a row is a phrase, or a UsageError of its own."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        found = [(path, said) for path, said in zip(paths, pool.map(fault, range(len(paths))), strict=True) if said]
    if found:
        path, said = found[0]
        more = f" (and {len(found) - 1:,} more of {len(paths):,} are like it)" if len(found) > 1 else ""
        raise UsageError(f"{folder.path(path)} {said} (height x width){more}; images and annotations must be of one size")


# --- masks


def decode_masks(image: AnnotatedImage) -> np.ndarray:
    """uint8 (n, H, W), 1 inside; the polygons of one object are joined."""
    if image.masks is None:
        raise ValueError(f"{image.path} has boxes only")
    masks = np.zeros((len(image.masks), image.height, image.width), np.uint8)
    for mask, encoded in zip(masks, image.masks, strict=True):
        if isinstance(encoded, np.ndarray):
            mask[:] = fill_runs(encoded, image.height, image.width)
        else:
            for polygon in encoded:
                mask |= fill_polygon(polygon, image.height, image.width)
    return masks


def fill_runs(runs: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (H, W) from lengths that are by turns outside and inside, down the first column, then the next."""
    inside = np.arange(len(runs), dtype=np.uint8) % 2
    return np.repeat(inside, runs).reshape(width, height).T


def fill_polygon(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (H, W) from (points, 2) as x, y: pixels whose centre is inside, to a fifth of a pixel.

    The same pixels as pycocotools gives (its rleFrPoly), so that a mask AP can be the same.
    """
    x, y = _walk(np.trunc(points * FINE + 0.5))
    # a pixel's centre is FINE / 2 = 2.5: an outline that steps from 2 to 3 crosses that column of pixels
    stepped = x[1:] != x[:-1]
    columns = np.minimum(x[1:], x[:-1])[stepped] - FINE // 2
    rows = -((FINE // 2 - np.minimum(y[1:], y[:-1])[stepped]) // FINE)  # rounded up
    columns, rows = columns[columns % FINE == 0] // FINE, rows[columns % FINE == 0]
    seen = (columns >= 0) & (columns < width)
    places = columns[seen] * height + np.clip(rows[seen], 0, height)
    crossed = np.bincount(places, minlength=height * width + 1)[: height * width]
    return (np.cumsum(crossed, dtype=np.uint8) & 1).reshape(width, height).T


def _walk(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x and y, int64, of every grid point of the closed outline; an edge has the same points in both directions."""
    start, end = corners, np.roll(corners, -1, axis=0)
    wide = np.abs(end - start)[:, 0] >= np.abs(end - start)[:, 1]
    major = np.where(wide, 0, 1)
    rows = np.arange(len(corners))
    backwards = start[rows, major] > end[rows, major]
    low, high = np.where(backwards[:, None], end, start), np.where(backwards[:, None], start, end)
    length = (high - low)[rows, major]
    slope = (high - low)[rows, 1 - major] / np.maximum(length, 1)

    edge = np.repeat(rows, length.astype(np.int64) + 1)
    step = np.arange(len(edge)) - np.searchsorted(edge, edge)
    step = np.where(backwards[edge], length[edge] - step, step)
    along = low[edge, major[edge]] + step
    across = np.trunc(low[edge, 1 - major[edge]] + slope[edge] * step + 0.5)
    x, y = np.where(wide[edge], along, across), np.where(wide[edge], across, along)
    return x.astype(np.int64), y.astype(np.int64)
