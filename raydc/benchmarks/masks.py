"""Readers of segmentation sets: VOC2012 with SBD, Cityscapes, CamVid and `image mask` lists. Neither Ray nor torch.

A label image of H x W pixels holds ids; a set's table makes train ids of them, which number the classes from 0.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from raydc.benchmarks.boxes import NUM_THREADS, as_folder, check_files, image_size, read_names, refuse_faults
from raydc.benchmarks.datasets import IMAGES, VOC_CLASSES
from raydc.config import UsageError
from raydc.storage import Folder

IGNORE_MASK = 255  # the ignored train id, and VOC's id of an object's rim
UNKNOWN = -1  # in a table: an id that the set does not have
SPLITS = ("train", "val")
DEVKITS = ("", "VOC2012", "VOCdevkit/VOC2012")
LISTS = "ImageSets/Segmentation"
AUG_LISTS = ("aug", "trainaug", "train_aug")  # the first is the reference's, the others go around with train's names in them
# fmt: off
VOC_MASK_CLASSES = ("background", *VOC_CLASSES)
CAMVID_CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "signsymbol", "fence", "car", "pedestrian", "bicyclist",
)
CAMVID_VOID = 11
CITYSCAPES_CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # of the classes, in order
CITYSCAPES_NUM_IDS = 34
# fmt: on


@dataclass(frozen=True, kw_only=True, eq=False)
class SegmentationSet:
    """One split of N images; ``images`` and ``labels`` are paths relative to ``folder``."""

    folder: Folder
    split: str
    classes: tuple[str, ...]
    images: tuple[str, ...]
    labels: tuple[str, ...]
    table: np.ndarray
    """int16 (256,): the train id of an id in a label image, ``ignore``, or UNKNOWN."""
    notes: tuple[str, ...] = ()
    ignore: int = IGNORE_MASK


def make_table(ids: Sequence[int], ignored: Sequence[int] = (IGNORE_MASK,)) -> np.ndarray:
    """int16 (256,): ``ids`` become 0, 1, 2, ..., the ``ignored`` IGNORE_MASK, all others UNKNOWN."""
    table = np.full(256, UNKNOWN, np.int16)
    table[list(ignored)] = IGNORE_MASK
    table[list(ids)] = np.arange(len(ids))
    return table


# --- VOC2012 with the masks of SBD


def read_voc12_aug(folder: Folder | os.PathLike | str) -> dict[str, SegmentationSet]:
    """train (train.txt and aug.txt, together 10,582 names) and val of a VOC2012 devkit, or of a folder that holds it.

    Names of train.txt have their masks in SegmentationClass, those of aug.txt alone in SegmentationClassAug. UsageError
    where files are missing, or aug.txt has images of val.
    """
    devkit = _find_devkit(as_folder(folder))
    fine, val = (read_names(devkit.child(LISTS), f"{split}.txt") for split in SPLITS)
    aug, notes = _read_aug(devkit.child(LISTS), fine, val)
    train_labels = [f"SegmentationClass/{name}.png" for name in fine] + [f"SegmentationClassAug/{name}.png" for name in aug]
    table = make_table(range(len(VOC_MASK_CLASSES)))
    return {
        "train": _voc_set(devkit, "train", fine + aug, train_labels, table, notes),
        "val": _voc_set(devkit, "val", val, [f"SegmentationClass/{name}.png" for name in val], table, ()),
    }


def _find_devkit(folder: Folder) -> Folder:
    for place in DEVKITS:
        devkit = folder.child(place) if place else folder
        if devkit.exists(IMAGES) and devkit.exists(LISTS):
            return devkit
    raise UsageError(
        f"{folder.uri} has no {IMAGES} and {LISTS}; give the folder VOC2012 that VOCtrainval_11-May-2012.tar unpacks to, "
        "or the one above it"
    )


def _read_aug(lists: Folder, fine: list[str], val: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Names that only the augmented list has, and notes."""
    name = next((f"{name}.txt" for name in AUG_LISTS if lists.exists(f"{name}.txt")), None)
    if name is None:
        return [], (f"{lists.uri} has no aug.txt: train is train.txt alone, without SBD's images",)
    known, names = set(fine), read_names(lists, name)
    leaked = sorted((known | set(names)) & set(val))
    if leaked:
        raise UsageError(
            f"{len(leaked):,} images of val are in train.txt or {name} of {lists.uri}, first {leaked[0]}; SBD's own lists "
            "have images of VOC's val: take a list without them (10,582 names with train.txt)"
        )
    aug = [one for one in names if one not in known]
    return aug, () if aug else (f"{name} has no image that train.txt has not: train is train.txt alone",)


