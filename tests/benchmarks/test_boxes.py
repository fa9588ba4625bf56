"""Detection sets: what hand-read annotations of real images give, masks worked by hand, and files that are not whole."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api

from raydc.benchmarks.boxes import (
    check_images,
    decode_masks,
    fill_polygon,
    fill_runs,
    read_coco,
    read_voc_detection,
)
from raydc.benchmarks.datasets import VOC_CLASSES
from raydc.config import UsageError
from raydc.storage import Folder

OBJECT = (
    "<object><name>{name}</name><difficult>{difficult}</difficult><part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin>"
    "<xmax>2</xmax><ymax>2</ymax></bndbox></part><bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax>"
    "</bndbox></object>"
)


def xml(*objects, width=20, height=10):
    inner = "".join(OBJECT.format(*box, name=name, difficult=difficult) for name, difficult, box in objects)
    return f"<annotation><size><width>{width}</width><height>{height}</height></size>{inner}</annotation>"


def add_voc(root, year, split, annotations):
    """Images of 20 x 10 pixels."""
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / year / part).mkdir(parents=True, exist_ok=True)
    for name, text in annotations.items():
        Image.new("RGB", (20, 10)).save(root / year / "JPEGImages" / f"{name}.jpg")
        (root / year / "Annotations" / f"{name}.xml").write_text(text)
    (root / year / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in annotations))


@pytest.fixture
def voc(tmp_path):
    add_voc(tmp_path, "VOC2007", "trainval", {"000007": xml(("cat", 0, (1, 1, 20, 10)), ("dog", 1, (5, 2, 9, 8)))})
    add_voc(tmp_path, "VOC2007", "test", {"000001": xml(("cow", 0, (2, 2, 9, 9)))})
    add_voc(
        tmp_path,
        "VOC2012",
        "trainval",
        {"2008_000002": xml(), "2008_000001": xml(("person", 0, (45.7, 1, 50, 5)), width=60)},
    )
    return tmp_path


def coco_content():
    """Two images of 6 x 4 pixels (width x height), the second without objects; sparse category ids, not in order."""
    rectangle = [1.0, 1.0, 4.0, 1.0, 4.0, 3.0, 1.0, 3.0]
    crowd = {"size": [4, 6], "counts": [4, 8, 12]}
    return {
        "images": [{"id": number, "file_name": f"{number}.jpg", "width": 6, "height": 4} for number in (9, 4)],
        "categories": [{"id": 7, "name": "zebra"}, {"id": 3, "name": "apple"}],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 3, "bbox": [1, 1, 3, 2], "iscrowd": 0, "segmentation": [rectangle]},
            {"id": 2, "image_id": 9, "category_id": 7, "bbox": [1, 0, 2, 4], "iscrowd": 1, "segmentation": crowd},
        ],
    }


def write_coco(root, content):
    for place in ("annotations", "val2017"):
        (root / place).mkdir(exist_ok=True)
    for number in (9, 4):
        Image.new("RGB", (6, 4)).save(root / "val2017" / f"{number}.jpg")
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return root


# --- VOC


@pytest.mark.parametrize(("split", "number"), [("trainval", 560), ("test", 340)])
def test_real_voc_has_every_object_of_its_files(real_data, split, number):
    dataset = read_voc_detection(real_data / "voc07", split=split)
    assert len(dataset.images) == number and dataset.classes == VOC_CLASSES
    texts = [
        dataset.folder.read(one.path.replace("JPEGImages", "Annotations").replace(".jpg", ".xml")).decode()
        for one in dataset.images
    ]
    assert [len(one.boxes) for one in dataset.images] == [text.count("<object>") for text in texts]
    assert [one.difficult.sum() for one in dataset.images] == [text.count("<difficult>1<") for text in texts]
    assert dataset.num_empty == dataset.num_without_area == dataset.num_clipped == 0
    check_images(dataset)


def test_a_real_annotation_read_by_hand(real_data):
    """000016.xml: 334 x 500, a bicycle at 92 72 305 473. 2007_000452.xml: a sofa and a difficult chair up to the edge."""
    first = next(one for one in read_voc_detection(real_data / "voc07", split="test").images if "000016" in one.path)
    assert first.path == "VOCdevkit/VOC2007/JPEGImages/000016.jpg" and (first.width, first.height) == (334, 500)
    assert first.boxes.tolist() == [[91, 71, 304, 472]] and first.labels.tolist() == [1] and first.masks is None
    assert (first.boxes.dtype, first.labels.dtype, first.difficult.dtype) == (np.float32, np.int64, bool)
    val = read_voc_detection(real_data / "voc12seg", split="val")
    second = next(one for one in val.images if "2007_000452" in one.path)
    assert second.boxes.tolist() == [[49, 120, 294, 337], [473, 139, 499, 283]]
    assert [VOC_CLASSES[label] for label in second.labels] == ["sofa", "chair"]
    assert second.difficult.tolist() == [False, True] and not second.crowd.any()


def test_both_years_in_order_of_their_lists(voc):
    dataset = read_voc_detection(voc)
    assert [one.path for one in dataset.images] == [
        "VOC2007/JPEGImages/000007.jpg",
        "VOC2012/JPEGImages/2008_000002.jpg",
        "VOC2012/JPEGImages/2008_000001.jpg",
    ]
    assert dataset.images[0].boxes.tolist() == [[0, 0, 19, 9], [4, 1, 8, 7]]  # and not the boxes of parts
    assert dataset.images[1].boxes.shape == (0, 4) and dataset.num_empty == 1
    assert dataset.images[2].boxes.tolist() == [[44, 0, 49, 4]]
    assert dataset.notes == ("1 image(s) have no objects",)
    assert read_voc_detection(f"file://{voc}").images[2].path == dataset.images[2].path


def test_one_year_will_do_and_is_said(voc):
    assert "VOC2012 is not in" not in " ".join(read_voc_detection(voc, split="test").notes)  # whose objects are not public
    one = read_voc_detection(voc / "VOC2007")
    assert [image.path for image in one.images] == ["JPEGImages/000007.jpg"]
    assert len(one.notes) == 1 and one.notes[0].startswith("VOC2012 is not in") and "VOC2007 alone" in one.notes[0]
    shutil.rmtree(voc / "VOC2012")
    assert len(read_voc_detection(voc).images) == 1


def test_voc_boxes_without_area_or_over_the_edge(voc):
    boxes = [("cat", 0, box) for box in ((3, 3, 3, 9), (9, 3, 4, 9), (0, 1, 25, 10), (2, 2, 4, 4))]
    (voc / "VOC2007/Annotations/000001.xml").write_text(xml(*boxes))
    dataset = read_voc_detection(voc, split="test")
    assert dataset.images[0].boxes.tolist() == [[0, 0, 20, 9], [1, 1, 3, 3]]
    assert (dataset.num_without_area, dataset.num_clipped) == (2, 1) and len(dataset.notes) == 2


# --- COCO


def test_real_coco(real_data):
    """Areas summed by pycocotools 2.0 over annToMask of all objects."""
    for split, number, num_objects, area in (("train", 42, 404, 3_874_486), ("val", 28, 223, 3_793_589)):
        dataset = read_coco(real_data / "coco", split)
        assert len(dataset.images) == number and sum(len(one.boxes) for one in dataset.images) == num_objects
        assert (len(dataset.classes), dataset.classes[0], dataset.classes[79]) == (80, "person", "toothbrush")
        assert sum(int(decode_masks(one).sum()) for one in dataset.images) == area
        check_images(dataset)


def test_real_crowds_fill_their_boxes(real_data):
    """The file's boxes are independent of its runs; the four areas are the sums of every second run."""
    images = [one for one in read_coco(real_data / "coco", "train").images if one.crowd.any()]
    areas = []
    for image in images:
        for mask, box in zip(decode_masks(image)[image.crowd], image.boxes[image.crowd], strict=True):
            rows, columns = np.nonzero(mask)
            found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            np.testing.assert_allclose(found, box, atol=1)
            areas.append(len(rows))
    assert sorted(areas) == [776, 11_710, 16_573, 39_683]


