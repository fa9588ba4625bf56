"""Shards and manifests as a reader meets them, whole and damaged."""

import hashlib
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from raydc.data.schema import Manifest, ShardError, Split, Unreadable
from raydc.data.shards import (
    content_sum,
    labels,
    names,
    open_manifest,
    read_columns,
    read_shard,
    shard_table,
    write_shard,
)
from raydc.storage import Folder

IDS = [4, 0, 3, 1, 2]
ROWS = {"images": [b"four", b"zero", b"three", b"one", b"two"], "labels": [4, None, 3, 1, 2]}
NAMES = ["vier", "null", "drei", "eins", "zwei ü"]


@pytest.fixture
def folder(tmp_path) -> Folder:
    """Five rows in two shards, in neither file the order of their ids, and a manifest."""
    folder = Folder(tmp_path / "shards")
    cuts = [slice(0, 2), slice(2, 5)]
    tables = [shard_table(IDS[c], ROWS["images"][c], ROWS["labels"][c], NAMES[c]) for c in cuts]
    files = tuple(write_shard(folder, f"train/part-{i}.parquet", table) for i, table in enumerate(tables))
    folder.write_json("manifest.json", manifest_of(files).to_json())
    return folder


def manifest_of(files) -> Manifest:
    return Manifest(
        splits={"train": Split(rows=5, files=files, num_unreadable=1)},
        classes=("a", "b"),
        fingerprint="f",
        unreadable=(Unreadable(split="train", name="ü.jpg", reason="truncated"),),
        normalised={"cmyk": 2},
        notes=("note",),
        options={"seed": 3, "short_side": None},
    )


def test_manifest_survives_json(folder):
    read = open_manifest(folder)
    assert read == manifest_of(read.splits["train"].files)
    assert [file.rows for file in read.splits["train"].files] == [2, 3]


def test_labels_and_names_are_by_image_id(folder):
    manifest = open_manifest(folder)
    found = labels(folder, manifest, "train")
    assert found.dtype == np.int32
    assert found.tolist() == [-1, 1, 2, 3, 4]
    assert names(folder, manifest, "train").tolist() == ["null", "eins", "zwei ü", "drei", "vier"]


def test_columns_keep_rows_together(folder):
    table = read_columns(folder, open_manifest(folder), "train", ["image", "image_id"])
    assert dict(zip(table["image_id"].to_pylist(), table["image"].to_pylist(), strict=True)) == {
        0: b"zero",
        1: b"one",
        2: b"two",
        3: b"three",
        4: b"four",
    }


def test_layout_of_a_shard(tmp_path):
    rows = 150
    table = shard_table(list(range(rows)), [b"x" * 100] * rows, [None] * rows, ["n"] * rows)
    file = write_shard(Folder(tmp_path), "train/a.parquet", table)
    assert (file.rows, file.bytes) == (rows, (tmp_path / "train" / "a.parquet").stat().st_size)
    metadata = pq.ParquetFile(tmp_path / "train" / "a.parquet").metadata
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert sizes == [64, 64, 22]  # small groups: an image can be read again without much beside it
    columns = [metadata.row_group(0).column(i) for i in range(4)]
    assert {column.path_in_schema: column.compression for column in columns} == {
        "image_id": "ZSTD",
        "image": "UNCOMPRESSED",
        "label": "ZSTD",
        "name": "ZSTD",
    }
    types = pq.read_schema(tmp_path / "train" / "a.parquet").types
    assert [str(kind) for kind in types] == ["int64", "binary", "int32", "string"]


def test_content_is_the_sum_of_the_rows_digests(folder):
    tables = [read_shard(folder, f"train/part-{i}.parquet") for i in range(2)]
    by_hand = 0
    for image_id, image, label, name in zip(IDS, *ROWS.values(), NAMES, strict=True):
        row = f"{image_id} {label} {len(image)} {name}\0".encode() + image
        by_hand += int(hashlib.sha256(row).hexdigest(), 16)
    assert sum(map(content_sum, tables)) % 2**256 == by_hand % 2**256


@pytest.mark.parametrize("change", ["image_id", "image", "label", "name"])
def test_content_changes_with_every_column(change):
    row = {"image_id": 7, "image": b"seven", "label": 1, "name": "n"}
    other = row | {change: {"image_id": 8, "image": b"eight", "label": None, "name": "m"}[change]}
    one, two = (content_sum(shard_table(*([value] for value in r.values()))) for r in (row, other))
    assert one != two


def test_folder_without_manifest_names_the_remedy(tmp_path):
    with pytest.raises(ShardError, match=r"holds no manifest.json; make shards with jobs/make_shards.py"):
        open_manifest(Folder(tmp_path))
    with pytest.raises(ShardError, match="holds no manifest.json"):
        open_manifest(Folder(tmp_path / "nowhere"))


def test_changed_and_missing_shards_are_noticed(folder, tmp_path):
    file = tmp_path / "shards" / "train" / "part-1.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole + b"more")
    with pytest.raises(ShardError, match=r"part-1.parquet has .* bytes and the manifest says"):
        open_manifest(folder)
    file.write_bytes(whole)
    assert open_manifest(folder).splits["train"].rows == 5
    file.unlink()
    with pytest.raises(ShardError, match=r"part-1.parquet is missing"):
        open_manifest(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format version 99"),
        ({"format_version": None}, "format version None"),
        ({"splits": None}, "not complete"),
        ({"unreadable": [{"what": 1}]}, "not complete"),
    ],
)
def test_manifests_of_another_kind(folder, change, message):
    folder.write_json("manifest.json", folder.read_json("manifest.json") | change)
    with pytest.raises(ShardError, match=message) as error:
        open_manifest(folder)
    assert "make_shards" in str(error.value)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", json.dumps([1]).encode()])
def test_a_manifest_that_is_no_manifest(folder, content):
    folder.write("manifest.json", content)
    with pytest.raises(ShardError, match=r"make_shards"):
        open_manifest(folder)


def test_ids_that_are_not_dense_are_refused(folder):
    manifest = open_manifest(folder)
    write_shard(folder, "train/part-0.parquet", shard_table([9, 0], [b"nine", b"zero"], [1, 1], ["a", "b"]))
    for read in (labels, names):
        with pytest.raises(ShardError, match=r"image_ids of train are not 0..4"):
            read(folder, manifest, "train")


def test_unknown_split_names_those_there_are(folder):
    with pytest.raises(ShardError, match="no split 'val', only train"):
        read_columns(folder, open_manifest(folder), "val", ["label"])
