"""The published numbers, checked against figures written out here from the sources' own tables."""

import collections

import pytest

from raydc.benchmarks import published

OSS = "OpenSelfSup MODEL_ZOO"
MMSELFSUP = "mmselfsup 0.x READMEs"
BOTH = f"{OSS}, {MMSELFSUP}"
SOBEL = "DeepCluster (Sobel)"

SPOT = [
    ("svm", "best", SOBEL, BOTH, 74.26),
    ("svm", "best", "ImageNet supervised", OSS, 87.17),
    ("svm", "best", "Random init", OSS, 30.54),
    ("svm", "best", "SwAV", MMSELFSUP, 87.0),
    ("svm", "best", "MoCo v2", OSS, 84.26),
    ("svm", "best", "MoCo v2", MMSELFSUP, 84.04),
    ("lowshot", "k=1", SOBEL, OSS, 29.73),
    ("lowshot", "k=1", SOBEL, MMSELFSUP, 29.37),
    ("lowshot", "k=2", SOBEL, OSS, 37.66),
    ("lowshot", "k=2", SOBEL, MMSELFSUP, 37.99),
    ("lowshot", "k=16", SOBEL, OSS, 62.48),
    ("lowshot", "k=96", SOBEL, MMSELFSUP, 71.37),
    ("lowshot", "k=64", "SimCLR", OSS, 73.58),
    ("lowshot", "k=64", "SimCLR", MMSELFSUP, 75.56),
    ("lowshot", "k=8", "BYOL", MMSELFSUP, 74.12),
    ("lowshot", "k=4", "NPID", OSS, 39.69),
    ("lowshot", "k=32", "Rotation", OSS, 52.23),
    ("linear_imagenet", "feature1", SOBEL, BOTH, 12.78),
    ("linear_imagenet", "feature4", SOBEL, BOTH, 57.71),
    ("linear_imagenet", "AvgPool", SOBEL, BOTH, 46.92),
    ("linear_imagenet", "AvgPool", "DeepCluster (no Sobel, lr .3)", "mmselfsup PR #46", 50.398),
    ("linear_imagenet", "AvgPool", "ODC", BOTH, 53.42),
    ("linear_imagenet", "AvgPool", "ODC", "mmselfsup 0.x model zoo", 53.43),
    ("linear_imagenet", "feature5", "ImageNet supervised", OSS, 76.17),
    ("linear_imagenet", "feature3", "Random init", OSS, 13.47),
    ("linear_imagenet", "AvgPool", "SimCLR", MMSELFSUP, 62.56),
    ("linear_imagenet", "feature2", "MoCo v2", MMSELFSUP, 34.22),
    ("linear_places205", "feature4", SOBEL, OSS, 47.22),
    ("linear_places205", "feature5", SOBEL, OSS, 42.61),
    ("linear_places205", "feature1", "ODC", OSS, 20.94),
    ("linear_places205", "feature1", "ODC", MMSELFSUP, 19.28),
    ("linear_places205", "feature5", "SwAV", MMSELFSUP, 55.09),
    ("semisup_1percent", "Top-1", SOBEL, OSS, 33.44),
    ("semisup_1percent", "Top-5", SOBEL, OSS, 58.62),
    ("semisup_1percent", "Top-1", "Random init", OSS, 1.56),
    ("semisup_1percent", "Top-5", "Rel-Loc", OSS, 40.37),
    ("semisup_10percent", "Top-1", SOBEL, OSS, 52.94),
    ("semisup_10percent", "Top-5", SOBEL, OSS, 77.96),
    ("semisup_10percent", "Top-1", "ODC", OSS, 58.15),
    ("knn", "k=10", "ODC", MMSELFSUP, 38.5),
    ("knn", "k=200", "SwAV", MMSELFSUP, 57.6),
    ("detection_voc0712", "VOC07 AP50", "ImageNet supervised", f"{OSS} (detectron2)", 81.58),
    ("detection_voc0712", "VOC07 AP75", "MoCo v2", f"{OSS} (detectron2)", 63.43),
    ("detection_voc0712", "VOC07 AP", "MoCo v2", "MoCo repo (detectron2)", 57.0),
    ("detection_voc0712", "VOC07 AP50", "BYOL", f"{MMSELFSUP} (mmdetection)", 80.35),
    ("detection_coco", "AP", "ImageNet supervised", f"{OSS} (detectron2)", 40.0),
    ("detection_coco", "mask AP75", "Random init", f"{OSS} (detectron2)", 33.5),
    ("detection_coco", "mask AP50", "SwAV", f"{MMSELFSUP} (mmdetection)", 57.5),
    ("detection_coco", "mask AP", "Rotation", f"{MMSELFSUP} (mmdetection)", 34.2),
    ("segmentation_voc12aug", "mIoU", "MoCo v2", f"{MMSELFSUP} (mmsegmentation)", 67.55),
]


