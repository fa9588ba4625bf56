"""Many images to a shards folder: list, permute, then one task for each shard; the manifest comes last.

Image ids must be dense although unreadable images drop out, and which these are is known only when all tasks
are done. So a task writes each row with its place in the seeded permutation as image_id, and at the end the
last rows move into the holes: only the last few shards are written again. Ids depend on the source and the
seed, not on shards or workers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from raydc.data.decode import UnreadableImage, normalise
from raydc.data.schema import MANIFEST, Manifest, ShardFile, Split, Unreadable
from raydc.data.shards import check_files, content_sum, open_manifest, read_shard, shard_table, write_shard
from raydc.data.sources import Listing, Source, list_source
from raydc.storage import Folder

SHARD_BYTES = 64 << 20  # of images; a worker holds about three times this
MIN_SHARDS = 8  # so that Ray Data can share out a small set
MIN_ROWS = 64  # below this one shard is enough
SAMPLE = 32  # images that stand for the sizes of all
RAY_BYTES = 256 << 20  # fewer bytes are done by one core before Ray's workers have started
PART = re.compile(r"part-\d{5,}-[0-9a-f]{8}\.parquet(\.[0-9a-f]{8}\.part)?")
SPLITS = ("train", "val")


class IngestError(RuntimeError):
    """The shards could not be made of this source; the message is one sentence with the remedy."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Chunk:
    """The rows of one shard; their places in the split's permutation are start, start + 1, ..."""

    split: str
    file: str
    start: int
    listing: Listing


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A chunk when it is done; ``unreadable`` maps places to (name, reason); no row left: no ``file``."""

    split: str
    start: int
    rows: int
    file: ShardFile | None
    content: int
    unreadable: dict[int, tuple[str, str]]
    normalised: Counter[str]


def make_shards(
    src: str | Path,
    dest: str | Path,
    *,
    val: str | Path | None = None,
    root: str | Path | None = None,
    val_fraction: float = 0.1,
    short_side: int | None = None,
    rows_per_shard: int | None = None,
    seed: int = 0,
    max_unreadable: float = 0.01,
    expect: dict[str, int] | None = None,
    overwrite: bool = False,
    num_cpus: int | None = None,
    use_ray: bool | None = None,
    progress: bool = True,
) -> Manifest:
    """Turn SRC into Parquet shards below DEST (a local path or any pyarrow URI) and return their manifest.

    ``expect`` maps splits to row counts. ``rows_per_shard`` None means about 64 MB, ``use_ray`` None means
    where it is worth the start of its workers. ValueError for arguments that make no sense, IngestError where
    the images are at fault.
    """
    _check_options(max_unreadable, short_side=short_side, rows_per_shard=rows_per_shard, num_cpus=num_cpus)
    folder = Folder(dest)
    source = list_source(src, val=val, root=root, val_fraction=val_fraction, seed=seed)
    _check_expected({name: len(listing) for name, listing in source.splits.items()}, expect, f"{src} lists")
    options = {
        "seed": seed,
        "short_side": short_side,
        "rows_per_shard": rows_per_shard,
        "val_fraction": val_fraction if source.held_out else None,
        "source": str(src),
        "listing": _listing_hash(source),
    }
    if not overwrite and folder.exists(MANIFEST):
        return _finished(folder, options, expect, progress)
    _clear(folder)
    each = _runner(source, use_ray, num_cpus)
    chunks = _chunks(source, short_side, rows_per_shard, seed)
    written = each(_write_chunk, ((folder, chunk, short_side) for chunk in chunks))
    parts = _collect(written, sum(map(len, source.splits.values())), max_unreadable, expect or {}, progress)
    manifest = _manifest(folder, source, _close_gaps(folder, parts, each), options)
    _check_expected({name: split.rows for name, split in manifest.splits.items()}, expect, f"{folder.uri} has")
    check_files(folder, manifest)  # a second run into the same folder would have removed them
    folder.write_json(MANIFEST, manifest.to_json())
    return manifest


# --- before the work


def _check_options(max_unreadable: float, **counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; give a positive number, or leave it out")
    if not 0 <= max_unreadable <= 1:
        raise ValueError(f"max_unreadable is {max_unreadable}; it is a share of the images, 0 to 1")


def _check_expected(found: dict[str, int], expect: dict[str, int] | None, where: str) -> None:
    for split, rows in (expect or {}).items():
        if found.get(split) != rows:
            counts = ", ".join(f"{name} {count:,}" for name, count in found.items())
            raise IngestError(f"{where} {counts}, but {split} {rows:,} is expected; check that the source is complete")


def _listing_hash(source: Source) -> str:
    """A hash of which images there are, under which names, split and labels; not of their bytes."""
    digest = hashlib.sha256(json.dumps(source.classes).encode())
    for name, listing in source.splits.items():
        digest.update(f"\0{name} {len(listing)}\0".encode())
        for column in (listing.paths, pa.array([] if listing.labels is None else listing.labels)):
            for batch in pa.table([column], ["column"]).combine_chunks().to_batches():
                digest.update(batch.serialize())
    return digest.hexdigest()


def _finished(folder: Folder, options: dict[str, Any], expect: dict[str, int] | None, progress: bool) -> Manifest:
    """The manifest that is there, where it is of the same source and options; ValueError otherwise."""
    manifest = open_manifest(folder)
    mine, theirs = ({k: v for k, v in o.items() if k != "source"} for o in (options, manifest.options))
    if mine != theirs:
        other = [f"{name} {theirs.get(name)}, not {value}" for name, value in mine.items() if theirs.get(name) != value]
        other = [text for text in other if not text.startswith("listing")] or ["other images, names or labels"]
        raise ValueError(f"{folder.uri} holds shards of {'; '.join(other)}; give --overwrite or another DEST")
    _check_expected({name: split.rows for name, split in manifest.splits.items()}, expect, f"{folder.uri} has")
    if progress:
        print(f"{folder.uri} holds these shards already; nothing to do", file=sys.stderr)
    return manifest


def _clear(folder: Folder) -> None:
    """Remove the manifest, then the shards of a former or interrupted run; ValueError for any other file."""
    folder.sweep("", re.escape(MANIFEST))
    foreign = [name for name in folder.names() if name not in (*SPLITS, MANIFEST)]
    stale = [f"{split}/{name}" for split in SPLITS for name in folder.names(split)]
    foreign += [name for name in stale if not PART.fullmatch(name.partition("/")[2])]
    if foreign:
        raise ValueError(f"{folder.uri} holds other files ({', '.join(foreign[:3])}); give an empty or new folder as DEST")
    folder.delete(MANIFEST)
    for name in stale:
        folder.delete(name)


def _chunks(source: Source, short_side: int | None, rows_per_shard: int | None, seed: int) -> Iterator[_Chunk]:
    """Each split's rows in a seeded random order, cut into shards of nearly equal size."""
    run = uuid.uuid4().hex[:8]
    for split, listing in source.splits.items():
        order = np.random.default_rng([seed, 2, SPLITS.index(split)]).permutation(len(listing))
        size = rows_per_shard or _rows_per_shard(listing.take(order[:SAMPLE]), len(order), short_side)
        pieces = math.ceil(len(order) / size)
        for index, places in enumerate(np.array_split(np.arange(len(order)), pieces)):
            file = f"{split}/part-{index:05d}-{run}.parquet"
            yield _Chunk(split=split, file=file, start=int(places[0]), listing=listing.take(order[places]))


