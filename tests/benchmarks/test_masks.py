"""Segmentation sets: what hand-read label images must give, the official tables, and folders that are not whole."""

import shutil

import numpy as np
import pytest
from PIL import Image

from raydc.benchmarks.boxes import read_names
from raydc.benchmarks.masks import (
    CITYSCAPES_CLASSES,
    check_labels,
    read_camvid,
    read_cityscapes,
    read_labels,
    read_mask_list,
    read_voc12_aug,
)
from raydc.config import UsageError
from raydc.storage import Folder

# The official labels.py, name: (id, train id).
OFFICIAL = {
    "road": (7, 0),
    "sidewalk": (8, 1),
    "building": (11, 2),
    "wall": (12, 3),
    "fence": (13, 4),
    "pole": (17, 5),
    "traffic light": (19, 6),
    "traffic sign": (20, 7),
    "vegetation": (21, 8),
    "terrain": (22, 9),
    "sky": (23, 10),
    "person": (24, 11),
    "rider": (25, 12),
    "car": (26, 13),
    "truck": (27, 14),
    "bus": (28, 15),
    "train": (31, 16),
    "motorcycle": (32, 17),
    "bicycle": (33, 18),
}


def save_pair(root, image, mask, ids, mode="L"):
    """An image of the size of ``ids``, and them."""
    ids = np.array(ids, np.uint8)
    for path in (root / image, root / mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", ids.shape[::-1]).save(root / image)
    picture = Image.fromarray(ids)
    if mode == "P":  # colours that are not the ids, in another order
        picture.putpalette([255 - n for n in range(256) for _ in range(3)])
    picture.save(root / mask)


def count(dataset, index):
    ids, numbers = np.unique(read_labels(dataset, index), return_counts=True)
    return dict(zip(ids.tolist(), numbers.tolist(), strict=True))


@pytest.fixture
def devkit(tmp_path):
    root = tmp_path / "VOC2012"
    for name, folder in (("a", "SegmentationClass"), ("b", "SegmentationClassAug"), ("c", "SegmentationClass")):
        save_pair(root, f"JPEGImages/{name}.jpg", f"{folder}/{name}.png", [[0, 20, 255], [15, 1, 0]], mode="P")
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    for split, names in (("train", "a\n"), ("aug", "b\n"), ("val", "c\n")):
        (lists / f"{split}.txt").write_text(names)
    return root


@pytest.fixture
def camvid(tmp_path):
    for split, ids in (("train", [[0, 10, 11]]), ("val", [[3, 255, 9]])):
        save_pair(tmp_path, f"{split}/0.jpg", f"{split}annot/0.png", ids)
        (tmp_path / f"{split}.txt").write_text(f"{split}/0.jpg {split}annot/0.png\n")
    return tmp_path


@pytest.fixture
def cityscapes(tmp_path):
    for split, ids in (("train", [[0, 7, 33]]), ("val", [[11, 29, 26]])):
        frame = f"{split}/bonn/bonn_000000_000019"
        save_pair(tmp_path, f"leftImg8bit/{frame}_leftImg8bit.png", f"gtFine/{frame}_gtFine_labelIds.png", ids)
    return tmp_path


# --- real images; their pixels of each id were counted outside of the readers


def test_real_voc12(real_data):
    sets = read_voc12_aug(real_data / "voc12seg")
    assert (len(sets["train"].images), len(sets["val"].images)) == (28, 35)
    assert sets["train"].classes[:2] == ("background", "aeroplane") and len(sets["train"].classes) == 21
    assert sets["train"].labels[0] == "SegmentationClass/2007_000032.png"
    assert count(sets["train"], 0) == {0: 129_545, 1: 4_734, 15: 866, 255: 5_355}
    assert read_labels(sets["train"], 0, (281, 500)).dtype == np.uint8
    assert "train is train.txt alone" in sets["train"].notes[0] and not sets["val"].notes  # this part has no more
    for dataset in sets.values():
        check_labels(dataset)


def test_real_cityscapes(real_data):
    sets = read_cityscapes(real_data / "cityscapes")
    assert (len(sets["train"].images), len(sets["val"].images)) == (2, 1)
    assert sets["val"].images[0] == "leftImg8bit/val/aachen/aachen_000002_000019_leftImg8bit.png"
    ignored = 9 + 81_534 + 31_634 + 14_664  # ids 0, 1, 3, 4 of the first frame
    found = count(sets["train"], 0)
    assert (found[0], found[2], found[13], found[18], found[255]) == (831_082, 611_938, 42_659, 2_309, ignored)
    assert sum(found.values()) == 1024 * 2048 and set(found) <= {*range(19), 255}
    for dataset in sets.values():
        check_labels(dataset)


def test_real_camvid(real_data):
    sets = read_camvid(real_data / "camvid")
    assert (len(sets["train"].images), len(sets["val"].images)) == (64, 24)
    expected = {0: 23_726, 1: 64_726, 2: 1_904, 3: 16_139, 4: 11_897, 5: 2_303, 6: 2_543, 8: 40_851, 9: 731, 255: 7_980}
    assert sets["train"].images[0] == "train/0001TP_006690.jpg" and count(sets["train"], 0) == expected
    for dataset in sets.values():
        check_labels(dataset)


def test_the_list_of_the_augmented_set(official_lists):
    names = read_names(Folder(official_lists / "voc12_lists"), "train_aug.txt")
    assert len(names) == len(set(names)) == 10_582 and names[0] == "2011_003276"


# --- tables, lists and palettes


def test_the_official_table_of_cityscapes(cityscapes):
    table = read_cityscapes(cityscapes)["train"].table
    assert tuple(OFFICIAL) == CITYSCAPES_CLASSES
    expected = dict(OFFICIAL.values())
    assert [table[one] for one in range(34)] == [expected.get(one, 255) for one in range(34)]
    assert (table[34:] == -1).all()


def test_train_is_train_and_aug_each_with_its_masks(devkit):
    sets = read_voc12_aug(devkit.parent)
    assert sets["train"].images == ("JPEGImages/a.jpg", "JPEGImages/b.jpg") and sets["train"].notes == ()
    assert sets["train"].labels == ("SegmentationClass/a.png", "SegmentationClassAug/b.png")
    assert read_labels(sets["train"], 0).tolist() == [[0, 20, 255], [15, 1, 0]]  # indices, not the palette's colours
    lists = devkit / "ImageSets/Segmentation"
    (lists / "aug.txt").rename(lists / "trainaug.txt")
    (lists / "trainaug.txt").write_text("b\na\n")
    assert read_voc12_aug(devkit)["train"].labels == sets["train"].labels
    (lists / "trainaug.txt").unlink()
    alone = read_voc12_aug(devkit)["train"]
    assert alone.images == ("JPEGImages/a.jpg",) and "has no aug.txt" in alone.notes[0]


def test_void_of_camvid_and_void_of_others(camvid):
    sets = read_camvid(camvid)
    assert read_labels(sets["train"], 0).tolist() == [[0, 10, 255]] and read_labels(sets["val"], 0).tolist() == [[3, 255, 9]]


def test_mask_lists_with_names_without_and_with_absolute_paths(tmp_path):
    save_pair(tmp_path, "a b.jpg", "m/1.png", [[0, 4, 255]])
    (tmp_path / "all.txt").write_text("\ufeffa b.jpg\tm/1.png\r\n\n")
    (tmp_path / "names.txt").write_text("sky\nroad\ntree\ncar\ndog\nperson\n")
    named = read_mask_list(tmp_path / "all.txt", tmp_path / "names.txt")
    assert named.classes[4] == "dog" and len(named.classes) == 6 and read_labels(named, 0).tolist() == [[0, 4, 255]]
    assert read_mask_list(tmp_path / "all.txt").classes == ("0", "1", "2", "3", "4")
    (tmp_path / "all.txt").write_text(f"{tmp_path}/a b.jpg\tm/1.png\n")
    absolute = read_mask_list(tmp_path / "all.txt", tmp_path / "names.txt")
    assert absolute.folder.path(absolute.images[0]) == str(tmp_path / "a b.jpg")
    check_labels(absolute)


# --- what is not whole


def drop(path):
    return lambda root: (root / path).unlink()


def write(path, text):
    return lambda root: (root / path).write_text(text)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (shutil.rmtree, r"does not exist; give the folder"),
        (lambda root: shutil.rmtree(root / "JPEGImages"), r"has no JPEGImages and ImageSets/Segmentation; give"),
        (drop("ImageSets/Segmentation/val.txt"), r"val.txt does not exist; unpack"),
        (drop("JPEGImages/b.jpg"), r"1 of 2 files that train has as images are not there, first .*JPEGImages/b.jpg"),
        (drop("SegmentationClassAug/b.png"), r"1 of 2 files that train has as masks .*SegmentationClassAug/b.png"),
        (write("ImageSets/Segmentation/aug.txt", "b\nc\n"), r"1 images of val are in train.txt or aug.txt .*, first c;"),
    ],
)
def test_a_devkit_that_is_not_whole(devkit, spoil, says):
    spoil(devkit)
    with pytest.raises(UsageError, match=says) as error:
        read_voc12_aug(devkit)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda root: shutil.rmtree(root / "gtFine"), r"has no gtFine; give the folder"),
        (lambda root: shutil.rmtree(root / "leftImg8bit/val"), r"leftImg8bit/val has no CITY/\*_leftImg8bit.png; unpack"),
        (
            lambda root: (root / "gtFine/val/bonn/bonn_000000_000019_gtFine_labelIds.png").unlink(),
            r"1 of 1 files that val has as masks are not there, first .*gtFine_labelIds.png",
        ),
    ],
)
def test_a_cityscapes_folder_that_is_not_whole(cityscapes, spoil, says):
    spoil(cityscapes)
    with pytest.raises(UsageError, match=says):
        read_cityscapes(cityscapes)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (drop("train.txt"), r"train.txt does not exist; give a text file in which a line is the path of an image"),
        (write("train.txt", "\n"), r"train.txt is empty; a line is the path of an image and of its mask"),
        (write("train.txt", "train/0.jpg\n"), r"train.txt has the line 'train/0.jpg'; a line is"),
        (write("train.txt", "a b.jpg c.png\n"), r"with a tab between them where a path has spaces"),
        (write("train.txt", "train/0.jpg trainannot/1.png\n"), r"1 of 1 files that train has as masks .*trainannot/1.png"),
        (lambda root: (root / "train.txt").write_bytes(b"\xff\xd8\xff\xe0"), r"train.txt is no text file"),
    ],
)
def test_a_list_that_is_not_whole(camvid, spoil, says):
    spoil(camvid)
    with pytest.raises(UsageError, match=says) as error:
        read_camvid(camvid)
    assert "\n" not in str(error.value)