def test_a_real_coco_object_read_by_hand(real_data):
    """Annotation 137368: category 3 (car), 166.18 319.96 84.73 63.04, 4275.5 square pixels."""
    image = next(one for one in read_coco(real_data / "coco", "train").images if "000000125870" in one.path)
    assert image.path == "train2017/000000125870.jpg"
    row = int(np.abs(image.boxes - np.array([166.18, 319.96, 250.91, 383.0])).max(1).argmin())
    np.testing.assert_allclose(image.boxes[row], [166.18, 319.96, 250.91, 383.0], atol=1e-4)
    mask = decode_masks(image)[row]
    assert image.labels[row] == 2 and not image.crowd[row] and mask.shape == (image.height, image.width)
    assert mask.sum() == pytest.approx(4275.5, rel=0.02)
    rows, columns = np.nonzero(mask)
    assert abs(columns.min() - 166) <= 1 and abs(columns.max() - 250) <= 1
    assert abs(rows.min() - 320) <= 1 and abs(rows.max() - 382) <= 1


def test_dense_classes_crowds_and_empty_images(tmp_path):
    dataset = read_coco(write_coco(tmp_path, coco_content()), "val")
    assert dataset.classes == ("zebra", "apple") and [one.path for one in dataset.images] == [
        "val2017/9.jpg",
        "val2017/4.jpg",
    ]
    first, second = dataset.images
    assert first.boxes.tolist() == [[1, 1, 4, 3], [1, 0, 3, 4]] and first.labels.tolist() == [1, 0]
    assert first.crowd.tolist() == [False, True] and not first.difficult.any()
    polygon, crowd = decode_masks(first)
    assert polygon.tolist() == [[0] * 6, [0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0], [0] * 6]
    assert crowd.tolist() == [[0, 1, 1, 0, 0, 0]] * 4
    assert decode_masks(second).shape == (0, 4, 6) and dataset.num_empty == 1


