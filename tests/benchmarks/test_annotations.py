"""All annotations of a split as flat arrays: every image comes back as it went in, and pickling costs nothing."""

import pickle

import numpy as np
import pytest

from raydc.benchmarks.annotations import AnnotatedImage, AnnotatedImages
from raydc.benchmarks.boxes import read_coco


def image(path: str, boxes: list, masks: tuple | None, flags: tuple[bool, bool] = (False, False)) -> AnnotatedImage:
    n = len(boxes)
    return AnnotatedImage(
        path=path,
        width=30,
        height=20,
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        labels=np.arange(n),
        difficult=np.full(n, flags[0]),
        crowd=np.full(n, flags[1]),
        masks=masks,
    )


def assert_equal(one: AnnotatedImage, other: AnnotatedImage) -> None:
    assert (one.path, one.width, one.height) == (other.path, other.width, other.height)
    for name in ("boxes", "labels", "difficult", "crowd"):
        left, right = getattr(one, name), getattr(other, name)
        assert left.dtype == right.dtype and np.array_equal(left, right), name
    assert (one.masks is None) == (other.masks is None)
    for left, right in zip(one.masks or (), other.masks or (), strict=True):
        assert isinstance(left, tuple) == isinstance(right, tuple)
        pairs = zip(left, right, strict=True) if isinstance(left, tuple) else [(left, right)]
        assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


TRIANGLE, LINE = np.array([[1.0, 2], [3, 4], [5, 0]]), np.array([[0.0, 0], [9, 9], [1, 8], [2, 7]])
RUNS = np.array([5, 10, 585], np.uint32)
IMAGES = [
    image("a.jpg", [[0, 0, 2, 2]], ((TRIANGLE, LINE),)),
    image("nothing.jpg", [], ()),
    image("a longer name.jpg", [[1, 1, 9, 9], [2, 2, 4, 4], [0, 0, 3, 3]], (RUNS, (LINE,), (TRIANGLE,)), (False, True)),
]


def test_images_come_back_as_they_went_in():
    packed = AnnotatedImages(IMAGES)
    assert len(packed) == 3
    for one, other in zip(packed, IMAGES, strict=True):
        assert_equal(one, other)
    assert_equal(packed[-1], IMAGES[2])
    with pytest.raises(IndexError):
        packed[3]


def test_boxes_alone_and_no_images_at_all():
    packed = AnnotatedImages([image("v.jpg", [[0, 0, 2, 2]], None, (True, False))])
    assert packed[0].masks is None and packed[0].difficult.tolist() == [True]
    assert list(AnnotatedImages([])) == []


def test_a_split_travels_in_a_dozen_buffers(real_data):
    images = read_coco(real_data / "coco", "train").images
    assert sum(len(one.boxes) for one in images) > 100
    buffers: list = []
    body = pickle.dumps(images, protocol=5, buffer_callback=buffers.append)
    assert len(buffers) <= 12 and len(body) < 10_000
    for one, other in zip(pickle.loads(body, buffers=buffers), images, strict=True):
        assert_equal(one, other)