def test_absolute_paths_behind_a_uri_are_refused_only_where_they_mean_nothing(camvid):
    (camvid / "train.txt").write_text(f"{camvid}/train/0.jpg {camvid}/trainannot/0.png\n")
    assert len(read_camvid(f"file://{camvid}")["train"].images) == 1


def save_mask(pixels):
    return lambda path: Image.fromarray(pixels).save(path)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (save_mask(np.array([[0, 12, 33]], np.uint8)), r"0.png has the id 12 and 1 more that none of the 11 classes has"),
        (save_mask(np.zeros((2, 3), np.uint8)), r"0.png is 2 x 3 \(height x width\) and its image 1 x 3"),
        (save_mask(np.zeros((1, 3, 3), np.uint8)), r"0.png holds colours or other numbers \(RGB\), not class ids"),
        (save_mask(np.full((1, 3), 26_001, np.uint16)), r"0.png holds colours or other numbers \(I;16\), not class ids"),
        (lambda path: path.write_bytes(b"<html>"), r"0.png cannot be read as an image"),
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), r"0.png cannot be read as an image"),
    ],
)
def test_masks_that_do_not_fit_are_found_before_a_run(camvid, spoil, says):
    dataset = read_camvid(camvid)["train"]
    check_labels(dataset)
    spoil(camvid / "trainannot/0.png")
    with pytest.raises(UsageError, match=says) as error:
        check_labels(dataset)
    assert "\n" not in str(error.value)


def test_label_ids_where_train_ids_are_expected(cityscapes):
    frame = "bonn/bonn_000000_000019"
    (cityscapes / "all.txt").write_text(
        f"leftImg8bit/train/{frame}_leftImg8bit.png gtFine/train/{frame}_gtFine_labelIds.png\n"
    )
    (cityscapes / "names.txt").write_text("\n".join(CITYSCAPES_CLASSES))
    with pytest.raises(UsageError, match=r"the id 33 that none of the 19 classes has; .*in a list \*_labelTrainIds.png"):
        check_labels(read_mask_list(cityscapes / "all.txt", cityscapes / "names.txt"))


def test_an_image_that_is_none(camvid):
    (camvid / "train/0.jpg").write_bytes(b"")
    with pytest.raises(UsageError, match=r"train/0.jpg cannot be read as an image"):
        check_labels(read_camvid(camvid)["train"])