@pytest.mark.parametrize(("benchmark", "column", "method", "source", "value"), SPOT)
def test_a_published_number_is_the_sources(benchmark, column, method, source, value):
    found = [one for one in published.rows(benchmark, column) if (one.method, one.source) == (method, source)]
    assert [one.value for one in found] == [value]


def test_the_number_of_values_in_each_table_is_the_sources():
    """Methods times columns, less the blanks, counted in the sources' tables."""
    counted = collections.Counter(row.benchmark for row in published.ROWS)
    assert counted == {
        "svm": 14,
        "lowshot": 15 * 8,
        "linear_imagenet": 11 * 6 + 2 + 5,  # two with AvgPool alone, five of the SwAV repository
        "linear_places205": 11 * 5,
        "semisup_1percent": 10 * 2,
        "semisup_10percent": 10 * 2,
        "knn": 3 * 4,
        "detection_voc0712": 11 * 3 + 8,  # mmdetection gives AP50 alone
        "detection_coco": 5 * 6 + 6 * 2,
        "segmentation_voc12aug": 8,
    }


def test_more_labels_never_hurt_a_published_low_shot_number():
    """A misread line would break the order that all sources share."""
    by_line = collections.defaultdict(list)
    for row in published.rows("lowshot"):
        by_line[row.method, row.source].append(row.value)
    assert len(by_line) == 15
    assert all(values == sorted(values) and len(values) == 8 for values in by_line.values())


def test_top5_is_above_top1_and_a_mask_below_its_box():
    for benchmark, upper, lower in (
        ("semisup_1percent", "Top-5", "Top-1"),
        ("semisup_10percent", "Top-5", "Top-1"),
        ("detection_voc0712", "VOC07 AP50", "VOC07 AP75"),
        ("detection_voc0712", "VOC07 AP75", "VOC07 AP"),
        ("detection_coco", "AP50", "AP"),
        ("detection_coco", "AP", "mask AP"),
        ("detection_coco", "mask AP50", "mask AP"),
    ):
        above = {(row.method, row.source): row.value for row in published.rows(benchmark, upper)}
        below = {(row.method, row.source): row.value for row in published.rows(benchmark, lower)}
        shared = [line for line in above.keys() & below.keys() if line[0] != "Random init"]
        assert len(shared) >= 3
        assert all(above[line] > below[line] for line in shared), (benchmark, upper, lower)


def test_every_line_says_where_it_comes_from_once():
    lines = collections.Counter((row.benchmark, row.column, row.method, row.source, row.setting) for row in published.ROWS)
    assert set(lines.values()) == {1}
    assert all(row.source and 0 < row.value < 100 for row in published.ROWS)


def test_settings_and_notes_stay_with_their_line():
    (semi,) = [one for one in published.rows("semisup_1percent", "Top-1") if one.method == SOBEL]
    assert (semi.setting, semi.note) == ("lr .01, head x1", "the only setting that was run")
    (svm,) = [one for one in published.rows("svm") if one.method == "Random init"]
    assert (svm.setting, svm.note) == ("", "feature2")
    (plain,) = [one for one in published.rows("linear_imagenet") if one.source == "mmselfsup PR #46"]
    assert (plain.setting, plain.note) == ("", "top-5 72.62")


def test_what_is_not_published_has_a_sentence_instead():
    assert published.rows("linear_inat18") == []
    for benchmark in ("knn", "detection_voc0712", "detection_coco", "segmentation_voc12aug"):
        assert not [one for one in published.rows(benchmark) if "DeepCluster" in one.method]
        assert "No DeepCluster" in published.MISSING[benchmark]
    assert "iNaturalist2018" in published.MISSING["linear_inat18"]


def test_a_table_with_a_number_too_few_does_not_load():
    with pytest.raises(ValueError):
        published._expand("knn", "method | from | k=10  k=20\nODC | M | 38.5")
