"""The scorecard's file, and its tables: a number from part of a set never stands in a table of the full set."""

import json
import math

import numpy as np
import pytest

from raydc.benchmarks import scorecard
from raydc.benchmarks.scorecard import FULL_SET, Row
from raydc.config import RunError, UsageError
from raydc.storage import Folder

PART = "imagenette: 9,469 of 1,281,167 training images"
WHOLE = "ImageNet: all 1,281,167 training images"


def row(**changes) -> Row:
    values = {"benchmark": "linear_imagenet", "column": "feature4", "value": 61.07, "data": PART, "backbone": "ours"}
    return Row(**values | changes)


def blocks(text: str) -> dict[str, list[str]]:
    """Lines under each heading of one benchmark's terminal tables; headings stand two spaces in, tables four."""
    found = {}
    for line in text.splitlines():
        if line.startswith("  ") and not line.startswith("   "):
            found[line.strip()] = []
        elif line.startswith("    "):
            found[list(found)[-1]].append(line)
    return found


# --- the file -----------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path):
    rows = [
        row(),
        row(column="AvgPool", value=46.5, seeds=3, spread=0.25, notes=("BatchNorm, not SyncBN",)),
        row(benchmark="svm", column="best", full=True, data="VOC2007, all of it"),
    ]
    scorecard.write(Folder(tmp_path), rows)
    assert scorecard.read(Folder(tmp_path)) == rows


def test_the_file_carries_the_published_numbers_of_the_same_column(tmp_path):
    scorecard.write(Folder(tmp_path), [row(benchmark="lowshot", column="k=1", value=np.float32(12.5), spread=np.float64(1))])
    (written,) = json.loads((tmp_path / "scorecard.json").read_text())["rows"]
    listed = written.pop("published")
    assert written == {
        "benchmark": "lowshot",
        "column": "k=1",
        "value": 12.5,
        "data": PART,
        "backbone": "ours",
        "full": False,
        "seeds": 1,
        "spread": 1.0,
    }
    mine = [one for one in listed if one["method"] == "DeepCluster (Sobel)"]
    assert mine == [
        {"method": "DeepCluster (Sobel)", "value": 29.73, "source": "OpenSelfSup MODEL_ZOO"},
        {"method": "DeepCluster (Sobel)", "value": 29.37, "source": "mmselfsup 0.x READMEs"},
    ]


def test_of_the_same_number_the_later_wins():
    first, other = row(value=1), row(backbone="random", value=2)
    again, full = row(value=3, seeds=2), row(data=WHOLE, full=True, value=4)
    assert scorecard.merge([first, other], [again], [full]) == [again, other, full]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"value": math.nan}, "linear_imagenet feature4 of ours on imagenette: 9,469 of .* is nan"),
        ({"value": math.inf}, "is inf, not a percentage"),
        ({"value": -1}, "is -1, not a percentage"),
        ({"value": 5011}, "is 5011, not a percentage"),
        ({"spread": math.nan}, "has a spread of nan"),
        ({"data": " "}, "does not say what data"),
    ],
)
def test_a_number_that_cannot_be_stops_the_writing(tmp_path, changes, said):
    folder = Folder(tmp_path)
    scorecard.write(folder, [row()])
    before = (tmp_path / "scorecard.json").read_bytes()
    with pytest.raises(RunError, match=said):
        scorecard.write(folder, [row(column="AvgPool"), row(**changes)])
    assert (tmp_path / "scorecard.json").read_bytes() == before
    assert folder.names() == ["scorecard.json"]


def test_nothing_measured_yet_is_an_empty_scorecard(tmp_path):
    assert scorecard.read(Folder(tmp_path / "none")) == []
    assert scorecard.tables([]) == ""


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"rows": {"a": 1}}',
        '{"rows": [{"benchmark": "svm"}]}',
        '{"rows": [{"benchmark": "svm", "column": "best", "value": "x", "data": "d", "backbone": "b"}]}',
        '{"rows": [{"benchmark": "svm", "column": "best", "value": NaN, "data": "d", "backbone": "b"}]}',
        '{"rows": [{"benchmark": "svm", "column": "best", "value": 1, "data": "d", "backbone": "b", "top5": 2}]}',
        '{"rows": [{"benchmark": "svm", "column": "best", "value": 1, "data": null, "backbone": "b"}]}',
    ],
)
def test_a_file_that_is_no_scorecard_is_named(tmp_path, text):
    (tmp_path / "scorecard.json").write_text(text)
    with pytest.raises(UsageError, match=r"scorecard\.json is not a scorecard .*move it away"):
        scorecard.read(Folder(tmp_path))


# --- the tables ---------------------------------------------------------------------------------------------------------


def test_a_part_of_a_set_has_a_table_of_its_own():
    text = scorecard.tables([row(value=61.07), row(value=55.55, data=WHOLE, full=True)])
    found = blocks(text)
    assert list(found) == [f"measured, on the full set: {WHOLE}", f"measured, on {PART}", f"{FULL_SET} (ImageNet)"]
    holding = {heading for heading, lines in found.items() if any("61.07" in line for line in lines)}
    assert holding == {f"measured, on {PART}"}
    assert {heading for heading, lines in found.items() if any("55.55" in line for line in lines)} == {
        f"measured, on the full set: {WHOLE}"
    }