def _rows_per_shard(sample: Listing, rows: int, short_side: int | None) -> int:
    """About SHARD_BYTES of images, judged by a random sample of them."""
    _, images, _ = _read_rows(sample, short_side)
    by_bytes = SHARD_BYTES * max(len(images), 1) // max(sum(map(len, images.values())), 1)
    most = math.ceil(rows / MIN_SHARDS) if rows >= MIN_ROWS else rows
    return max(1, min(by_bytes, most))


# --- one task


def _read_rows(listing: Listing, short_side: int | None) -> tuple[dict[int, str], dict[int, bytes], Counter[str]]:
    """By row: why it is unreadable, or the bytes to store; and how many were changed, by reason."""
    unreadable, images, normalised = {}, {}, Counter()
    for row in range(len(listing)):
        try:
            images[row], changes = normalise(listing.read(row), short_side)
            normalised.update(changes)
        except UnreadableImage as error:
            unreadable[row] = str(error)
        except OSError as error:
            unreadable[row] = error.strerror or str(error)
    return unreadable, images, normalised


def _write_chunk(folder: Folder, chunk: _Chunk, short_side: int | None) -> _Part:
    """Read, check and normalise a chunk's images and write its shard, with places as ids."""
    listing = chunk.listing
    unreadable, images, normalised = _read_rows(listing, short_side)
    table = shard_table(
        [chunk.start + row for row in images],
        list(images.values()),
        [listing.label(row) for row in images],
        [listing.name(row) for row in images],
    )
    return _Part(
        split=chunk.split,
        start=chunk.start,
        rows=len(listing),
        file=write_shard(folder, chunk.file, table) if images else None,
        content=content_sum(table),
        unreadable={chunk.start + row: (listing.name(row), reason) for row, reason in unreadable.items()},
        normalised=normalised,
    )


