"""make_shards from source to manifest: ids, order, unreadable images, restarts; and its command line."""

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from raydc.data import ingest
from raydc.data.ingest import IngestError, make_shards
from raydc.data.schema import ShardError
from raydc.data.shards import labels, names, open_manifest, read_columns
from raydc.storage import Folder

JOB = Path(__file__).resolve().parents[2] / "jobs" / "make_shards.py"
BAD = {3: b"", 17: b"this is text", 40: None, 59: None}  # None: truncated


DIGITS = load_digits()


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray((DIGITS.images[number] * 15).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def digits_tree(tmp_path) -> Path:
    """60 digits as PNG files in class folders; names are unique by number."""
    source = tmp_path / "source"
    for number in range(60):
        folder = source / str(DIGITS.target[number])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02}.png").write_bytes(png(number))
    return source


@pytest.fixture
def damaged_tree(digits_tree) -> Path:
    """The same with four unreadable files."""
    for number, content in BAD.items():
        (file,) = digits_tree.rglob(f"{number:02}.png")
        file.write_bytes(file.read_bytes()[:60] if content is None else content)
    return digits_tree


def rows_of(dest, split):
    folder = Folder(dest)
    table = read_columns(folder, open_manifest(folder), split, ["image_id", "image", "label", "name"])
    return {row.pop("image_id"): row for row in table.to_pylist()}


def make(source, dest, **options):
    return make_shards(source, dest, **{"use_ray": False, "progress": False, "val_fraction": 0} | options)


def fingerprint_by_hand(dest) -> str:
    folder = Folder(dest)
    manifest = open_manifest(folder)
    content = {}
    for split in manifest.splits:
        rows = rows_of(dest, split)
        texts = {
            i: f"{i} {row['label']} {len(row['image'])} {row['name']}\0".encode() + row["image"] for i, row in rows.items()
        }
        total = sum(int(hashlib.sha256(text).hexdigest(), 16) for text in texts.values()) % 2**256
        content[split] = [len(rows), f"{total:064x}"]
    return hashlib.sha256(json.dumps([manifest.classes, content]).encode()).hexdigest()


def test_digits(tmp_path):
    manifest = make("digits", tmp_path / "d", val_fraction=0.2)
    assert {name: split.rows for name, split in manifest.splits.items()} == {"train": 1437, "val": 360}
    assert manifest.classes == tuple("0123456789")
    assert manifest.unreadable == () and manifest.normalised == {}
    found = [row["name"] for split in ("train", "val") for row in rows_of(tmp_path / "d", split).values()]
    assert sorted(found) == [f"digit_{i:04}.png" for i in range(1797)]
    for row in rows_of(tmp_path / "d", "val").values():
        assert row["label"] == DIGITS.target[int(row["name"][6:10])]
    assert all(len(split.files) == 8 for split in manifest.splits.values())


def test_every_row_is_its_file(digits_tree, tmp_path):
    manifest = make(digits_tree, tmp_path / "d", val_fraction=0.25, rows_per_shard=7)
    assert [manifest.splits[name].rows for name in ("train", "val")] == [45, 15]
    assert all(file.rows <= 7 for split in manifest.splits.values() for file in split.files)
    seen = []
    for split in ("train", "val"):
        rows = rows_of(tmp_path / "d", split)
        assert sorted(rows) == list(range(len(rows)))
        for row in rows.values():
            seen.append(row["name"])
            assert row["image"] == (digits_tree / row["name"]).read_bytes()
            assert manifest.classes[row["label"]] == row["name"].split("/")[0]
    assert len(set(seen)) == 60
    assert open_manifest(Folder(tmp_path / "d")) == manifest


def test_rows_are_in_a_seeded_random_order(digits_tree, tmp_path):
    order = {}
    for seed, dest in ((0, "a"), (0, "b"), (1, "c")):
        manifest = make(digits_tree, tmp_path / dest, seed=seed)
        order[dest] = names(Folder(tmp_path / dest), manifest, "train").tolist()
    assert order["a"] == order["b"]
    assert order["a"] != order["c"]
    assert sorted(order["a"]) == sorted(order["c"]) != order["a"]


