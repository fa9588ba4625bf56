"""svm and lowshot from real images to a scorecard, on a few photos of the real set."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from raydc.benchmarks import voc07
from raydc.benchmarks.datasets import VOC_CLASSES, read_voc07
from raydc.benchmarks.options import Lowshot, Svm
from raydc.benchmarks.setting import open_backbone
from raydc.config import UsageError

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = {"trainval": 6, "test": 3}  # positives of each class, at least


@pytest.fixture(scope="module")
def few(real_data, tmp_path_factory) -> str:
    """A VOC2007 folder with some of the real images, every class several times."""
    whole = read_voc07(str(real_data / "voc07"))
    place = tmp_path_factory.mktemp("voc") / "VOC2007"
    (place / "JPEGImages").mkdir(parents=True)
    (place / "ImageSets" / "Main").mkdir(parents=True)
    for split, number in FEW.items():
        labels = whole.labels[split]
        rows = sorted({int(row) for column in labels.T for row in np.flatnonzero(column == 1)[:number]})
        for row in rows:
            shutil.copy(whole.paths[split][row], place / "JPEGImages")
        for column, name in enumerate(VOC_CLASSES):
            lines = [
                f"{whole.names[split][row][:-4]} {({1: 1, 0: -1, -1: 0})[int(labels[row, column])]:2d}\n" for row in rows
            ]
            (place / "ImageSets" / "Main" / f"{name}_{split}.txt").write_text("".join(lines))
    return str(place)


def test_svm_from_images_to_a_scorecard(few, tmp_path, run_dir):
    given = {"backbone": "", "data": few, "num_workers": 0, "threads": 1}
    layers = ("feature4", "feature5")
    asked = Svm(run_dir=str(tmp_path / "svm"), layers=layers, **given)
    rows = voc07.run_svm(asked, open_backbone(run_dir))
    values = {row.column: row.value for row in rows}
    assert values["best"] == max(values[layer] for layer in layers)
    best = max(layers, key=values.get)
    assert next(row for row in rows if row.column == "best").notes.count(f"best layer {best}") == 1
    data = read_voc07(few)
    prevalence = 100 * np.mean([(c == 1).sum() / (c >= 0).sum() for c in data.labels["test"].T])
    assert values["best"] > prevalence  # what random scores would have
    result = json.loads((tmp_path / "svm" / "result.json").read_text())["variants"][""]
    assert set(result["layers"]["feature5"]["per_class"]) == set(VOC_CLASSES)
    assert all("of 5,011 trainval" in row.data and not row.full for row in rows)
    assert voc07.run_svm(asked, open_backbone(run_dir)) == rows  # finished: only read


def test_lowshot_shares_the_extraction_and_labels_both_choices(few, tmp_path, run_dir, capsys):
    given = {"backbone": "", "data": few, "num_workers": 0, "threads": 1}
    voc07.run_svm(Svm(run_dir=str(tmp_path / "svm"), layers=("feature5",), **given), open_backbone(run_dir))
    capsys.readouterr()
    asked = Lowshot(run_dir=str(tmp_path / "lowshot"), shots=(1, 4), num_samples=2, **given)
    rows = voc07.run_lowshot(asked, open_backbone(run_dir))
    assert capsys.readouterr().out.count("has them") == 2
    kinds = {(row.benchmark, row.column): row for row in rows}
    assert set(kinds) == {(name, column) for name in ("lowshot", "lowshot_clean") for column in ("k=1", "k=4")}
    assert "cost chosen on the test set, as published" in kinds["lowshot", "k=4"].notes
    assert "cost chosen without looking at the test set" in kinds["lowshot_clean", "k=4"].notes
    assert kinds["lowshot", "k=1"].value >= kinds["lowshot_clean", "k=1"].value  # one chose on the test set
    assert all(row.seeds == 2 and row.spread is not None and "2 draws instead of 5" in row.notes for row in rows)


def test_too_many_shots_are_refused_before_anything_is_written(few, tmp_path, run_dir):
    asked = Lowshot(backbone="", data=few, run_dir=str(tmp_path / "lowshot"), num_workers=0)
    with pytest.raises(UsageError, match="96 shots need 96 positive images of every class"):
        voc07.run_lowshot(asked, open_backbone(run_dir))
    assert not Path(tmp_path / "lowshot").exists()