def _voc_set(devkit: Folder, split: str, names: list[str], labels: list[str], table, notes) -> SegmentationSet:
    images = [f"{IMAGES}/{name}.jpg" for name in names]
    return _checked_set(devkit, split, VOC_MASK_CLASSES, images, labels, table, notes)


# --- Cityscapes


def read_cityscapes(folder: Folder | os.PathLike | str) -> dict[str, SegmentationSet]:
    """train and val of a folder with leftImg8bit and gtFine; the 19 train ids come from the labelIds, others are ignored."""
    folder = as_folder(folder)
    lacking = [part for part in ("leftImg8bit", "gtFine") if not folder.exists(part)]
    if lacking:
        raise UsageError(
            f"{folder.uri} has no {' and no '.join(lacking)}; give the folder that leftImg8bit_trainvaltest.zip and "
            "gtFine_trainvaltest.zip unpack to"
        )
    table = make_table(CITYSCAPES_IDS, range(CITYSCAPES_NUM_IDS))
    return {split: _cityscapes_set(folder, split, table) for split in SPLITS}


def _cityscapes_set(folder: Folder, split: str, table: np.ndarray) -> SegmentationSet:
    end = "_leftImg8bit.png"
    frames = [
        f"{split}/{city}/{name.removesuffix(end)}"
        for city in folder.names(f"leftImg8bit/{split}")
        for name in folder.names(f"leftImg8bit/{split}/{city}")
        if name.endswith(end)
    ]
    if not frames:
        raise UsageError(f"{folder.path(f'leftImg8bit/{split}')} has no CITY/*{end}; unpack leftImg8bit_trainvaltest.zip")
    images = [f"leftImg8bit/{frame}{end}" for frame in frames]
    labels = [f"gtFine/{frame}_gtFine_labelIds.png" for frame in frames]
    return _checked_set(folder, split, CITYSCAPES_CLASSES, images, labels, table, ())


# --- lists


def read_camvid(folder: Folder | os.PathLike | str) -> dict[str, SegmentationSet]:
    """train and val from the lists train.txt and val.txt; 11 classes, and void (11) is ignored."""
    folder = as_folder(folder)
    table = make_table(range(len(CAMVID_CLASSES)), (CAMVID_VOID, IGNORE_MASK))
    return {split: _list_set(folder, f"{split}.txt", CAMVID_CLASSES, table) for split in SPLITS}


def read_mask_list(list_file: os.PathLike | str, classes_file: os.PathLike | str | None = None) -> SegmentationSet:
    """A file with a line `image mask` (paths, relative to the file) for each image, and one with a class name a line.

    Without class names every mask is read, the largest id tells their number, and the names are numbers. 255 is ignored.
    """
    folder, name = _folder_and_name(list_file)
    if classes_file is not None:
        place, file = _folder_and_name(classes_file)
        classes = tuple(_lines(place, file, "a line is the name of a class"))
        return _list_set(folder, name, classes, make_table(range(len(classes))))
    every = _list_set(folder, name, (), make_table(range(IGNORE_MASK)))
    classes = tuple(map(str, range(_largest_id(every) + 1)))
    return _list_set(folder, name, classes, make_table(range(len(classes))))


def _list_set(folder: Folder, name: str, classes: tuple[str, ...], table: np.ndarray) -> SegmentationSet:
    """Absolute paths make all paths absolute, relative to the root folder."""
    place = folder.path(name)
    pairs = [_pair(line, place) for line in _lines(folder, name, "a line is the path of an image and of its mask")]
    if any(path.startswith("/") for pair in pairs for path in pair):
        if not folder.is_local:
            raise UsageError(f"{place} has absolute paths, which mean nothing there; write them relative to the list")
        pairs = [tuple(os.path.join(folder.root, path).lstrip("/") for path in pair) for pair in pairs]
        folder = Folder("/")
    images, labels = map(list, zip(*pairs, strict=True))
    return _checked_set(folder, name.rpartition(".")[0] or name, classes, images, labels, table, ())