def test_fingerprint_is_of_the_content_not_of_the_files(digits_tree, tmp_path):
    a = make(digits_tree, tmp_path / "a", rows_per_shard=7)
    b = make(digits_tree, tmp_path / "b", rows_per_shard=60)
    assert len(a.splits["train"].files) != len(b.splits["train"].files)
    assert a.fingerprint == b.fingerprint == fingerprint_by_hand(tmp_path / "a") == fingerprint_by_hand(tmp_path / "b")
    (file,) = digits_tree.rglob("05.png")
    file.write_bytes(png(6))
    assert make(digits_tree, tmp_path / "c").fingerprint != a.fingerprint
    file.rename(file.with_name("new.png"))
    file.with_name("new.png").write_bytes(png(5))
    assert make(digits_tree, tmp_path / "d").fingerprint != a.fingerprint


@pytest.mark.parametrize("rows_per_shard", [1, 7, 60])
def test_ids_are_dense_with_unreadable_images_anywhere(damaged_tree, tmp_path, rows_per_shard):
    dest = tmp_path / "d"
    manifest = make(damaged_tree, dest, rows_per_shard=rows_per_shard, max_unreadable=0.1)
    rows = rows_of(dest, "train")
    assert sorted(rows) == list(range(56))
    assert (manifest.splits["train"].rows, manifest.splits["train"].num_unreadable) == (56, 4)
    for row in rows.values():
        assert row["image"] == (damaged_tree / row["name"]).read_bytes()
    assert labels(Folder(dest), manifest, "train").tolist() == [rows[i]["label"] for i in range(56)]
    assert {(int(Path(one.name).stem), one.split) for one in manifest.unreadable} == {(n, "train") for n in BAD}
    reasons = {int(Path(one.name).stem): one.reason for one in manifest.unreadable}
    assert reasons[3] == "zero bytes" and reasons[17].startswith("not an image") and reasons[40] == "truncated"
    assert manifest.fingerprint == fingerprint_by_hand(dest)


def test_ids_with_unreadable_images_do_not_depend_on_the_shards(damaged_tree, tmp_path):
    found = {
        make(damaged_tree, tmp_path / str(rows), rows_per_shard=rows, max_unreadable=0.1).fingerprint for rows in (1, 7, 60)
    }
    assert len(found) == 1


def test_too_many_unreadable_images_stop_the_job(damaged_tree, tmp_path):
    with pytest.raises(IngestError, match=r"of 60 images are unreadable.*--max-unreadable 0.05.*png: ") as error:
        make(damaged_tree, tmp_path / "d", max_unreadable=0.05)
    assert "\n" not in str(error.value)
    with pytest.raises(ShardError, match=r"no manifest"):
        open_manifest(Folder(tmp_path / "d"))


def test_nothing_readable_is_an_error_whatever_is_allowed(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.jpg").write_text("no image")
    with pytest.raises(IngestError, match="no image of train is readable"):
        make(tmp_path / "source", tmp_path / "d", max_unreadable=1)


def test_files_of_a_list_that_do_not_exist_are_unreadable(digits_tree, tmp_path):
    lines = [f"{file.relative_to(digits_tree)} {file.parent.name}" for file in digits_tree.rglob("*.png")]
    (digits_tree / "list.txt").write_text("\n".join([*lines, "gone.png 3"]))
    manifest = make(digits_tree / "list.txt", tmp_path / "d", max_unreadable=0.1)
    assert manifest.splits["train"].rows == 60
    assert [(one.name, one.reason) for one in manifest.unreadable] == [("gone.png", "No such file or directory")]


def test_what_was_changed_is_counted(digits_tree, tmp_path):
    for number in (1, 2):
        (file,) = digits_tree.rglob(f"{number:02}.png")
        Image.open(file).convert("P").save(file)
    Image.open(digits_tree / "0" / "00.png").save(digits_tree / "0" / "00.bmp")
    assert make(digits_tree, tmp_path / "d").normalised == {"palette": 2, "bmp": 1}


def test_duplicate_and_non_ascii_names(digits_tree, tmp_path):
    (digits_tree / "0" / "Größe 猫.png").write_bytes(png(0))
    (digits_tree / "1" / "00.png").write_bytes(png(1))  # 0/00.png is there too
    manifest = make(digits_tree, tmp_path / "d")
    found = set(names(Folder(tmp_path / "d"), manifest, "train"))
    assert {"0/Größe 猫.png", "0/00.png", "1/00.png"} <= found
    assert len(found) == 62


def test_short_side(digits_tree, tmp_path):
    manifest = make(digits_tree, tmp_path / "d", short_side=4)
    assert manifest.normalised == {"resized": 60}
    assert manifest.options["short_side"] == 4
    assert {Image.open(io.BytesIO(row["image"])).size for row in rows_of(tmp_path / "d", "train").values()} == {(4, 4)}


def test_a_second_run_does_nothing(digits_tree, tmp_path, capsys):
    first = make(digits_tree, tmp_path / "d")
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "d").rglob("*")}
    assert make(digits_tree, tmp_path / "d", progress=True) == first
    assert "nothing to do" in capsys.readouterr().err
    assert times == {file: file.stat().st_mtime_ns for file in (tmp_path / "d").rglob("*")}


