"""The VOC2007 reader on the official lists, on a real part of the images, and on devkits that are not whole."""

import os
import shutil

import numpy as np
import pytest

from raydc.benchmarks.datasets import SPLITS, VOC_CLASSES, count_only_ignored, read_voc07, read_voc_lists
from raydc.config import UsageError
from raydc.storage import Folder

LISTS = "ImageSets/Main"
# Images with a class, as the challenge's own statistics have them (trainval, test).
OFFICIAL = {
    "aeroplane": (238, 204),
    "car": (713, 721),
    "person": (2008, 2007),
    "sheep": (96, 97),
    "tvmonitor": (256, 229),
}


@pytest.fixture(scope="module")
def voc07(real_data):
    return real_data / "voc07" / "VOCdevkit" / "VOC2007"


@pytest.fixture
def devkit(tmp_path):
    """Three images a split. ids 000001.. and 000011..; each is a cat, the last one's cat is difficult."""
    root = tmp_path / "VOC2007"
    (root / "JPEGImages").mkdir(parents=True)
    (root / LISTS).mkdir(parents=True)
    for split, first in zip(SPLITS, (1, 11), strict=True):
        ids = [f"{first + n:06d}" for n in range(3)]
        for image in ids:
            (root / "JPEGImages" / f"{image}.jpg").touch()
        for name in VOC_CLASSES:
            labels = (" 1", " 1", " 0") if name == "cat" else ("-1", "-1", "-1")
            lines = [f"{image} {label}\n" for image, label in zip(ids, labels, strict=True)]
            (root / LISTS / f"{name}_{split}.txt").write_text("".join(reversed(lines)))
    return root


@pytest.mark.parametrize(("split", "number"), [("trainval", 5011), ("test", 4952)])
def test_the_official_lists_have_the_official_counts(real_data, split, number):
    ids, labels = read_voc_lists(Folder(real_data / "voc07_lists" / "VOC2007" / LISTS), split)
    assert labels.shape == (number, 20) and labels.dtype == np.int8 and ids == sorted(set(ids))
    positives = dict(zip(VOC_CLASSES, (labels == 1).sum(0), strict=True))
    assert {name: positives[name] for name in OFFICIAL} == {
        name: both[SPLITS.index(split)] for name, both in OFFICIAL.items()
    }
    assert min(positives.values()) == OFFICIAL["sheep"][SPLITS.index(split)]  # why low-shot ends at 96


def test_a_real_devkit_agrees_with_the_official_labels(real_data, voc07):
    official = {}
    for split in SPLITS:  # a part may be split in another way
        ids, labels = read_voc_lists(Folder(real_data / "voc07_lists" / "VOC2007" / LISTS), split)
        official |= dict(zip(ids, labels, strict=True))
    ours = read_voc07(voc07)
    for split in SPLITS:
        assert len(ours.names[split]) == len(ours.paths[split]) == len(ours.labels[split]) > 0
        for name, path, row in zip(ours.names[split], ours.paths[split], ours.labels[split], strict=True):
            assert (row == official[name.removesuffix(".jpg")]).all()
            assert os.path.basename(path) == name and os.path.getsize(path) > 0


def test_order_labels_and_images_with_difficult_objects_only(devkit):
    voc = read_voc07(devkit)
    assert voc.names["trainval"] == ["000001.jpg", "000002.jpg", "000003.jpg"]  # the files hold them backwards
    assert voc.paths["test"][0] == str(devkit / "JPEGImages" / "000011.jpg")
    cat = VOC_CLASSES.index("cat")
    assert voc.labels["test"][:, cat].tolist() == [1, 1, -1]
    assert not np.delete(voc.labels["test"], cat, 1).any()
    assert voc.num_only_ignored == {"trainval": 1, "test": 1}
    assert count_only_ignored(np.array([[1, -1], [0, -1], [0, 0], [0, 1]])) == 1


def test_the_folder_above_will_do(devkit):
    inside = devkit.parent / "data" / "VOCdevkit"
    inside.mkdir(parents=True)
    shutil.move(devkit, inside)
    expected = str(inside / "VOC2007" / "JPEGImages" / "000001.jpg")
    for place in (inside / "VOC2007", inside, inside.parent, Folder(inside.parent), f"{inside}/"):
        assert read_voc07(place).paths["trainval"][0] == expected


def test_a_devkit_behind_a_uri(devkit):
    assert read_voc07(f"file://{devkit.parent}").paths["test"] == read_voc07(devkit).paths["test"]


def drop_images(root):
    shutil.rmtree(root / "JPEGImages")


def drop_all(root):
    shutil.rmtree(root)
    root.mkdir()


def drop_one_list(root):
    (root / LISTS / "dog_test.txt").unlink()


def drop_a_split(root):
    for name in VOC_CLASSES:
        (root / LISTS / f"{name}_test.txt").unlink()


def drop_two_images(root):
    for image in ("000013", "000012"):
        (root / "JPEGImages" / f"{image}.jpg").unlink()


def odd_label(root):
    (root / LISTS / "cow_trainval.txt").write_text("000001 -1\n000002 2\n000003 -1\n")


def twice(root):
    (root / LISTS / "cow_trainval.txt").write_text("000001 -1\n000001 1\n")


def other_images(root):
    (root / LISTS / "cow_trainval.txt").write_text("000001 -1\n000002 -1\n000009 -1\n")


def empty(root):
    (root / LISTS / "aeroplane_trainval.txt").write_text("\n")


def binary(root):
    (root / LISTS / "aeroplane_trainval.txt").write_bytes(b"\xff\xd8\xff\xe0 \x00\n")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (drop_images, r"has no JPEGImages;.*give the folder VOC2007"),
        (drop_all, r"has no JPEGImages and no ImageSets/Main;"),
        (shutil.rmtree, r"does not exist; give"),
        (drop_one_list, r"lacks 1 of 20 lists of test \(dog_test.txt\); unpack"),
        (drop_a_split, r"lacks 20 of 20 lists of test \(aeroplane_test.txt, bicycle_test.txt, bird_test.txt, \.\.\.\)"),
        (drop_two_images, r"2 images of test are not in .*JPEGImages, first 000012.jpg"),
        (odd_label, r"cow_trainval.txt line 2 is '000002 2'"),
        (twice, r"cow_trainval.txt line 2 is '000001 1'"),
        (other_images, r"cow_trainval.txt and aeroplane_trainval.txt list different images \(2, first 000003\)"),
        (empty, r"aeroplane_trainval.txt names no image"),
        (binary, r"aeroplane_trainval.txt line 1 is"),
    ],
)
def test_a_devkit_that_is_not_whole(devkit, spoil, says):
    spoil(devkit)
    with pytest.raises(UsageError, match=says) as error:
        read_voc07(devkit)
    assert "\n" not in str(error.value)