def _renumber(folder: Folder, part: _Part, new_ids: dict[int, int]) -> _Part:
    """Give rows new ids, in place: harmless when it runs twice, for no new id is an old one."""
    table = read_shard(folder, part.file.name)
    ids = [new_ids.get(image_id, image_id) for image_id in table["image_id"].to_pylist()]
    table = table.set_column(0, table.schema.field("image_id"), pa.array(ids, pa.int64()))
    changed = {"file": write_shard(folder, part.file.name, table), "content": content_sum(table)}
    return _Part(**vars(part) | changed)


# --- all tasks


def _collect(
    written: Iterator[_Part], rows: int, max_unreadable: float, expect: dict[str, int], progress: bool
) -> list[_Part]:
    """All parts, in the order of completion; IngestError as soon as too many images are unreadable."""
    parts: list[_Part] = []
    every_s = 0.1 if sys.stderr.isatty() else 30.0  # a log file wants lines, not an animation
    with tqdm(total=rows, unit=" images", desc="make_shards", mininterval=every_s, disable=not progress) as bar:
        for part in written:
            parts.append(part)
            bar.update(part.rows)
            if part.unreadable:
                _check_unreadable(parts, rows, max_unreadable, expect)
    return parts


def _close_gaps(folder: Folder, parts: list[_Part], each: Callable[[Callable, Iterable], Iterator]) -> list[_Part]:
    """The parts with dense ids: shards that hold rows beyond a split's last id are written again."""
    moves = {split: _moves([part for part in parts if part.split == split]) for split in SPLITS}
    moved = [part for part in parts if part.file and not moves[part.split].keys().isdisjoint(_places(part))]
    done = {part.file.name: part for part in each(_renumber, ((folder, part, moves[part.split]) for part in moved))}
    return [done.get(part.file.name, part) if part.file else part for part in parts]


def _places(part: _Part) -> range:
    return range(part.start, part.start + part.rows)


def _moves(parts: list[_Part]) -> dict[int, int]:
    """New ids for the last readable rows of a split: the places of its unreadable ones."""
    holes = sorted(place for part in parts for place in part.unreadable)
    rows = sum(part.rows for part in parts) - len(holes)
    movers = sorted(set(range(rows, rows + len(holes))) - set(holes))
    return dict(zip(movers, holes, strict=False))  # the holes beyond the last row need no new owner