def _pair(line: str, place: str) -> tuple[str, str]:
    words = line.split("\t") if "\t" in line else line.split()
    if len(words) != 2:
        raise UsageError(
            f"{place} has the line {line[:80]!r}; a line is the path of an image and of its mask, "
            "with a tab between them where a path has spaces"
        )
    return words[0].strip(), words[1].strip()


def _lines(folder: Folder, name: str, what: str) -> list[str]:
    place = folder.path(name)
    if not folder.exists(name):
        raise UsageError(f"{place} does not exist; give a text file in which {what}")
    try:
        text = folder.read(name).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{place} is no text file; {what}") from None
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        raise UsageError(f"{place} is empty; {what}")
    return lines


def _folder_and_name(path: os.PathLike | str) -> tuple[Folder, str]:
    above, _, name = str(path).rpartition("/")
    return Folder(above or ("/" if str(path).startswith("/") else ".")), name


def _largest_id(dataset: SegmentationSet) -> int:
    def largest(index: int) -> int:
        labels = read_labels(dataset, index)
        return int(labels.max(initial=0, where=labels != IGNORE_MASK))

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return max(pool.map(largest, range(len(dataset.labels))))


# --- what all have


def _checked_set(
    folder: Folder, split: str, classes: tuple[str, ...], images: list[str], labels: list[str], table, notes
) -> SegmentationSet:
    check_files(folder, images, f"{split} has as images")
    check_files(folder, labels, f"{split} has as masks")
    return SegmentationSet(
        folder=folder, split=split, classes=classes, images=tuple(images), labels=tuple(labels), table=table, notes=notes
    )


def read_labels(dataset: SegmentationSet, index: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """uint8 (H, W) train ids of a row; palettes are not looked at. UsageError where ids are unknown or H, W not ``size``."""
    place = dataset.folder.path(dataset.labels[index])
    ids = _read_ids(dataset.folder.read(dataset.labels[index]), place)
    if size is not None and ids.shape != tuple(size):
        raise UsageError(
            f"{place} is {ids.shape[0]} x {ids.shape[1]} (height x width) and its image {size[0]} x {size[1]}; "
            "a mask must have the size of its image"
        )
    labels = dataset.table[ids]
    if labels.min(initial=0) == UNKNOWN:
        unknown = np.unique(ids[labels == UNKNOWN])
        raise UsageError(
            f"{place} has the id {unknown[0]}{f' and {len(unknown) - 1} more' if len(unknown) > 1 else ''} that none of the "
            f"{len(dataset.classes)} classes has; give masks with this set's own ids (Cityscapes: *_labelIds.png, in a list "
            "*_labelTrainIds.png)"
        )
    return labels.astype(np.uint8)


def _read_ids(data: bytes, place: str) -> np.ndarray:
    """uint8 (H, W) as stored."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            mode, ids = image.mode, np.array(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{place} cannot be read as an image ({error}); unpack it again") from None
    if mode not in ("P", "L"):
        raise UsageError(
            f"{place} holds colours or other numbers ({mode}), not class ids; give masks of 8 bits, one id a pixel"
        )
    return ids


def check_labels(dataset: SegmentationSet) -> None:
    """Reads all masks and images, before a run rather than in it: known ids, equal sizes, some pixel with a class.

    Else UsageError.
    """
    labelled = np.zeros(len(dataset.labels), bool)

    def fault(index: int) -> None:
        labels = read_labels(dataset, index, image_size(dataset.folder, dataset.images[index]))
        labelled[index] = (labels != dataset.ignore).any()

    refuse_faults(dataset.folder, dataset.labels, fault)
    if not labelled.any():
        raise UsageError(f"no pixel of {dataset.folder.uri}, {dataset.split}, has a class; give masks with classes")
