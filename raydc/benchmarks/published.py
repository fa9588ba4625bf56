"""Published numbers of the ResNet-50 benchmarks, each with its source; all are percent, on the full official sets.

Not here: AlexNet and VGG16 figures of the DeepCluster paper, another network under other protocols.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Published:
    """One number of one table; ``value`` in percent."""

    benchmark: str
    column: str
    method: str
    value: float
    source: str
    setting: str = ""
    note: str = ""


# Images of the full sets: a figure measured on fewer is none of theirs.
OFFICIAL = {
    "imagenet": {"train": 1_281_167, "val": 50_000},
    "places205": {"train": 2_448_873, "val": 20_500},
    "inat18": {"train": 437_513, "val": 24_426},
    "voc07": {"trainval": 5_011, "test": 4_952},
    "voc0712": {"trainval": 16_551, "test": 4_952},
    "coco": {"train": 118_287, "val": 5_000},
    "voc12aug": {"train": 10_582, "val": 1_449},
    "cityscapes": {"train": 2_975, "val": 500},
}

SOURCES = {
    "O": "OpenSelfSup MODEL_ZOO",
    "M": "mmselfsup 0.x READMEs",
    "O=M": "OpenSelfSup MODEL_ZOO, mmselfsup 0.x READMEs",
    "M zoo": "mmselfsup 0.x model zoo",
    "PR": "mmselfsup PR #46",
    "O d2": "OpenSelfSup MODEL_ZOO (detectron2)",
    "M mmdet": "mmselfsup 0.x READMEs (mmdetection)",
    "M mmseg": "mmselfsup 0.x READMEs (mmsegmentation)",
    "MoCo d2": "MoCo repo (detectron2)",
    "SwAV": "SwAV README (its own linear protocol)",
}

_SOBEL = "the published model begins with a Sobel filter, which the detection framework could not load"

# What a reader looks for in vain, and why where that is known.
MISSING = {
    "linear_inat18": "No method has a published iNaturalist2018 number in the sources of these tables.",
    "knn": "No DeepCluster row is published for k-nearest neighbours.",
    "detection_voc0712": f"No DeepCluster row is published: {_SOBEL}; there is no ODC row either.",
    "detection_coco": f"No DeepCluster row is published: {_SOBEL}; there is no ODC row either.",
    "segmentation_voc12aug": f"No DeepCluster row is published, as for detection: {_SOBEL}; there is no ODC row either.",
    "segmentation_cityscapes": "No method has a published Cityscapes number in the sources of these tables.",
}

# A line is `method | source | a value under each column of the first line | setting | note`; "-" is no number.
TABLES = {
    # The note is the layer the number comes from, where it is known.
    "svm": """
    method              | from | best  | setting    | layer
    ImageNet supervised | O    | 87.17 |            | feature5
    Random init         | O    | 30.54 |            | feature2
    DeepCluster (Sobel) | O=M  | 74.26 |            | feature5
    ODC                 | O=M  | 78.42 |            | feature5
    Rel-Loc             | O    | 64.78 |            | feature4
    Rotation            | O    | 67.38 |            | feature4
    NPID                | O    | 74.50
    SimCLR              | O    | 78.95 | batch 256  | feature5
    SimCLR              | M    | 79.98
    MoCo v1             | O    | 79.18 |            | feature5
    MoCo v2             | O    | 84.26 |            | feature5
    MoCo v2             | M    | 84.04
    BYOL                | M    | 86.31
    SwAV                | M    | 87.00 | 200 epochs | feature5
    """,
    # The two sources of DeepCluster differ at k=1 and k=2 alone.
    "lowshot": """
    method              | from | k=1    k=2    k=4    k=8    k=16   k=32   k=64   k=96
    ImageNet supervised | O    | 52.99  63.55  73.70  78.79  81.76  83.75  85.18  85.97
    Random init         | O    |  9.15   9.39  11.09  12.30  14.30  17.41  21.32  23.77
    DeepCluster (Sobel) | O    | 29.73  37.66  45.85  55.57  62.48  66.15  70.00  71.37
    DeepCluster (Sobel) | M    | 29.37  37.99  45.85  55.57  62.48  66.15  70.00  71.37
    ODC                 | O=M  | 32.42  40.27  49.95  59.96  65.71  69.99  73.64  75.13
    Rel-Loc             | O    | 18.17  22.08  29.37  35.58  41.80  48.73  55.55  58.33
    Rotation            | O    | 18.91  23.33  30.57  38.22  45.83  52.23  58.08  61.11
    NPID                | O    | 24.19  31.24  39.69  50.99  59.03  64.40  68.69  70.84
    SimCLR              | O    | 32.45  40.76  50.40  59.01  65.45  70.13  73.58  75.35 | batch 256
    SimCLR              | M    | 35.02  42.79  54.87  61.91  67.38  71.88  75.56  77.40
    MoCo v1             | O    | 30.03  37.73  47.64  58.78  66.00  70.60  74.60  76.07
    MoCo v2             | O    | 43.00  52.48  63.43  71.74  76.35  78.90  81.31  82.45
    MoCo v2             | M    | 43.14  53.29  65.34  71.03  75.42  78.48  80.88  82.23
    BYOL                | M    | 45.37  56.83  68.47  74.12  78.30  81.53  83.56  84.73
    SwAV                | M    | 44.68  55.41  67.64  73.67  78.14  81.58  83.98  85.15 | 200 epochs
    """,
    # Top-1; so are Places205's.
    "linear_imagenet": """
    method                        | from  | feature1  feature2  feature3  feature4  feature5  AvgPool
    ImageNet supervised           | O     | 15.18     33.96     47.86     67.56     76.17     74.12
    Random init                   | O     | 11.37     16.21     13.47      9.07      6.54      4.35
    DeepCluster (Sobel)           | O=M   | 12.78     30.81     43.88     57.71     51.68     46.92
    DeepCluster (no Sobel, lr .3) | PR    |   -         -         -         -         -       50.398 | | top-5 72.62
    ODC                           | O=M   | 14.76     31.82     42.44     55.76     57.70     53.42
    ODC                           | M zoo |   -         -         -         -         -       53.43
    NPID                          | O     | 14.28     31.20     40.68     54.46     56.61     56.60
    SimCLR                        | O     | 17.09     31.37     41.38     54.35     61.57     60.06
    SimCLR                        | M     | 16.29     31.11     39.99     55.06     62.91     62.56  | SimSiam setting
    MoCo v1                       | O     | 15.32     33.08     44.68     57.27     60.60     61.02
    MoCo v2                       | O     | 14.74     32.81     44.95     61.61     66.73     67.69
    MoCo v2                       | M     | 15.96     34.22     45.78     61.11     66.24     67.58
    SwAV                          | M     | 16.98     34.96     49.26     65.98     70.74     70.47  | 200 epochs
    SwAV                          | SwAV  |   -         -         -         -         -       73.9   | 200 epochs
    SwAV                          | SwAV  |   -         -         -         -         -       75.3   | 800 epochs
    DeepCluster-v2                | SwAV  |   -         -         -         -         -       70.2   | 400 epochs, 2x224
    DeepCluster-v2                | SwAV  |   -         -         -         -         -       74.3   | 400 epochs, 2x160+4x96
    DeepCluster-v2                | SwAV  |   -         -         -         -         -       75.2   | 800 epochs, 2x224+6x96
    """,
    "linear_places205": """
    method              | from | feature1  feature2  feature3  feature4  feature5
    ImageNet supervised | O    | 21.27     36.10     43.03     51.38     53.05
    Random init         | O    | 17.19     21.70     19.23     14.59     11.73
    DeepCluster (Sobel) | O    | 18.80     33.93     41.44     47.22     42.61
    ODC                 | O    | 20.94     34.78     41.19     47.45     49.18
    ODC                 | M    | 19.28     34.09     40.90     47.04     48.35
    SimCLR              | O    | 22.55     34.14     40.35     47.15     51.64
    SimCLR              | M    | 20.60     33.62     38.86     45.25     50.91
    MoCo v1             | O    | 21.13     35.19     42.40     48.78     50.70
    MoCo v2             | O    | 21.88     35.75     43.65     49.99     52.57
    MoCo v2             | M    | 20.92     35.72     42.62     49.79     52.25
    SwAV                | M    | 23.33     35.45     43.13     51.98     55.09
    """,
    # The best of nine settings, but DeepCluster was run with one.
    "semisup_1percent": """
    method              | from | Top-1  Top-5
    ImageNet supervised | O    | 68.68  88.87 | lr .001, head x100
    Random init         | O    |  1.56   4.99 | lr .01, head x1
    DeepCluster (Sobel) | O    | 33.44  58.62 | lr .01, head x1    | the only setting that was run
    ODC                 | O    | 32.39  61.02 | lr .1, head x100
    Rel-Loc             | O    | 16.48  40.37
    Rotation            | O    | 18.98  44.05
    NPID                | O    | 27.95  54.37 | lr .01, head x100
    SimCLR              | O    | 36.09  64.50 | lr .01, head x100
    MoCo v1             | O    | 33.15  61.30 | lr .01, head x100
    MoCo v2             | O    | 39.07  68.31 | lr .01, head x100
    """,
    "semisup_10percent": """
    method              | from | Top-1  Top-5
    ImageNet supervised | O    | 74.53  92.19 | lr .001, head x10
    Random init         | O    | 21.78  44.24 | lr .01, head x1
    DeepCluster (Sobel) | O    | 52.94  77.96 | lr .01, head x1    | the only setting that was run
    ODC                 | O    | 58.15  82.55 | lr .1, head x10
    Rel-Loc             | O    | 53.86  79.62
    Rotation            | O    | 54.75  80.21
    NPID                | O    | 57.22  81.39
    SimCLR              | O    | 58.46  82.60
    MoCo v1             | O    | 60.08  84.02
    MoCo v2             | O    | 61.80  85.11
    """,
    "knn": """
    method  | from | k=10  k=20  k=100  k=200
    ODC     | M    | 38.5  39.1  37.8   36.9  | temperature .07
    MoCo v2 | M    | 55.6  55.7  53.7   52.5  | temperature .07
    SwAV    | M    | 60.5  60.6  59.0   57.6  | temperature .07
    """,
    # Both frameworks integrate precision over VOC2007's 11 points, at every overlap.
    "detection_voc0712": """
    method              | from    | VOC07 AP50  VOC07 AP  VOC07 AP75
    ImageNet supervised | O d2    | 81.58  54.19  59.80
    ImageNet supervised | MoCo d2 | 81.3   53.5   58.8
    Random init         | O d2    | 59.02  32.83  31.60
    Rel-Loc             | O d2    | 80.36  55.13  61.18
    Rel-Loc             | M mmdet | 79.70    -      -
    Rotation            | O d2    | 80.91  55.52  61.39
    Rotation            | M mmdet | 79.67    -      -
    NPID                | O d2    | 80.03  54.11  59.50
    NPID                | M mmdet | 79.52    -      -
    SimCLR              | O d2    | 79.41  51.54  55.63
    SimCLR              | M mmdet | 79.38    -      -
    MoCo v1             | O d2    | 81.38  55.95  62.23
    MoCo v2             | O d2    | 82.24  56.97  63.43
    MoCo v2             | M mmdet | 81.06    -      -
    MoCo v2             | MoCo d2 | 82.4   57.0   63.6   | 200 epochs
    BYOL                | O d2    | 79.60  49.00  52.80
    BYOL                | M mmdet | 80.35    -      -
    SwAV                | M mmdet | 77.64    -      -
    DenseCL             | M mmdet | 82.14    -      -
    """,
    # The two frameworks train different detectors, so compare within one.
    "detection_coco": """
    method              | from    | AP    AP50  AP75  mask AP  mask AP50  mask AP75
    ImageNet supervised | O d2    | 40.0  59.9  43.1  34.7     56.5       36.9  | C4, 2x
    Random init         | O d2    | 35.6  54.6  38.2  31.4     51.5       33.5  | C4, 2x
    SimCLR              | O d2    | 39.6   -     -    34.6      -          -    | C4, 2x
    MoCo v2             | O d2    | 41.0   -     -    35.6      -          -    | C4, 2x
    Rel-Loc             | M mmdet | 37.5   -     -    33.7      -          -    | FPN, 1x
    Rotation            | M mmdet | 37.9   -     -    34.2      -          -    | FPN, 1x
    NPID                | M mmdet | 38.5   -     -    34.6      -          -    | FPN, 1x
    SimCLR              | M mmdet | 38.7  58.1  42.4  34.9     55.3       37.5  | FPN, 1x
    MoCo v2             | M mmdet | 40.2  59.7  44.2  36.1     56.7       38.8  | FPN, 1x
    BYOL                | M mmdet | 40.9   -     -    36.8      -          -    | FPN, 1x
    SwAV                | M mmdet | 40.2  60.5  43.9  36.3     57.5       38.8  | FPN, 1x
    """,
    "segmentation_voc12aug": """
    method   | from    | mIoU
    Rel-Loc  | M mmseg | 63.49
    Rotation | M mmseg | 64.31
    NPID     | M mmseg | 65.45
    SimCLR   | M mmseg | 64.03
    MoCo v2  | M mmseg | 67.55
    BYOL     | M mmseg | 67.16
    SwAV     | M mmseg | 63.73
    DenseCL  | M mmseg | 69.47
    """,
}


def _expand(benchmark: str, table: str) -> list[Published]:
    """The numbers of one table of ``TABLES``; columns of its first line stand two spaces apart."""
    header, *lines = [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]
    columns = re.split(r"\s{2,}", header[2])
    found = []
    for method, source, values, *rest in lines:
        setting, note = [*rest, "", ""][:2]
        more = {"source": SOURCES[source], "setting": setting, "note": note}
        for column, value in zip(columns, values.split(), strict=True):
            if value != "-":
                found.append(Published(benchmark=benchmark, column=column, method=method, value=float(value), **more))
    return found


ROWS: tuple[Published, ...] = tuple(row for name, table in TABLES.items() for row in _expand(name, table))


def rows(benchmark: str, column: str | None = None) -> list[Published]:
    """What is published for a benchmark, in one column or in all; empty where nothing is (``MISSING`` says why)."""
    return [row for row in ROWS if row.benchmark == benchmark and column in (None, row.column)]
