"""Listings against folders and files written by hand."""

import json
import os
import re

import numpy as np
import pytest

from raydc.data.sources import SourceError, hold_out, list_source


def touch(folder, *names):
    """Empty files: a listing reads no image."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def rows(listing):
    return [(listing.name(i), listing.label(i)) for i in range(len(listing))]


def only_train(src, **options):
    source = list_source(src, val_fraction=0, **options)
    assert set(source.splits) == {"train"}
    return source


def test_class_tree(tmp_path):
    touch(tmp_path, "dog/b.jpg", "dog/a.JPEG", "cat/x.png", "cat/deep/er/y.webp")
    source = only_train(tmp_path)
    assert source.classes == ("cat", "dog")
    assert rows(source.splits["train"]) == [
        ("cat/x.png", 0),
        ("cat/deep/er/y.webp", 0),
        ("dog/a.JPEG", 1),
        ("dog/b.jpg", 1),
    ]
    assert source.notes == ()


def test_what_is_no_image_is_counted_by_kind(tmp_path):
    touch(
        tmp_path,
        "cat/x.jpg",
        "cat/notes.txt",
        "dog/y.jpg",
        "dog/more.txt",
        "README.md",
        ".hidden",
        "cat/Makefile",
    )
    source = only_train(tmp_path)
    assert len(source.splits["train"]) == 2
    (note,) = source.notes
    assert note.startswith("5 file(s)") and ".txt 2" in note and ".md 1" in note and "hidden 1" in note
    assert "no extension 1" in note


def test_flat_folder_has_no_labels(tmp_path):
    touch(tmp_path, "b.jpg", "a.jpg")
    source = only_train(tmp_path)
    assert source.classes is None
    assert rows(source.splits["train"]) == [("a.jpg", None), ("b.jpg", None)]


def test_names_that_are_not_ascii_or_not_even_utf8(tmp_path):
    touch(tmp_path, "Käse/ü 1.jpg", "猫/ねこ.jpg")
    (tmp_path / "猫" / os.fsdecode(b"raw\xff.jpg")).write_bytes(b"bytes")
    train = only_train(tmp_path).splits["train"]
    assert rows(train) == [("Käse/ü 1.jpg", 0), ("猫/raw\\xff.jpg", 1), ("猫/ねこ.jpg", 1)]
    assert train.read(1) == b"bytes"


def test_equal_base_names_in_two_classes_are_two_images(tmp_path):
    touch(tmp_path, "cat/1.jpg", "dog/1.jpg")
    assert rows(only_train(tmp_path).splits["train"]) == [("cat/1.jpg", 0), ("dog/1.jpg", 1)]


@pytest.mark.parametrize("val", ["val", "test"])
def test_train_and_val_folders_become_splits(tmp_path, val):
    touch(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", f"{val}/dog/3.jpg", "lists/a.txt")
    source = list_source(tmp_path)
    assert rows(source.splits["train"]) == [("cat/1.jpg", 0), ("dog/2.jpg", 1)]
    assert rows(source.splits["val"]) == [("dog/3.jpg", 1)]
    assert "not read: lists" in source.notes[0]
    assert source.notes[1] == "1 class(es) of train have no image in val: cat"
    assert not source.held_out


def test_a_class_called_train_is_a_class(tmp_path):
    touch(tmp_path, "train/1.jpg", "boat/2.jpg")
    assert only_train(tmp_path).classes == ("boat", "train")


def test_val_option_wins_over_the_folder_beside(tmp_path):
    touch(tmp_path, "src/train/cat/1.jpg", "src/val/cat/2.jpg", "other/cat/3.jpg")
    assert rows(list_source(tmp_path / "src", val=tmp_path / "other").splits["val"]) == [("cat/3.jpg", 0)]


def test_imagenets_val_is_a_flat_folder_with_a_list_of_class_numbers(tmp_path):
    touch(tmp_path, "train/n02/a.jpg", "train/n01/b.jpg", "val/1.jpg", "val/2.jpg")
    (tmp_path / "val.txt").write_text("1.jpg 1\n2.jpg 0\n")
    source = list_source(tmp_path / "train", val=tmp_path / "val.txt", root=tmp_path / "val")
    assert source.classes == ("n01", "n02")
    assert rows(source.splits["val"]) == [("1.jpg", 1), ("2.jpg", 0)]
    assert source.splits["val"].root == str(tmp_path / "val")


def test_class_folders_named_by_numbers_match_by_name_not_by_position(tmp_path):
    touch(tmp_path, *(f"train/{i}/x.jpg" for i in range(12)), "val/1.jpg")
    (tmp_path / "val.txt").write_text("1.jpg 2\n")
    source = list_source(tmp_path / "train", val=tmp_path / "val.txt")
    assert source.classes[source.splits["val"].label(0)] == "2"


def test_list_file_with_class_numbers_names_with_spaces_and_blank_lines(tmp_path):
    (tmp_path / "all.csv").write_bytes("\ufeffa/my cat.jpg 2\r\n\r\nb/ü.jpg 0\r\n".encode())
    source = only_train(tmp_path / "all.csv")
    assert rows(source.splits["train"]) == [("a/my cat.jpg", 2), ("b/ü.jpg", 0)]
    assert source.classes == ("0", "1", "2")
    assert source.notes == (f"1 of 3 labels do not occur in {tmp_path / 'all.csv'}: 1",)


def test_list_file_with_class_names_and_a_root(tmp_path):
    touch(tmp_path, "images/1.jpg")
    (tmp_path / "images" / "1.jpg").write_bytes(b"one")
    (tmp_path / "list.txt").write_text("1.jpg dog\n2.jpg cat\n")
    source = only_train(tmp_path / "list.txt", root=tmp_path / "images")
    assert source.classes == ("cat", "dog")
    assert rows(source.splits["train"]) == [("1.jpg", 1), ("2.jpg", 0)]
    assert source.splits["train"].read(0) == b"one"


def test_list_file_without_labels(tmp_path):
    (tmp_path / "list.txt").write_text("my cat.jpg\n2.jpg\n")
    source = only_train(tmp_path / "list.txt")
    assert source.classes is None
    assert rows(source.splits["train"]) == [("my cat.jpg", None), ("2.jpg", None)]


def test_lines_listed_twice_stay_and_are_noted(tmp_path):
    (tmp_path / "list.txt").write_text("1.jpg 0\n1.jpg 0\n2.jpg 1\n")
    source = only_train(tmp_path / "list.txt")
    assert len(source.splits["train"]) == 3
    assert source.notes == ("train: 1 path(s) are listed more than once; each line is kept as a row",)


def inaturalist(path, categories, pairs):
    images = [{"id": 10 + i, "file_name": name} for i, (name, _) in enumerate(pairs)]
    annotations = [{"image_id": 10 + i, "category_id": label} for i, (_, label) in enumerate(pairs)]
    named = [{"id": i, "name": name} for i, name in enumerate(categories)]
    path.write_text(json.dumps({"images": images, "annotations": annotations[::-1], "categories": named}))


def test_inaturalist_json(tmp_path):
    inaturalist(tmp_path / "train.json", ["oak", "ash"], [("t/1.jpg", 1), ("t/2.jpg", 0)])
    inaturalist(tmp_path / "val.json", ["oak", "ash"], [("t/3.jpg", 1)])
    source = list_source(tmp_path / "train.json", val=tmp_path / "val.json")
    assert source.classes == ("oak", "ash")
    assert rows(source.splits["train"]) == [("t/1.jpg", 1), ("t/2.jpg", 0)]
    assert rows(source.splits["val"]) == [("t/3.jpg", 1)]


def test_digits_are_scikit_learns(tmp_path):
    import io

    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    source = list_source("digits", val_fraction=0.2)
    assert {name: len(listing) for name, listing in source.splits.items()} == {"train": 1437, "val": 360}
    train = source.splits["train"]
    for row in (0, 700, 1436):
        number = int(re.fullmatch(r"digit_(\d{4}).png", train.name(row))[1])
        assert train.label(row) == digits.target[number]
        pixels = np.asarray(Image.open(io.BytesIO(train.read(row))))
        assert np.array_equal(np.round(pixels / 255 * 16), digits.images[number])
        assert pixels.max() == 255 or digits.images[number].max() < 16


def test_hold_out_is_seeded_disjoint_and_balanced(tmp_path):
    touch(
        tmp_path,
        *(f"{name}/{i}.jpg" for name, size in {"a": 70, "b": 24, "c": 6}.items() for i in range(size)),
    )
    one, same, other = (list_source(tmp_path, val_fraction=0.1, seed=seed).splits for seed in (1, 1, 2))
    names = {split: {name for name, _ in rows(listing)} for split, listing in one.items()}
    assert not names["train"] & names["val"]
    assert len(names["train"] | names["val"]) == 100
    assert np.bincount(one["val"].labels).tolist() == [7, 2, 1]  # of 7.0, 2.4 and 0.6
    assert rows(one["val"]) == rows(same["val"])
    assert rows(one["val"]) != rows(other["val"])


def test_hold_out_without_labels_and_its_rounding(tmp_path):
    touch(tmp_path, *(f"{i}.jpg" for i in range(31)))
    assert len(list_source(tmp_path).splits["val"]) == 4
    listing = only_train(tmp_path).splits["train"].take(np.arange(30))
    assert len(hold_out(listing, 0.1, 0)) == 3


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5])
def test_val_fraction_out_of_range(fraction):
    with pytest.raises(SourceError, match="val_fraction"):
        list_source("digits", val_fraction=fraction)


def test_one_image_cannot_be_split(tmp_path):
    touch(tmp_path, "1.jpg")
    with pytest.raises(SourceError, match="--val-fraction 0"):
        list_source(tmp_path)


def test_empty_class_folder_keeps_its_number_and_is_noted(tmp_path):
    touch(tmp_path, "a/1.jpg", "b/none.txt", "c/2.jpg")
    source = only_train(tmp_path)
    assert rows(source.splits["train"]) == [("a/1.jpg", 0), ("c/2.jpg", 2)]
    assert f"1 folder(s) of {tmp_path} hold no images: b" in source.notes


def test_a_single_class_folder_is_noted(tmp_path):
    touch(tmp_path, "images/1.jpg", "images/2.jpg")
    assert "labels say nothing" in only_train(tmp_path).notes[0]


def test_labels_on_one_side_only(tmp_path):
    touch(tmp_path, "train/1.jpg", "val/cat/2.jpg")
    source = list_source(tmp_path)
    assert source.classes == ("cat",)
    assert source.splits["train"].labels is None
    assert f"{tmp_path / 'train'} has no labels" in source.notes


def bad_source(tmp_path, kind):
    if kind == "empty folder":
        (tmp_path / "src").mkdir()
    elif kind == "no images":
        touch(tmp_path / "src", "a.txt", "b.md")
    elif kind == "mixed":
        touch(tmp_path / "src", "1.jpg", "cat/2.jpg")
    elif kind == "foreign val class":
        touch(tmp_path / "src", "train/cat/1.jpg", "train/dog/1.jpg", "val/cow/2.jpg")
    elif kind == "half labelled":
        (tmp_path / "src").write_text("1.jpg 0\n2.jpg\n")
    elif kind == "empty list":
        (tmp_path / "src").write_text("\n")
    elif kind == "binary list":
        (tmp_path / "src").write_bytes(b"\x89PNG\0\0\0")
    elif kind == "huge label":
        (tmp_path / "src").write_text("1.jpg 20181123\n")
    return tmp_path / "src"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "does not exist"),
        ("empty folder", "holds no images"),
        ("no images", "holds no images.*2 file"),
        ("mixed", r"1 image\(s\) beside class folders \(cat\)"),
        ("foreign val class", "cow"),
        ("half labelled", "line 2 of .* has no label"),
        ("empty list", "is empty"),
        ("binary list", "no text file"),
        ("huge label", "20181123"),
    ],
)
def test_bad_sources_get_one_sentence(tmp_path, kind, message):
    with pytest.raises(SourceError, match=message) as error:
        list_source(bad_source(tmp_path, kind))
    assert "\n" not in str(error.value)


def test_list_numbers_beyond_trains_classes(tmp_path):
    touch(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg")
    (tmp_path / "val.txt").write_text("1.jpg 1\n2.jpg 2\n")  # counted from 1
    with pytest.raises(SourceError, match="numbers from 0"):
        list_source(tmp_path / "train", val=tmp_path / "val.txt")


@pytest.mark.parametrize("content", ["{", "[]", '{"images": [{"id": 1}]}', '{"images": []}'])
def test_json_of_another_kind(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(SourceError, match="x.json"):
        list_source(tmp_path / "x.json")


def test_missing_root(tmp_path):
    (tmp_path / "list.txt").write_text("1.jpg 0\n")
    with pytest.raises(SourceError, match="--root"):
        list_source(tmp_path / "list.txt", root=tmp_path / "nowhere")
