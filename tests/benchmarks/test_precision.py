"""Metrics of detection and segmentation: equal to pycocotools and sklearn, to cases worked by hand and to plain loops."""

import contextlib
import io
import json
import pickle
from fractions import Fraction

import numpy as np
import pytest
from pycocotools import mask as reference_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sklearn.metrics import jaccard_score

from raydc.benchmarks.boxes import AnnotatedImage, decode_masks, read_coco, read_voc_detection
from raydc.benchmarks.precision import (
    Detections,
    coco_precision,
    confusion,
    encode,
    mean_iou,
    per_class,
    voc07_precision,
)
from raydc.config import RunError


def image(boxes=(), labels=(), *, difficult=(), crowd=(), masks=None, size=(64, 64)):
    """An annotated image; ``difficult`` and ``crowd`` are rows."""
    flags = [np.isin(np.arange(len(labels)), rows) for rows in (difficult, crowd)]
    return AnnotatedImage(
        path="an.jpg",
        width=size[1],
        height=size[0],
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        labels=np.array(labels, np.int64),
        difficult=flags[0],
        crowd=flags[1],
        masks=masks,
    )


def detections(*rows, masks=None):
    """Of (score, label, x1, y1, x2, y2) each."""
    table = np.array(rows, np.float32).reshape(-1, 6)
    return Detections(boxes=table[:, 2:], scores=table[:, 0], labels=table[:, 1].astype(np.int64), masks=masks)


# --- COCO


def jitter(one: AnnotatedImage, num_classes: int, rng) -> tuple[Detections, np.ndarray]:
    """What a middling detector would find: shifted, repeated, mislabelled, some missed; and its masks' pixels."""
    kept = np.repeat(np.arange(len(one.labels)), rng.integers(0, 4, len(one.labels)))
    width, height = np.repeat(one.boxes[kept, 2:] - one.boxes[kept, :2], 2, axis=1).reshape(-1, 2, 2)[:, :, 0].T
    shift = rng.normal(0, 0.08, (len(kept), 4)) * np.stack([width, height, width, height], 1)
    boxes = (one.boxes[kept] + shift).astype(np.float32)
    wrong = rng.random(len(kept)) < 0.15
    labels = np.where(wrong, rng.integers(0, num_classes, len(kept)), one.labels[kept])
    pixels = decode_masks(one)[kept]
    for mask, moved in zip(pixels, shift, strict=True):
        mask[:] = np.roll(mask, (round(moved[1]), round(moved[0])), (0, 1))
    scores = rng.random(len(kept)).astype(np.float32)
    return Detections(boxes=boxes, scores=scores, labels=labels, masks=encode(pixels)), pixels