def _check_unreadable(parts: list[_Part], rows: int, max_unreadable: float, expect: dict[str, int]) -> None:
    """IngestError for more unreadable images than allowed; none is in a split whose rows are expected."""
    bad = _unreadable(parts)
    first = "; ".join(f"{one.name}: {one.reason}" for one in bad[:3])
    if len(bad) > max_unreadable * rows:
        raise IngestError(
            f"{len(bad):,} of {rows:,} images are unreadable so far, "
            f"more than --max-unreadable {max_unreadable} allows ({first}); "
            "repair or remove them, or raise --max-unreadable"
        )
    if any(one.split in expect for one in bad):
        raise IngestError(f"an image is unreadable ({first}), so --expect cannot be met; repair it, or expect fewer")


def _unreadable(parts: list[_Part]) -> list[Unreadable]:
    found = [(part.split, name, reason) for part in parts for name, reason in part.unreadable.values()]
    return [Unreadable(split=split, name=name, reason=reason) for split, name, reason in sorted(found)]


def _manifest(folder: Folder, source: Source, parts: list[_Part], options: dict[str, Any]) -> Manifest:
    splits, content = {}, {}
    for split in source.splits:
        mine = sorted((part for part in parts if part.split == split), key=lambda part: part.start)
        files = tuple(part.file for part in mine if part.file)
        rows = sum(file.rows for file in files)
        if not rows:
            raise IngestError(f"no image of {split} is readable, so there is nothing to write to {folder.uri}")
        splits[split] = Split(rows=rows, files=files, num_unreadable=sum(len(part.unreadable) for part in mine))
        content[split] = [rows, f"{sum(part.content for part in mine) % 2**256:064x}"]
    normalised = sum((part.normalised for part in parts), Counter())
    return Manifest(
        splits=splits,
        classes=source.classes,
        fingerprint=hashlib.sha256(json.dumps([source.classes, content]).encode()).hexdigest(),
        unreadable=tuple(_unreadable(parts)),
        normalised=dict(normalised.most_common()),
        notes=source.notes,
        options=options,
    )


# --- here or on Ray


def _runner(source: Source, use_ray: bool | None, num_cpus: int | None) -> Callable[[Callable, Iterable], Iterator]:
    """A starmap in any order: in this process, or as Ray tasks."""
    if use_ray is None:
        use_ray = sum(map(_source_bytes, source.splits.values())) >= RAY_BYTES
    if not use_ray:
        return lambda function, arguments: (function(*one) for one in arguments)
    window = 2 * _attach(num_cpus)
    return lambda function, arguments: _as_tasks(function, arguments, window)


def _source_bytes(listing: Listing) -> float:
    """Bytes of all images of a split, judged by a few."""
    rows = np.linspace(0, len(listing) - 1, SAMPLE).astype(int)
    return len(listing) * sum(map(listing.size, rows)) / SAMPLE


def _as_tasks(function: Callable, arguments: Iterable[tuple], window: int) -> Iterator:
    """Results in the order of completion; at most ``window`` tasks, and their listings, exist at a time."""
    import ray

    task, pending, arguments = ray.remote(function), set(), iter(arguments)
    try:
        while True:
            for one in arguments:
                pending.add(task.remote(*one))
                if len(pending) >= window:
                    break
            if not pending:
                return
            (done,), _ = ray.wait(list(pending), num_returns=1)
            pending.discard(done)
            yield ray.get(done)
    except ray.exceptions.RayError as error:
        if isinstance(cause := getattr(error, "cause", None), OSError):
            raise cause from None  # a full disk, say: without the worker's traceback
        raise IngestError(f"a Ray task failed ({str(error).splitlines()[-1]}); what is in DEST is not whole") from error
    finally:
        for left in pending:
            ray.cancel(left)


def _attach(num_cpus: int | None) -> int:
    """Connect to Ray, starting it here where there is no cluster; returns the number of CPUs to use."""
    from raydc import launch  # sets what Ray reads when it is imported, so it comes first; imports torch too

    launch.attach(num_cpus or os.cpu_count() or 1)
    ray = launch.ray
    return num_cpus or max(1, int(ray.cluster_resources().get("CPU", 1)))