def test_coco_objects_without_area_or_outline_and_over_the_edge(tmp_path):
    content = coco_content()
    whole = content["annotations"][0]
    content["annotations"] += [
        whole | {"id": 3, "bbox": [2, 2, 0, 1]},
        whole | {"id": 4, "segmentation": []},
        whole | {"id": 5, "segmentation": [[1, 1, 2, 2]]},
        whole | {"id": 6, "bbox": [4.5, 1, 2, 2], "image_id": 4},
    ]
    dataset = read_coco(write_coco(tmp_path, content), "val")
    assert [len(one.boxes) for one in dataset.images] == [2, 1] == [len(one.masks) for one in dataset.images]
    assert dataset.images[1].boxes.tolist() == [[4.5, 1, 6, 3]]
    assert (dataset.num_without_area, dataset.num_without_mask, dataset.num_clipped, dataset.num_empty) == (1, 2, 1, 0)
    assert len(dataset.notes) == 3


# --- masks


def test_runs_go_down_the_columns():
    assert fill_runs(np.array([1, 2, 2, 1]), 2, 3).tolist() == [[0, 1, 0], [1, 0, 1]]
    assert fill_runs(np.array([0, 6]), 2, 3).tolist() == [[1] * 3] * 2


def test_polygons_worked_by_hand():
    rectangle = np.array([[1.0, 1], [4, 1], [4, 3], [1, 3]])
    expected = [[0] * 5, [0, 1, 1, 1, 0], [0, 1, 1, 1, 0], [0] * 5]
    assert fill_polygon(rectangle, 4, 5).tolist() == expected
    assert fill_polygon(rectangle[::-1], 4, 5).tolist() == expected
    triangle = np.array([[0, 0], [4.4, 0], [0, 4.4]])  # a centre is inside where column + row + 1 < 4.4
    assert fill_polygon(triangle, 4, 4).tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert fill_polygon(np.array([[-5.0, -5], [9, -5], [9, 9], [-5, 9]]), 2, 3).tolist() == [[1] * 3] * 2
    assert not fill_polygon(np.array([[1.0, 1], [1, 1], [1, 1]]), 4, 4).any()


def test_polygons_of_one_object_are_joined(tmp_path):
    content = coco_content()
    content["annotations"][0]["segmentation"] = [[0, 0, 4, 0, 4, 2, 0, 2], [2, 0, 6, 0, 6, 2, 2, 2]]  # they overlap
    image = read_coco(write_coco(tmp_path, content), "val").images[0]
    assert decode_masks(image)[0].tolist() == [[1] * 6] * 2 + [[0] * 6] * 2