def test_two_parts_of_a_set_do_not_share_a_table():
    found = blocks(scorecard.tables([row(data="part A", value=11.01), row(data="part B", value=11.02)]))
    assert ["11.01" in line for line in found["measured, on part A"]] == [False, True]
    assert ["11.02" in line for line in found["measured, on part B"]] == [False, True]


def test_columns_stand_in_the_pages_order_with_a_dash_for_no_number():
    rows = [row(column=column, value=value) for column, value in (("AvgPool", 45.0), ("feature2", 20.5), ("other", 1.0))]
    mine = blocks(scorecard.tables(rows))[f"measured, on {PART}"]
    assert " ".join(mine[0].split()) == "backbone feature1 feature2 feature3 feature4 feature5 AvgPool other seeds"
    assert " ".join(mine[1].split()) == "ours - 20.50 - - - 45.00 1.00 1"


def test_a_line_is_a_backbone_and_a_spread_stands_beside_its_value():
    rows = [row(value=50.0, seeds=3, spread=0.456), row(column="AvgPool", seeds=3), row(backbone="random", value=5.0)]
    _, ours, random = blocks(scorecard.tables(rows))[f"measured, on {PART}"]
    assert " ".join(ours.split()) == "ours - - - 50.00 +- 0.46 - 61.07 3"
    assert " ".join(random.split()) == "random - - - 5.00 - - 1"


def test_the_published_lines_name_their_source_and_disagree_openly():
    lines = blocks(scorecard.tables([row(benchmark="lowshot", column="k=1")]))[f"{FULL_SET} (VOC07)"]
    ours = [line.strip() for line in lines if "DeepCluster" in line]
    assert [line.split("  ")[1:3] for line in ours] == [["29.73", "37.66"], ["29.37", "37.99"]]
    assert [line.split("  ")[-1] for line in ours] == ["OpenSelfSup MODEL_ZOO", "mmselfsup 0.x READMEs"]
    semi = blocks(scorecard.tables([row(benchmark="semisup_1percent", column="Top-1")]))[f"{FULL_SET} (ImageNet)"]
    (line,) = [line for line in semi if "DeepCluster" in line]
    assert line.endswith("33.44  58.62  OpenSelfSup MODEL_ZOO; lr .01, head x1; the only setting that was run")


def test_the_numbers_of_a_table_end_below_their_columns_name():
    lines = blocks(scorecard.tables([row(value=9.5), row(column="AvgPool", value=100.0)]))
    for header, *below in lines.values():
        end = header.index("AvgPool") + len("AvgPool")
        assert all(line[end - 1] in "0123456789-" and line[end : end + 2] == "  " for line in below), header


def test_a_benchmark_without_published_numbers_says_so():
    text = scorecard.tables([row(benchmark="linear_inat18"), row(benchmark="linear", column="Top-1", data="digits")])
    assert "No method has a published iNaturalist2018 number" in text
    assert FULL_SET not in text
    assert "No DeepCluster row is published" in scorecard.tables([row(benchmark="detection_coco", column="AP")])


def test_notes_stand_under_their_table_once():
    note = "cost chosen on the test set, as published"
    text = scorecard.tables([row(notes=(note,)), row(column="AvgPool", notes=(note,)), row(data="another part")])
    found = blocks(text)
    assert [line.strip() for line in found[f"measured, on {PART}"]][-1] == f"({note})"
    assert text.count(note) == 1


def test_benchmarks_follow_the_page():
    names = ["own", "segmentation_voc12aug", "knn", "semisup_1percent", "linear_places205", "lowshot", "svm"]
    text = scorecard.tables([row(benchmark=name, column="c") for name in names])
    assert [line for line in text.splitlines() if line in names] == names[::-1]


def test_a_readme_gets_the_same_numbers():
    """Every pipe table has as many cells in each line as in its header, and a part's number stays in its own table."""
    text = scorecard.markdown(
        [row(backbone="a|b", spread=0.5, notes=("BatchNorm, not SyncBN",)), row(data=WHOLE, full=True, value=55.5)]
    )
    assert text.startswith("### linear_imagenet\n")
    tables = {part.splitlines()[0]: part.split("\n\n")[1].splitlines() for part in text.split("**measured, on ")[1:]}
    part = next(lines for heading, lines in tables.items() if heading.startswith("imagenette"))
    assert part[2] == r"| a\|b | - | - | - | 61.07 +- 0.50 | - | - | 1 |"
    assert [line.count(" |") for line in part] == [8, 8, 8]
    full = next(lines for heading, lines in tables.items() if heading.startswith("the full set"))
    assert full[2] == "| ours | - | - | - | 55.50 | - | - | 1 |"
    assert "- BatchNorm, not SyncBN\n" in text


def test_a_note_on_some_columns_names_them():
    text = scorecard.tables([row(column="feature4", notes=("all", "some")), row(column="AvgPool", notes=("all",))])
    assert "    (all)" in text.splitlines() and "    (feature4: some)" in text.splitlines()
