"""One shard, and a folder of them: write a table, open the manifest, read columns by image_id."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from raydc.data.schema import COLUMNS, MANIFEST, Manifest, ShardError, ShardFile
from raydc.storage import Folder

ROW_GROUP = 64  # rows; what a reader holds at once, and the finest piece that can be read alone
SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.int64(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("label", pa.int32()),
        pa.field("name", pa.string(), nullable=False),
    ]
)
REMEDY = "make shards with jobs/make_shards.py"


def shard_table(ids: list[int], images: list[bytes], labels: list[int | None], names: list[str]) -> pa.Table:
    """Rows as a table with the columns of the contract."""
    return pa.table(dict(zip(COLUMNS, (ids, images, labels, names), strict=True)), schema=SCHEMA)


def write_shard(folder: Folder, name: str, table: pa.Table) -> ShardFile:
    """Write a whole Parquet file or none; images stay uncompressed, since they are compressed already."""
    sink = pa.BufferOutputStream()
    small = [column for column in COLUMNS if column != "image"]
    pq.write_table(
        table.cast(SCHEMA),
        sink,
        row_group_size=ROW_GROUP,
        compression={column: "none" if column == "image" else "zstd" for column in COLUMNS},
        use_dictionary=small,
        write_statistics=small,
    )
    data = sink.getvalue()
    folder.write(name, memoryview(data))
    return ShardFile(name=name, rows=table.num_rows, bytes=data.size)


def read_shard(folder: Folder, name: str, columns: list[str] | None = None) -> pa.Table:
    with pq.ParquetFile(folder.path(name), filesystem=folder.fs) as file:
        return file.read(columns=columns)


def content_sum(table: pa.Table) -> int:
    """The rows' SHA-256 digests, added modulo 2**256: the same in any order and any number of files."""
    total = 0
    for batch in table.to_batches(max_chunksize=ROW_GROUP):
        for image_id, image, label, name in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            row = hashlib.sha256(f"{image_id} {label} {len(image)} {name}\0".encode())
            row.update(image)
            total += int.from_bytes(row.digest(), "big")
    return total % 2**256


def open_manifest(folder: Folder) -> Manifest:
    """The manifest of a whole shards folder; ShardError where a file is missing or has changed."""
    try:
        manifest = Manifest.from_json(folder.read_json(MANIFEST))
    except FileNotFoundError:
        raise ShardError(f"{folder.uri} holds no {MANIFEST}; {REMEDY}") from None
    except ShardError as error:
        raise ShardError(f"{folder.uri}: {error}; {REMEDY}") from None
    except ValueError:  # JSON's and Unicode's own errors
        raise ShardError(f"{folder.uri}/{MANIFEST} is not JSON; {REMEDY}") from None
    check_files(folder, manifest)
    return manifest


def check_files(folder: Folder, manifest: Manifest) -> None:
    """ShardError unless every file of the manifest is there with its size."""
    files = [file for split in manifest.splits.values() for file in split.files]
    found = folder.fs.get_file_info([folder.path(file.name) for file in files]) if files else []
    for file, info in zip(files, found, strict=True):
        if info.type == pa.fs.FileType.NotFound:
            raise ShardError(f"{folder.uri}/{file.name} is missing, though the manifest names it; {REMEDY} again")
        if info.size != file.bytes:
            raise ShardError(
                f"{folder.uri}/{file.name} has {info.size:,} bytes and the manifest says {file.bytes:,}: "
                f"it changed after the shards were made; {REMEDY} again"
            )


def shard_paths(folder: Folder, manifest: Manifest, split: str) -> list[str]:
    """Paths of a split's files in the terms of ``folder.fs``; ShardError where there is no such split."""
    if split not in manifest.splits:
        raise ShardError(f"{folder.uri} has no split {split!r}, only {', '.join(manifest.splits)}")
    return [folder.path(file.name) for file in manifest.splits[split].files]


def read_columns(folder: Folder, manifest: Manifest, split: str, columns: list[str]) -> pa.Table:
    """Columns of a split, in file order: not in the order of image_id."""
    shard_paths(folder, manifest, split)  # names the splits there are
    files = [file.name for file in manifest.splits[split].files]
    with ThreadPoolExecutor(8) as pool:  # thousands of small reads, perhaps from an object store
        tables = list(pool.map(lambda name: read_shard(folder, name, columns), files))
    return pa.concat_tables(tables)


def labels(folder: Folder, manifest: Manifest, split: str) -> np.ndarray:
    """(rows,) int32, indexed by image_id; -1 where there is no label."""
    table, order = _by_image_id(folder, manifest, split, "label")
    return table["label"].fill_null(-1).to_numpy()[order]


def names(folder: Folder, manifest: Manifest, split: str) -> np.ndarray:
    """(rows,) strings, indexed by image_id."""
    table, order = _by_image_id(folder, manifest, split, "name")
    return table["name"].to_numpy()[order]


def _by_image_id(folder: Folder, manifest: Manifest, split: str, column: str) -> tuple[pa.Table, np.ndarray]:
    """The column's table, and where in it each image_id is; ShardError unless ids are dense."""
    table = read_columns(folder, manifest, split, ["image_id", column])
    ids = table["image_id"].to_numpy()
    order = np.argsort(ids, kind="stable")
    if not np.array_equal(ids[order], np.arange(manifest.splits[split].rows)):
        raise ShardError(f"{folder.uri}: the image_ids of {split} are not 0..{manifest.splits[split].rows - 1}; {REMEDY}")
    return table, order
