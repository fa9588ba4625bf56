"""The shard contract: what a shards folder holds and what its manifest.json says.

A row is ``image_id`` (int64, dense 0..rows-1 within its split, for life), ``image`` (encoded bytes),
``label`` (int32 or null) and ``name`` (string). Nothing relies on row order or file order. The manifest is
written last: a folder without one is no shards folder, whatever files it holds.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
COLUMNS = ("image_id", "image", "label", "name")


class ShardError(ValueError):
    """A shards folder that cannot be read as one; the message is a sentence for the user."""


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One Parquet file; ``name`` is relative to the shards folder, ``bytes`` is the size of the file."""

    name: str
    rows: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split: ``rows`` images with ids 0..rows-1, and how many more were listed but could not be read."""

    rows: int
    files: tuple[ShardFile, ...]
    num_unreadable: int = 0


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """An image that was listed and is not in the shards."""

    split: str
    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What manifest.json holds.

    ``classes`` names the labels (label i is ``classes[i]``) and is None for a set without labels.
    ``fingerprint`` depends on the images, their ids, labels and names, and not on how the rows are cut into
    files. ``normalised`` counts by reason the images that were not kept byte for byte. ``notes`` are
    sentences about the source.
    """

    splits: dict[str, Split]
    classes: tuple[str, ...] | None
    fingerprint: str
    unreadable: tuple[Unreadable, ...] = ()
    normalised: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """A value for ``json.dump``."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Manifest:
        """The inverse of ``to_json``; ShardError for another format or for something that is no manifest."""
        version = value.get("format_version") if isinstance(value, dict) else None
        if version != FORMAT_VERSION:
            raise ShardError(f"the manifest has format version {version!r} and this raydc reads {FORMAT_VERSION}")
        try:
            return cls(**value | _typed(value))
        except (KeyError, TypeError, AttributeError) as error:
            raise ShardError(f"the manifest is not complete ({error})") from None


def _typed(value: dict[str, Any]) -> dict[str, Any]:
    """The fields that JSON gives back as plain lists and dicts."""
    classes = value["classes"]
    return {
        "splits": {name: _split(split) for name, split in value["splits"].items()},
        "classes": None if classes is None else tuple(classes),
        "unreadable": tuple(Unreadable(**one) for one in value["unreadable"]),
        "notes": tuple(value["notes"]),
    }


def _split(value: dict[str, Any]) -> Split:
    return Split(**value | {"files": tuple(ShardFile(**one) for one in value["files"])})