def pycocotools_figures(file, found, pixels, kind) -> list[float]:
    """AP, AP50 and AP75 by the official code, of the annotations as published."""
    content = json.loads(file.read_text())
    answers = []
    for entry, one, masks in zip(content["images"], found, pixels, strict=True):
        for box, score, label, mask in zip(one.boxes.astype(float), one.scores, one.labels, masks, strict=True):
            answer = {"image_id": entry["id"], "category_id": content["categories"][label]["id"], "score": float(score)}
            outline = {"segmentation": reference_masks.encode(np.asfortranarray(mask))}
            answers.append(answer | ({"bbox": [*box[:2], *(box[2:] - box[:2])]} if kind == "bbox" else outline))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(file)
        evaluation = COCOeval(truth, truth.loadRes(answers), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [100 * float(value) for value in evaluation.stats[:3]]


@pytest.mark.parametrize(("split", "seed"), [("val", 0), ("val", 1), ("train", 2)])
def test_coco_figures_are_those_of_pycocotools(real_data, split, seed):
    dataset = read_coco(real_data / "coco", split)
    assert sum(one.crowd.sum() for one in dataset.images) >= 2
    rng = np.random.default_rng(seed)
    found, pixels = zip(*(jitter(one, len(dataset.classes), rng) for one in dataset.images), strict=True)
    figures = coco_precision(found, dataset.images, masks=True)
    file = real_data / "coco" / "annotations" / f"instances_{split}2017.json"
    boxes = pycocotools_figures(file, found, pixels, "bbox")
    masks = pycocotools_figures(file, found, pixels, "segm")
    assert list(figures) == ["AP", "AP50", "AP75", "mask AP", "mask AP50", "mask AP75"]
    assert list(figures.values()) == pytest.approx([*boxes, *masks], abs=1e-4)
    assert 10 < boxes[0] < boxes[1] < 90  # neither all right nor all wrong
    assert 10 < masks[0] < masks[1] < 90
    assert coco_precision(found, dataset.images, masks=False) == {name: figures[name] for name in ("AP", "AP50", "AP75")}


def test_the_truth_itself_has_a_precision_of_100(real_data):
    true = read_coco(real_data / "coco", "val").images
    found = [
        Detections(boxes=one.boxes, scores=np.ones(len(one.labels)), labels=one.labels, masks=encode(decode_masks(one)))
        for one in true
    ]
    assert set(coco_precision(found, true, masks=True).values()) == {100.0}
    voc = read_voc_detection(real_data / "voc07", split="test").images
    found = [Detections(boxes=one.boxes, scores=np.ones(len(one.labels)), labels=one.labels) for one in voc]
    assert sum(one.difficult.sum() for one in voc) > 0
    assert set(voc07_precision(found, voc, 20).values()) == {100.0}
    assert coco_precision(found, voc, masks=False)["AP"] == 100.0


def test_found_nothing_at_all_is_zero(real_data):
    true = read_coco(real_data / "coco", "val").images
    found = [detections() for _ in true]
    assert set(coco_precision(found, true, masks=True).values()) == {0.0}
    assert set(voc07_precision(found, true, 80).values()) == {0.0}


def test_coco_worked_by_hand():
    """Two classes: one found with IoU .8 (right at .5 ... .8, 7 of 10), one missed; a third class has no objects."""
    true = [image([(0, 0, 10, 10), (30, 30, 50, 50)], [0, 2])]
    found = [detections((0.9, 0, 0, 0, 10, 8), (0.8, 1, 30, 30, 50, 50))]
    assert coco_precision(found, true, masks=False) == pytest.approx({"AP": 35, "AP50": 50, "AP75": 50})


@pytest.mark.parametrize("kind", ["difficult", "crowd"])
def test_what_no_one_is_asked_to_find_counts_neither_way(kind):
    """The class of label 1 has nothing else, and is in no mean."""
    true = [image([(0, 0, 20, 20), (30, 30, 60, 60), (5, 40, 15, 50)], [0, 0, 1], **{kind: (1, 2)})]
    right, wrong = (0.5, 0, 0, 0, 20, 20), (0.9, 0, 30, 5, 60, 12)
    on_it, of_its_class = (0.8, 0, 30, 30, 60, 60), (0.7, 1, 5, 40, 15, 50)
    for measure in (
        lambda *pair: coco_precision(*pair, masks=False)["AP50"],
        lambda *pair: voc07_precision(*pair, 2)["VOC07 AP50"],
    ):
        assert measure([detections(right)], true) == 100
        assert measure([detections(right, on_it, on_it, of_its_class)], true) == 100
        assert measure([detections(right, wrong)], true) == pytest.approx(50)
        assert measure([detections(right, wrong, on_it, of_its_class)], true) == pytest.approx(50)


def test_masks_are_judged_by_their_pixels():
    """The box of a triangle fits, its own mask is the other half of the square."""
    half = (np.array([(0.0, 0.0), (40.0, 0.0), (0.0, 40.0)]),)
    true = [image([(0, 0, 40, 40)], [0], masks=(half,))]
    pixels = decode_masks(true[0])
    other = np.zeros_like(pixels)
    other[:, :40, :40] = 1 - pixels[:, :40, :40]
    row = (0.9, 0, 0, 0, 40, 40)
    right = coco_precision([detections(row, masks=encode(pixels))], true, masks=True)
    wrong = coco_precision([detections(row, masks=encode(other.astype(bool)))], true, masks=True)
    assert right["AP"] == wrong["AP"] == right["mask AP"] == 100 and wrong["mask AP50"] == 0


def test_encoded_masks_are_readable_by_pycocotools_and_small():
    rows, columns = np.ogrid[:480, :640]
    pixels = np.stack([(rows - 5 * n) ** 2 + (columns - 6 * n) ** 2 < (n + 3) ** 2 for n in range(100)])
    encoded = encode(pixels)
    rle = [{"size": [encoded.height, encoded.width], "counts": one} for one in encoded.runs]
    assert np.array_equal(reference_masks.decode(rle).transpose(2, 0, 1), pixels)
    assert len(pickle.dumps(encoded)) < pixels.nbytes / 300
    assert encode(pixels[:0]).runs == ()


# --- VOC2007


def test_eleven_points_worked_by_hand():
    """Class 0: right, repeated, wrong class, right with an IoU of 50 / 100 pixels: precision 1 up to recall .5, then .5.

    Class 1 is missed and class 2 has no object: (8.5 / 11 + 0) / 2.
    """
    true = [
        image([(0, 0, 9, 9), (50, 50, 59, 59), (20, 20, 29, 29)], [0, 0, 1], difficult=[1]),
        image([(0, 0, 9, 9)], [0]),
    ]
    found = [
        detections(
            (0.6, 0, 20, 20, 29, 29),
            (0.7, 0, 51, 51, 60, 60),
            (0.8, 0, 0, 0, 9, 9),
            (0.9, 0, 0, 0, 9, 9),
            (0.95, 2, 0, 0, 9, 9),
        ),
        detections((0.5, 0, 0, 0, 9, 4)),
    ]
    assert voc07_precision(found, true, 3)["VOC07 AP50"] == pytest.approx(100 * 4.25 / 11)


def test_a_recall_of_three_tenths_is_reached_by_three_of_ten():
    """Right for recalls 0, .1, .2 and .3."""
    true = [image([(0, 0, 9, 9)], [0]) for _ in range(10)]
    found = [detections(*[(0.9, 0, 0, 0, 9, 9)] * (n < 3)) for n in range(10)]
    assert voc07_precision(found, true, 1)["VOC07 AP50"] == pytest.approx(100 * 4 / 11)


def plain_overlap(a, b) -> Fraction:
    a, b = [int(side) for side in a], [int(side) for side in b]
    wide, high = min(a[2], b[2]) - max(a[0], b[0]) + 1, min(a[3], b[3]) - max(a[1], b[1]) + 1
    shared = max(wide, 0) * max(high, 0)
    areas = [(one[2] - one[0] + 1) * (one[3] - one[1] + 1) for one in (a, b)]
    return Fraction(shared, sum(areas) - shared)


def plain_voc07(found, true, num_classes) -> float:
    """The devkit's rules, one detection after the other."""
    means = []
    for label in range(num_classes):
        total = sum(int(((one.labels == label) & ~one.difficult).sum()) for one in true)
        if not total:
            continue
        rows = [
            (one.scores[n], i, n) for i, one in enumerate(found) for n in range(len(one.scores)) if one.labels[n] == label
        ]
        taken, right, wrong, curve = set(), 0, 0, []
        for _, i, n in sorted(rows, key=lambda row: -row[0]):
            overlaps = {
                m: plain_overlap(found[i].boxes[n], true[i].boxes[m]) for m in np.flatnonzero(true[i].labels == label)
            }
            best = max(overlaps, key=overlaps.get, default=None)
            if best is not None and 2 * overlaps[best] >= 1:
                if true[i].difficult[best]:
                    continue
                right, wrong = right + ((i, best) not in taken), wrong + ((i, best) in taken)
                taken.add((i, best))
            else:
                wrong += 1
            curve.append((Fraction(right, total), Fraction(right, right + wrong)))
        points = [max([p for recall, p in curve if recall >= Fraction(t, 10)], default=0) for t in range(11)]
        means.append(sum(points) / 11)
    return float(100 * sum(means) / len(means))


@pytest.mark.parametrize("seed", range(6))
def test_eleven_points_are_those_of_a_plain_loop(seed):
    """Crowded images, so that objects overlap, are taken twice and lie beside difficult ones."""
    rng = np.random.default_rng(seed)
    scores, true, found = iter(rng.permutation(4000) / 4000), [], []
    for _ in range(30):
        n = rng.integers(0, 8)
        low = rng.integers(0, 30, (n, 2))
        boxes = np.hstack([low, low + rng.integers(5, 20, (n, 2))])
        labels = rng.integers(0, 4, n)
        true.append(image(boxes, labels, difficult=np.flatnonzero(rng.random(n) < 0.25)))
        drawn = np.repeat(np.arange(n), rng.integers(0, 5, n))
        moved = boxes[drawn] + rng.integers(-3, 4, (len(drawn), 4))
        guess = np.where(rng.random(len(drawn)) < 0.2, rng.integers(0, 5, len(drawn)), labels[drawn])
        found.append(detections(*((next(scores), label, *box) for label, box in zip(guess, moved, strict=True))))
    figure = voc07_precision(found, true, 5)["VOC07 AP50"]
    assert figure == pytest.approx(plain_voc07(found, true, 5), abs=1e-9) and 5 < figure < 95


# --- segmentation


def test_mean_iou_worked_by_hand():
    """Class 0: 2 of 3 pixels, class 1: 1 of 3, class 2 predicted only, class 3 nowhere; one pixel is ignored."""
    labels = np.array([[0, 0, 0], [1, 1, 255]], np.uint8)
    predicted = np.array([[0, 0, 1], [1, 2, 3]], np.uint8)
    matrix = confusion(predicted, labels, 4)
    assert matrix.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert per_class(matrix) == pytest.approx([200 / 3, 100 / 3, 0, np.nan], nan_ok=True)
    assert mean_iou(matrix) == pytest.approx(100 / 3)


def test_mean_iou_is_that_of_sklearn_over_all_images():
    rng = np.random.default_rng(0)
    labels = rng.choice([*range(17), 255], (6, 40, 50)).astype(np.uint8)
    predicted = np.where(rng.random(labels.shape) < 0.5, labels % 17, rng.integers(0, 19, labels.shape)).astype(np.uint8)
    matrix = sum(confusion(one, other, 21) for one, other in zip(predicted, labels, strict=True))
    plain = np.zeros((21, 21), np.int64)
    np.add.at(plain, (labels[labels < 255], predicted[labels < 255]), 1)
    assert matrix.dtype == np.int64 and np.array_equal(matrix, plain)
    known = labels < 255
    expected = jaccard_score(labels[known], predicted[known], labels=range(19), average=None)
    assert per_class(matrix)[:19] == pytest.approx(100 * expected) and np.isnan(per_class(matrix)[19:]).all()
    assert mean_iou(matrix) == pytest.approx(100 * expected.mean())


# --- what cannot be measured


@pytest.mark.parametrize("true", [[], [image()], [image([(0, 0, 9, 9)] * 2, [0, 3], difficult=[0], crowd=[1])]])
def test_a_split_without_objects_is_refused(true):
    found = [detections() for _ in true]
    for measure in (lambda: coco_precision(found, true, masks=False), lambda: voc07_precision(found, true, 4)):
        with pytest.raises(RunError, match=f"the {len(true)} images of the split have no object .* give a split"):
            measure()


@pytest.mark.parametrize("row", [(np.nan, 0, 0, 0, 9, 9), (0.5, 0, 0, 0, np.inf, 9)])
def test_a_diverged_detector_is_named(row):
    with pytest.raises(RunError, match="not finite numbers: its training has diverged"):
        detections(row)


def test_what_does_not_belong_together_is_refused():
    true = [image([(0, 0, 9, 9)], [0], masks=(np.array([0, 64 * 64], np.uint32),))]
    row = (0.9, 0, 0, 0, 9, 9)
    small = encode(np.ones((1, 32, 64), bool))
    with pytest.raises(ValueError, match="2 images and annotations of 1"):
        coco_precision([detections(row)] * 2, true, masks=False)
    with pytest.raises(ValueError, match="masks of 32 x 64 in an image of 64 x 64"):
        coco_precision([detections(row, masks=small)], true, masks=True)
    with pytest.raises(ValueError, match="no masks in an image of 64 x 64"):
        coco_precision([detections(row)], true, masks=True)
    with pytest.raises(ValueError, match="an.jpg has boxes only"):
        coco_precision([detections(row)], [image([(0, 0, 9, 9)], [0])], masks=True)
    with pytest.raises(ValueError, match="not of the same detections"):
        detections(row, row, masks=small)
    with pytest.raises(ValueError, match="labels reach from 0 to 7, classes from 0 to 4"):
        voc07_precision([detections(row, (0.9, 7, 0, 0, 9, 9))], true, 5)
    with pytest.raises(ValueError, match="give bool or uint8"):
        encode(np.full((1, 4, 4), 0.2))


def test_label_images_that_cannot_be_are_refused():
    labels = np.full((4, 4), 255, np.uint8)
    with pytest.raises(RunError, match="no labelled pixel"):
        mean_iou(confusion(np.zeros((4, 4), np.uint8), labels, 3))
    with pytest.raises(ValueError, match="is 3; there are 3 classes"):
        confusion(np.zeros((4, 4), np.uint8), np.full((4, 4), 3, np.uint8), 3)
    with pytest.raises(ValueError, match="not of the same pixels"):
        confusion(np.zeros((4, 4), np.uint8), labels[:2], 3)
