"""Readers of the labelled sets that benchmarks measure on, from the folders their publishers ship. Neither Ray nor torch.

VOC2007: the archives VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar of host.robots.ox.ac.uk/pascal/VOC/voc2007.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from raydc.config import UsageError
from raydc.storage import Folder

# fmt: off
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# fmt: on
SPLITS = ("trainval", "test")
IMAGES, LISTS = "JPEGImages", "ImageSets/Main"
PLACES = ("", "VOC2007", "VOCdevkit/VOC2007")  # where the devkit lies in what the user points at
FROM_FILE = {"1": 1, "-1": 0, "0": -1}  # the file's 0 is an object too difficult to be asked for


@dataclass(frozen=True, kw_only=True, eq=False)
class Voc07:
    """VOC2007 for classification: N images a split, in the order of their ids.

    ``labels`` are int8 (N, 20): 1 present, 0 absent, -1 only difficult ones. ``paths`` are in the terms of ``folder.fs``.
    """

    folder: Folder
    classes: tuple[str, ...]
    names: dict[str, list[str]]
    paths: dict[str, list[str]]
    labels: dict[str, np.ndarray]
    num_only_ignored: dict[str, int]
    """Images whose every object is difficult: they stay, and count for no class."""


def read_voc07(folder: Folder | os.PathLike | str) -> Voc07:
    """Lists, labels and paths of a VOC2007 devkit folder, or of one that holds VOC2007 or VOCdevkit/VOC2007.

    UsageError where images or lists are missing, or lists contradict each other.
    """
    devkit = _find_devkit(folder if isinstance(folder, Folder) else Folder(folder))
    lists = {split: read_voc_lists(devkit.child(LISTS), split) for split in SPLITS}
    names = {split: [f"{image}.jpg" for image in ids] for split, (ids, _) in lists.items()}
    there = set(devkit.names(IMAGES))
    for split in SPLITS:
        _check_images(devkit, split, [name for name in names[split] if name not in there])
    labels = {split: labels for split, (_, labels) in lists.items()}
    return Voc07(
        folder=devkit,
        classes=VOC_CLASSES,
        names=names,
        paths={split: [devkit.path(f"{IMAGES}/{name}") for name in names[split]] for split in SPLITS},
        labels=labels,
        num_only_ignored={split: count_only_ignored(labels[split]) for split in SPLITS},
    )


def read_voc_lists(lists: Folder, split: str, classes: tuple[str, ...] = VOC_CLASSES) -> tuple[list[str], np.ndarray]:
    """Sorted image ids and labels, int8 (N, classes), from the files CLASS_SPLIT.txt in ``lists``."""
    files = [f"{name}_{split}.txt" for name in classes]
    there = set(lists.names())
    missing = [file for file in files if file not in there]
    if missing:
        raise UsageError(
            f"{lists.uri} lacks {len(missing)} of {len(files)} lists of {split} ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}); unpack the devkit's {split} archive into the same folder"
        )
    columns = [_read_list(lists, file) for file in files]
    for file, column in zip(files, columns, strict=True):
        odd = sorted(column.keys() ^ columns[0].keys())
        if odd:
            raise UsageError(
                f"{lists.path(file)} and {files[0]} list different images ({len(odd)}, first {odd[0]}); "
                "unpack the lists again"
            )
    ids = sorted(columns[0])
    return ids, np.array([[column[image] for column in columns] for image in ids], np.int8).reshape(-1, len(classes))


def _read_list(lists: Folder, file: str) -> dict[str, int]:
    """Image id to label; a line is an id and 1, -1 or 0."""
    labels: dict[str, int] = {}
    for number, line in enumerate(lists.read(file).decode("utf-8", "replace").splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or words[1] not in FROM_FILE or words[0] in labels:
            raise UsageError(
                f"{lists.path(file)} line {number} is {line[:60]!r}; a line is the id of an image not named before, and 1, "
                "-1 or 0: unpack the lists again"
            )
        labels[words[0]] = FROM_FILE[words[1]]
    if not labels:
        raise UsageError(f"{lists.path(file)} names no image; unpack the lists again")
    return labels


def count_only_ignored(labels: np.ndarray) -> int:
    """Rows without a 1 but with a -1."""
    return int(((labels == -1).any(1) & ~(labels == 1).any(1)).sum())


def _find_devkit(folder: Folder) -> Folder:
    for place in PLACES:
        devkit = folder.child(place) if place else folder
        if devkit.exists(IMAGES) and devkit.exists(LISTS):
            return devkit
    lacking = [part for part in (IMAGES, LISTS) if not folder.exists(part)]
    found = f"has no {' and no '.join(lacking)}" if folder.exists() else "does not exist"
    raise UsageError(
        f"{folder.uri} {found}; give the folder VOC2007 that VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar "
        "unpack to, or the one above it"
    )


def _check_images(devkit: Folder, split: str, missing: list[str]) -> None:
    if missing:
        raise UsageError(
            f"{len(missing):,} images of {split} are not in {devkit.path(IMAGES)}, first {missing[0]}; unpack the devkit's "
            f"{split} archive into the same folder"
        )