@pytest.mark.parametrize(
    ("change", "message"), [({"seed": 1}, "seed 0, not 1"), ({"short_side": 4}, "short_side None, not 4")]
)
def test_other_options_are_refused_until_overwrite(digits_tree, tmp_path, change, message):
    first = make(digits_tree, tmp_path / "d")
    with pytest.raises(ValueError, match=f"{message}; give --overwrite or another DEST"):
        make(digits_tree, tmp_path / "d", **change)
    assert open_manifest(Folder(tmp_path / "d")) == first
    second = make(digits_tree, tmp_path / "d", overwrite=True, **change)
    assert open_manifest(Folder(tmp_path / "d")) == second != first
    named = {file.name for split in second.splits.values() for file in split.files}
    assert {f"train/{file.name}" for file in (tmp_path / "d" / "train").iterdir()} == named


def test_another_source_is_refused(digits_tree, tmp_path):
    make(digits_tree, tmp_path / "d")
    (digits_tree / "0" / "one more.png").write_bytes(png(0))
    with pytest.raises(ValueError, match="other images, names or labels; give --overwrite"):
        make(digits_tree, tmp_path / "d")


def test_an_interrupted_run_is_no_shards_folder_and_is_cleared_away(digits_tree, tmp_path, monkeypatch):
    dest, written = tmp_path / "d", []
    real = ingest._write_chunk

    def stop_at_the_fourth(*arguments):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(real(*arguments))
        return written[-1]

    monkeypatch.setattr(ingest, "_write_chunk", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        make(digits_tree, dest, rows_per_shard=10)
    monkeypatch.undo()
    left = {f"train/{file.name}" for file in (dest / "train").iterdir()}
    assert len(left) == 3
    with pytest.raises(ShardError, match="holds no manifest"):
        open_manifest(Folder(dest))
    (dest / "train" / "part-00003-0123abcd.parquet.89abcdef.part").write_bytes(b"half")
    manifest = make(digits_tree, dest, rows_per_shard=10)
    found = {f"train/{file.name}" for file in (dest / "train").iterdir()}
    assert found == {file.name for file in manifest.splits["train"].files}
    assert not found & left


def test_a_folder_with_other_files_is_not_written_into(digits_tree, tmp_path):
    for name in ("photo.jpg", "train/cat.jpg"):
        dest = tmp_path / name.replace("/", "_")
        (dest / name).parent.mkdir(parents=True)
        (dest / name).write_bytes(b"mine")
        with pytest.raises(ValueError, match=f"holds other files.*{name}"):
            make(digits_tree, dest, overwrite=True)
        assert (dest / name).read_bytes() == b"mine"


def test_expectations(digits_tree, tmp_path):
    with pytest.raises(IngestError, match="lists train 60, but train 61 is expected"):
        make(digits_tree, tmp_path / "d", expect={"train": 61})
    with pytest.raises(IngestError, match="but val 5 is expected"):
        make(digits_tree, tmp_path / "d", expect={"train": 60, "val": 5})
    assert not (tmp_path / "d").exists()
    assert make(digits_tree, tmp_path / "d", expect={"train": 60}).splits["train"].rows == 60


def test_an_unreadable_image_fails_an_expectation(damaged_tree, tmp_path):
    with pytest.raises(IngestError, match="--expect cannot be met"):
        make(damaged_tree, tmp_path / "d", expect={"train": 60}, max_unreadable=0.5)
    assert make(damaged_tree, tmp_path / "d", max_unreadable=0.5).splits["train"].rows == 56


def test_dest_as_a_uri(digits_tree, tmp_path):
    manifest = make(digits_tree, (tmp_path / "with space").as_uri())
    assert open_manifest(Folder(tmp_path / "with space")) == manifest


@pytest.mark.parametrize(
    "wrong",
    [{"rows_per_shard": 0}, {"short_side": -1}, {"num_cpus": 0}, {"max_unreadable": 2}, {"val_fraction": 1}],
)
def test_options_that_make_no_sense(digits_tree, tmp_path, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is "):
        make(digits_tree, tmp_path / "d", **wrong)


def test_ray_gives_what_one_process_gives(damaged_tree, tmp_path, local_ray):
    options = {"val_fraction": 0.2, "rows_per_shard": 5, "max_unreadable": 0.1}
    here = make(damaged_tree, tmp_path / "here", **options)
    there = make(damaged_tree, tmp_path / "there", use_ray=True, **options)
    assert there.fingerprint == here.fingerprint == fingerprint_by_hand(tmp_path / "there")
    assert there.unreadable == here.unreadable
    assert {name: split.rows for name, split in there.splits.items()} == {name: s.rows for name, s in here.splits.items()}
    with pytest.raises(IngestError, match="unreadable"):
        make(damaged_tree, tmp_path / "again", use_ray=True, max_unreadable=0.01)


def test_real_photographs_one_of_them_cut_off(real_data, tmp_path):
    files = sorted((real_data / "imagenette224" / "val").rglob("*.JPEG"))[::5]
    for file in files:
        copy = tmp_path / "source" / file.parent.name / file.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes()[: 4000 if file is files[7] else None])
    manifest = make(tmp_path / "source", tmp_path / "d")
    assert manifest.splits["train"].rows == len(files) - 1
    assert [(Path(one.name).name, one.reason) for one in manifest.unreadable] == [(files[7].name, "truncated")]
    for row in rows_of(tmp_path / "d", "train").values():
        assert row["image"] == (real_data / "imagenette224" / "val" / row["name"]).read_bytes()


def job(*arguments):
    command = [sys.executable, str(JOB), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", env=os.environ | {"PYTHONPATH": ""}, check=False)


def test_command_line_ends_with_the_manifest(digits_tree, tmp_path):
    done = job(digits_tree, tmp_path / "d", "--expect", "train=54,val=6", "--rows-per-shard", "30")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == str(tmp_path / "d" / "manifest.json")
    assert "54 images in 2 shards" in lines[0] and "10 classes" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nowhere", "d"], 2, "/nowhere does not exist"),
        (["digits", "d", "--expect", "train"], 2, "write it like train=1281167"),
        (["digits", "d", "--expect", "train=5"], 1, "train 5 is expected"),
        (["digits", "nope://d"], 2, "nope"),
        (["digits", f"{__file__}/d"], 1, "test_ingest.py"),
    ],
)
def test_command_line_errors_are_one_sentence(tmp_path, arguments, status, message):
    dest = str(tmp_path / "d")
    failed = job(*(dest if argument == "d" else argument for argument in arguments))
    assert failed.returncode == status
    (line,) = [line for line in failed.stderr.splitlines() if line and "images/s" not in line]
    assert line.startswith("error: ") and message in line
    assert failed.stdout == ""


def test_a_manifest_that_a_kill_left_half_written_is_no_foreign_file(tmp_path):
    left = tmp_path / "shards" / "manifest.json.0123abcd.part"
    left.parent.mkdir()
    left.write_text("{")
    make_shards("digits", str(tmp_path / "shards"), use_ray=False, progress=False)
    assert not left.exists()
    other = tmp_path / "other" / "notes.part"
    other.parent.mkdir()
    other.write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        make_shards("digits", str(tmp_path / "other"), use_ray=False, progress=False)
    assert other.read_text() == "mine"
