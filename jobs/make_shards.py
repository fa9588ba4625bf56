"""Turn a source of images into Parquet shards: make_shards.py SRC DEST."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from raydc import commandline
from raydc.config import UsageError
from raydc.data.ingest import IngestError, make_shards
from raydc.data.schema import MANIFEST, Manifest, ShardError
from raydc.storage import Folder

HELP = """Turn a source of images into Parquet shards, one folder a split (train, val), and a manifest.json.
  make_shards.py PHOTOS SHARDS                       PHOTOS/CLASS/*.jpg, a tenth of it set aside as val
  make_shards.py IMAGENET SHARDS --expect train=1281167,val=50000
"""


@dataclass(frozen=True, kw_only=True)
class Args:
    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """A folder with a sub-folder for each class, a flat folder (no labels), a folder with train/ and val/
    (or test/), a list file ('path label' a line), an iNaturalist .json, or the name digits."""
    dest: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DEST")]
    """Where the shards go: a new or empty folder, or any pyarrow filesystem URI (s3://, gs://, file://)."""
    val: str | None = None
    """The val split, where it is not SRC/val or SRC/test; any kind of source."""
    root: str | None = None
    """The folder that paths in list and JSON files are relative to; default: the file's own folder."""
    val_fraction: float = 0.1
    """Share of images set aside as val where SRC has none: seeded, class-balanced, rounded up; 0 = none."""
    short_side: int | None = None
    """Shrink images whose shorter side is above this many pixels; default: keep the files' own bytes."""
    rows_per_shard: int | None = None
    """Images in a shard; default: about 64 MB, and at least 8 shards."""
    seed: int = 0
    """Decides the order of the rows, which is their image_id, and which images are set aside."""
    expect: str | None = None
    """Row counts that must come out, such as train=1281167,val=50000; anything else is a failure."""
    max_unreadable: float = 0.01
    """Share of unreadable images above which the job stops; up to it they are left out, and listed."""
    overwrite: bool = False
    """Replace the shards in DEST."""
    num_cpus: int | None = None
    """CPUs to use; default: all."""


def main(arguments: list[str] | None = None) -> int:
    return commandline.run(
        lambda: _job(sys.argv[1:] if arguments is None else arguments),
        again="the same command starts again",
        failures=(IngestError, ShardError, OSError),
        mistakes=(UsageError, ValueError),
    )


def _job(arguments: list[str]) -> None:
    args = vars(commandline.parse(Args, arguments, prog="make_shards.py", description=HELP))
    src, dest = args.pop("src"), args.pop("dest")
    manifest = make_shards(src, dest, **args | {"expect": parse_expect(args["expect"])})
    print(summary(manifest))
    print(Folder(dest).place(MANIFEST))


def parse_expect(text: str | None) -> dict[str, int] | None:
    """``train=1281167,val=50000`` as a dict."""
    if text is None:
        return None
    pairs = [pair.strip().partition("=") for pair in text.split(",")]
    if not all(name in ("train", "val") and count.isdigit() for name, _, count in pairs):
        raise ValueError(f"--expect {text!r} is not understood; write it like train=1281167,val=50000")
    return {name: int(count) for name, _, count in pairs}


def summary(manifest: Manifest) -> str:
    """What was made, what was changed and what was left out, for a reader."""
    lines = []
    for name, split in manifest.splits.items():
        size = sum(file.bytes for file in split.files) / 1e6
        lines.append(f"{name:6} {split.rows:>11,} images in {len(split.files):,} shards, {size:,.1f} MB")
    lines.append(f"labels {len(manifest.classes):>11,} classes" if manifest.classes else "labels        none")
    lines += [f"note: {note}" for note in manifest.notes]
    changed = ", ".join(f"{reason} {count:,}" for reason, count in manifest.normalised.items())
    lines.append(f"stored anew: {changed}" if changed else "stored anew: none, every image is kept byte for byte")
    return "\n".join(lines + _unreadable(manifest))


def _unreadable(manifest: Manifest, most: int = 10) -> list[str]:
    bad = manifest.unreadable
    if not bad:
        return ["unreadable: none"]
    by_split = ", ".join(f"{name} {count:,}" for name, count in Counter(one.split for one in bad).items())
    lines = [f"unreadable and left out: {by_split}"] + [f"  {one.name}: {one.reason}" for one in bad[:most]]
    return lines + ([f"  and {len(bad) - most:,} more, all in the manifest"] if len(bad) > most else [])


if __name__ == "__main__":
    sys.exit(main())
