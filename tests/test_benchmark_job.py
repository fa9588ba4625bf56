"""jobs/benchmark.py as a person uses it."""

import json
import runpy
from pathlib import Path

import pytest

JOB = runpy.run_path(str(Path(__file__).resolve().parents[1] / "jobs" / "benchmark.py"))
main = JOB["main"]
pytestmark = pytest.mark.usefixtures("one_thread")


def given(place: Path, name: str, **more) -> list[str]:
    fields = {"backbone": place / "run", "data": place / "shards", "run-dir": place / name, "num-workers": 0} | more
    return [name, *(str(word) for key, value in fields.items() for word in (f"--{key}", value))]


def test_knn_prints_its_table_and_where_it_is(place, capsys):
    assert main(given(place, "knn", threads=1)) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == str(place / "knn" / "scorecard.json")
    rows = json.loads((place / "knn" / "scorecard.json").read_text())["rows"]
    assert [row["column"] for row in rows] == ["k=10", "k=20", "k=100", "k=200"]
    ours = next(line for line in out.splitlines() if str(place / "run") in line and "." in line)
    assert f"{rows[0]['value']:.2f}" in ours
    assert "measured, on shards: 1,437 train, 360 val images, 10 classes" in out and "published, on the full set" in out


def test_all_runs_what_the_data_allow_and_goes_on(place, capsys):
    asked = given(place, "all", epochs=1, fractions=0.1, threads=1)
    assert main(asked) == 0
    first = capsys.readouterr().out
    rows = json.loads((place / "all" / "scorecard.json").read_text())["rows"]
    assert {row["benchmark"] for row in rows} == {"knn", "semisup_10percent", "linear_imagenet"}
    assert all(not row["full"] for row in rows)
    assert main(asked) == 0
    again = capsys.readouterr().out
    assert "img/s" not in again  # nothing is measured twice
    numbers = {f"{row['value']:.2f}" for row in rows}
    assert all(number in first and number in again for number in numbers)
    asked[asked.index("--epochs") + 1] = "2"
    assert main(asked) == 2  # another measurement may not take over its figures
    assert "epochs is 1 there and 2 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lineer"], "there is no benchmark 'lineer'; did you mean linear?"),
        (["--backbone", "x"], "the benchmark's name comes first"),
        (["knn", "--data", "x", "--run-dir", "y"], "BACKBONE"),
        (["knn", "--backbone", "nowhere", "--data", "x", "--run-dir", "y"], "nowhere is neither a run directory nor a file"),
        (["linear", "--backbone", "b", "--data", "x", "--run-dir", "y", "--presets", "z"], "did you mean --preset?"),
        (["linear", "--backbone", "b", "--data", "x", "--run-dir", "y", "--preset", "imagnet"], "imagenet"),
        (["linear", "--backbone", "b", "--data", "x", "--run-dir", "y", "--heads", "feature9"], "give feature1, feature2"),
        (["knn", "--bacbone", "b"], "there is no --bacbone; did you mean --backbone?"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("error: ") and said.count("\n") == 1


def test_data_that_are_neither_shards_nor_voc(place, tmp_path, capsys):
    asked = [
        "all",
        "--backbone",
        str(place / "run"),
        "--data",
        str(tmp_path),
        "--run-dir",
        str(tmp_path / "r"),
        "--num-workers",
        "0",
    ]
    assert main(asked) == 2
    assert "neither shards" in capsys.readouterr().err


def test_help_names_every_benchmark(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("linear", "knn", "svm", "lowshot", "semisup", "all"))