def test_polygons_are_the_pixels_whose_centre_is_inside():
    """Ray casting at every centre; only centres within a third of a pixel of the outline may differ."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:30, :40] + 0.5
    for _ in range(30):
        points = rng.uniform(-4, 44, (rng.integers(3, 9), 2))
        inside, distance = np.zeros((30, 40), bool), np.full((30, 40), np.inf)
        for (x1, y1), (x2, y2) in zip(points, np.roll(points, -1, 0), strict=True):
            inside ^= ((y1 > y) != (y2 > y)) & (x < x1 + (y - y1) * (x2 - x1) / (y2 - y1))
            share = np.clip(((x - x1) * (x2 - x1) + (y - y1) * (y2 - y1)) / ((x2 - x1) ** 2 + (y2 - y1) ** 2), 0, 1)
            distance = np.minimum(distance, np.hypot(x - x1 - share * (x2 - x1), y - y1 - share * (y2 - y1)))
        clear = distance > 1 / 3
        assert clear.mean() > 0.5 and (fill_polygon(points, 30, 40) == inside)[clear].all()


def test_polygons_are_those_of_pycocotools():
    rng = np.random.default_rng(1)
    for _ in range(300):
        height, width = map(int, rng.integers(1, 40, 2))
        points = rng.uniform(-3, 42, (rng.integers(3, 12), 2)).round(2)
        theirs = mask_api.decode(mask_api.merge(mask_api.frPyObjects([points.ravel().tolist()], height, width)))
        assert (fill_polygon(points, height, width) == theirs).all()


# --- files that are not whole


def spoil_xml(text):
    def spoil(root):
        (root / "VOC2007/Annotations/000007.xml").write_text(text)

    return spoil


def spoil_list(text):
    def spoil(root):
        (root / "VOC2007/ImageSets/Main/trainval.txt").write_text(text)

    return spoil


def drop(path):
    return lambda root: (root / path).unlink()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (shutil.rmtree, r"does not exist; give the folder"),
        (lambda root: [shutil.rmtree(root / year) for year in ("VOC2007", "VOC2012")], r"holds no VOC2007 or VOC2012"),
        (drop("VOC2012/ImageSets/Main/trainval.txt"), r"VOC2012/ImageSets/Main/trainval.txt does not exist; unpack"),
        (drop("VOC2007/JPEGImages/000007.jpg"), r"1 of 1 files that .* are not there, first .*JPEGImages/000007.jpg"),
        (drop("VOC2007/Annotations/000007.xml"), r"1 of 1 files that .*Annotations/000007.xml"),
        (spoil_xml("\x89PNG"), r"000007.xml is no VOC annotation"),
        (spoil_xml("<annotation/>"), r"000007.xml is no VOC annotation"),
        (spoil_xml(xml(("cat", 0, ("a", 1, 2, 3)))), r"000007.xml is no VOC annotation.*'a'"),
        (spoil_xml(xml(("cat", 0, ("inf", 1, 2, 3)))), r"000007.xml is no VOC annotation"),
        (spoil_xml(xml(width=0)), r"000007.xml says that .* is 0 x 10 pixels"),
        (spoil_xml(xml(("unicorn", 0, (1, 1, 2, 2)))), r"object 1 of .*000007.xml is a 'unicorn', which is none of VOC's"),
        (
            spoil_xml(xml(("cat", 0, (30, 1, 40, 9)))),
            r"object 1 of .* the box \[29.0, 0.0, 39.0, 8.0\], outside its image of 20",
        ),
        (spoil_list("000007\n000007\n"), r"trainval.txt has the line '000007'; it takes one name a line, each once"),
        (spoil_list("000007 -1\n"), r"trainval.txt has the line '000007 -1'"),
        (spoil_list("\n"), r"trainval.txt is empty"),
    ],
)
def test_a_voc_folder_that_is_not_whole(voc, spoil, says):
    spoil(voc)
    with pytest.raises(UsageError, match=says) as error:
        read_voc_detection(voc)
    assert "\n" not in str(error.value)


def test_splits_that_are_none(voc, tmp_path):
    with pytest.raises(UsageError, match="no split 'validation'; give train, val, trainval, test"):
        read_voc_detection(voc, split="validation")
    with pytest.raises(UsageError, match="no split 'test'; give train, val"):
        read_coco(tmp_path, "test")
    with pytest.raises(UsageError, match="holds no VOC2007 with test"):
        read_voc_detection(voc, ("VOC2012",), "test")


def annotation(**changes):
    return lambda content: content["annotations"][0].update(changes)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda content: content.pop("categories"), r"is no file of COCO instances \(KeyError\('categories'\)\)"),
        (lambda content: content["images"][0].pop("width"), r"is no file of COCO instances \(KeyError\('width'\)\)"),
        (lambda content: content["images"].clear(), r"lists no images or no categories"),
        (lambda content: content["images"][0].update(id=4), r"has two entries with the id 4"),
        (lambda content: content["images"][0].update(width="6"), r"9.jpg is '6' x 4 pixels; correct it"),
        (lambda content: content["images"][0].update(height=0), r"9.jpg is 6 x 0 pixels"),
        (lambda content: content["images"][0].update(file_name="8.jpg"), r"1 of 2 files .* first .*val2017/8.jpg"),
        (annotation(image_id=5), r"annotation 1 of .* has the image_id 5, which the file does not list"),
        (annotation(category_id=1), r"annotation 1 of .* has the category_id 1, which the file does not list"),
        (annotation(bbox=[1, 1, 2]), r"annotation 1 of .* has no box x, y, w, h"),
        (
            annotation(bbox=[7, 1, 2, 2]),
            r"annotation 1 of .* has the box \[7.0, 1.0, 9.0, 3.0\], outside its image of 6 x 4",
        ),
        (annotation(segmentation=[[1, 1, 2, "a", 3, 3]]), r"annotation 1 of .* no proper outline"),
        (
            annotation(segmentation=[[1, 1, 2, float("nan"), 3, 3]]),
            r"annotation 1 of .* no proper outline \(a corner is no number\)",
        ),
        (
            annotation(segmentation={"size": [6, 4], "counts": [4, 8, 12]}),
            r"mask of \[6, 4\] with 24 pixels, its image is 4 x 6",
        ),
        (
            annotation(segmentation={"size": [4, 6], "counts": [4, 8]}),
            r"mask of \[4, 6\] with 12 pixels, its image is 4 x 6",
        ),
        (annotation(segmentation={"size": [4, 6], "counts": "PQk4"}), r"compressed runs, which are not read"),
        (lambda content: [one.pop("segmentation") for one in content["annotations"]], r"no object .* has an outline"),
    ],
)
def test_a_coco_file_that_is_not_whole(tmp_path, spoil, says):
    content = coco_content()
    spoil(content)
    with pytest.raises(UsageError, match=says) as error:
        read_coco(write_coco(tmp_path, content), "val")
    assert "\n" not in str(error.value)


def test_a_coco_folder_that_is_not_whole(tmp_path):
    with pytest.raises(UsageError, match=r"instances_val2017.json does not exist; give the folder"):
        read_coco(tmp_path, "val")
    root = write_coco(tmp_path, coco_content())
    shutil.rmtree(root / "val2017")
    with pytest.raises(UsageError, match=r"2 of 2 files .* are not there"):
        read_coco(root, "val")
    (root / "annotations/instances_val2017.json").write_text('{"images": [')
    with pytest.raises(UsageError, match=r"is no file of COCO instances"):
        read_coco(Folder(root), "val")


def test_an_absurd_corner_costs_nothing(tmp_path):
    content = coco_content()
    content["annotations"][0]["segmentation"] = [[1, 1, 1e12, 1, 1e12, 3, 1, 3]]
    image = read_coco(write_coco(tmp_path, content), "val").images[0]
    assert decode_masks(image)[0].tolist() == [[0] * 6] + [[0] + [1] * 5] * 2 + [[0] * 6]


def test_images_of_another_size_or_none_are_found_before_a_run(voc):
    dataset = read_voc_detection(voc)
    with pytest.raises(UsageError, match=r"2008_000001.jpg is 10 x 20 and annotated as 10 x 60") as error:  # of the fixture
        check_images(dataset)
    assert re.search(r"images and annotations must be of one size$", str(error.value))
    (voc / "VOC2007/JPEGImages/000007.jpg").write_bytes(b"<html>")
    with pytest.raises(UsageError, match=r"000007.jpg cannot be read as an image"):
        check_images(dataset)
