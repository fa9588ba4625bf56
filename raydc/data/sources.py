"""Where images come from: each source becomes one listing a split, made without reading a single image.

A source is a class-per-folder tree, a flat folder (no labels), a list file (``path label`` a line), an
iNaturalist JSON file, or the name ``digits``. Listings are columns: 100,000 images are listed in well under a
second.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

JPEG_EXTENSIONS = (b".jpg", b".jpeg", b".jpe", b".jfif")
PNM_EXTENSIONS = (b".ppm", b".pgm", b".pbm", b".pnm")
IMAGE_EXTENSIONS = {
    *JPEG_EXTENSIONS,
    *PNM_EXTENSIONS,
    *(b".png", b".bmp", b".gif", b".webp", b".tif", b".tiff", b".jp2", b".avif"),
}
VAL_NAMES = ("val", "test")
MAX_CLASSES = 1_000_000  # a "class index" above this is some other number


class SourceError(ValueError):
    """A source that cannot be listed; the message is one sentence with the remedy."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Listing:
    """One split as columns, an entry an image.

    ``paths`` are bytes (a file name need not be UTF-8), relative to ``root`` or absolute; ``labels`` are (N,)
    int32
    or None; ``blobs`` are the encoded images of a source that has no files.
    """

    root: str
    paths: pa.LargeBinaryArray
    labels: np.ndarray | None
    blobs: pa.LargeBinaryArray | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, rows: np.ndarray) -> Listing:
        """The given rows, in the given order."""
        return replace(
            self,
            paths=self.paths.take(pa.array(rows)),
            labels=None if self.labels is None else self.labels[rows],
            blobs=None if self.blobs is None else self.blobs.take(pa.array(rows)),
        )

    def name(self, row: int) -> str:
        """The path as text, as it is stored."""
        return _text(self.paths[row].as_py())

    def label(self, row: int) -> int | None:
        return None if self.labels is None else int(self.labels[row])

    def read(self, row: int) -> bytes:
        """The encoded image; OSError where the file cannot be read."""
        if self.blobs is not None:
            return self.blobs[row].as_py()
        with open(self._file(row), "rb") as file:
            return file.read()

    def size(self, row: int) -> int:
        """Bytes of the encoded image, 0 where there is none."""
        if self.blobs is not None:
            return len(self.blobs[row].as_py())
        return os.path.getsize(self._file(row)) if os.path.exists(self._file(row)) else 0

    def _file(self, row: int) -> bytes:
        return os.path.join(os.fsencode(self.root), self.paths[row].as_py())


@dataclass(frozen=True, kw_only=True)
class Source:
    """What SRC holds: ``train``, perhaps ``val``, class names (None without labels), notes."""

    splits: dict[str, Listing]
    classes: tuple[str, ...] | None
    notes: tuple[str, ...]
    held_out: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """A listing with its own class names; ``numbered`` where the labels are class indices without names."""

    what: str
    listing: Listing
    classes: tuple[str, ...] | None = None
    numbered: bool = False
    notes: tuple[str, ...] = ()


def list_source(
    src: str | Path,
    *,
    val: str | Path | None = None,
    root: str | Path | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
) -> Source:
    """List SRC and its val split; without one, set aside ``val_fraction`` of the images, class-balanced.

    ``root`` is the folder that the paths of list and JSON files are relative to (default: the file's own
    folder).
    """
    if not 0 <= val_fraction < 1:
        raise SourceError(f"val_fraction is {val_fraction}; it is a share of the images, at least 0 and below 1")
    train_src, found_val, notes = _find_splits(src)
    train = _read(train_src, root)
    notes += train.notes
    if train.classes is not None and len(train.classes) == 1:
        notes += (f"all images of {train.what} are of one class ({train.classes[0]}), so the labels say nothing",)
    if val is not None or found_val is not None:
        part = _read(val if val is not None else found_val, root)
        part, classes, more = _in_classes_of(train, part)
        return _source({"train": train.listing, "val": part.listing}, classes, notes + part.notes + more)
    if val_fraction == 0:
        return _source({"train": train.listing}, train.classes, notes)
    held = hold_out(train.listing, val_fraction, seed)
    rest = np.setdiff1d(np.arange(len(train.listing)), held, assume_unique=True)
    splits = {"train": train.listing.take(rest), "val": train.listing.take(held)}
    notes += (f"no val split in the source: {len(held):,} of {len(train.listing):,} images are set aside as val",)
    return _source(splits, train.classes, notes, held_out=True)


def hold_out(listing: Listing, fraction: float, seed: int) -> np.ndarray:
    """Sorted rows of a seeded share: ceil(fraction * N), each class by its size, largest remainders first."""
    rows = len(listing)
    total = math.ceil(fraction * rows - 1e-9)  # rounded up, as scikit-learn does; .1 * 30 is a little above 3
    if total >= rows:
        raise SourceError(f"{rows} image(s) cannot be split into train and val; give --val-fraction 0")
    rng = np.random.default_rng([seed, 1])
    labels = np.zeros(rows, np.int32) if listing.labels is None else listing.labels
    by_class = np.split(np.argsort(labels, kind="stable"), np.unique(np.sort(labels), return_index=True)[1][1:])
    quotas = _quotas(np.array([len(members) for members in by_class]), total)
    return np.sort(np.concatenate([rng.permutation(m)[:q] for m, q in zip(by_class, quotas, strict=True)]))


def _quotas(sizes: np.ndarray, total: int) -> np.ndarray:
    """``total`` shared in proportion to ``sizes``."""
    exact = sizes * (total / sizes.sum())
    quotas = np.floor(exact + 1e-9).astype(np.int64)
    short = total - quotas.sum()
    quotas[np.argsort(quotas - exact, kind="stable")[:short]] += 1
    return quotas


def _source(splits: dict[str, Listing], classes, notes: tuple[str, ...], held_out: bool = False) -> Source:
    for name, listing in splits.items():
        copies = len(listing) - len(listing.paths.unique())
        if copies:
            notes += (f"{name}: {copies:,} path(s) are listed more than once; each line is kept as a row",)
    return Source(splits=splits, classes=classes, notes=notes, held_out=held_out)


# --- which files and folders are which split


def _find_splits(src: str | Path) -> tuple[str | Path, Path | None, tuple[str, ...]]:
    """What to read as train, what as val (None: SRC has none), and notes."""
    folder = Path(src).expanduser()
    if str(src) == "digits" or not folder.is_dir():
        return src, None, ()
    beside = [_text(name) for name in _scan(os.fsencode(folder), Counter())[1]]
    if not _has_train_split(folder, beside):
        return src, None, ()
    val = next((name for name in VAL_NAMES if name in beside), None)
    unused = [name for name in beside if name not in ("train", val)]
    notes = (f"not read: {_listed(unused)} in {folder}",)
    return folder / "train", folder / val if val else None, notes if unused else ()


def _has_train_split(folder: Path, beside: list[str]) -> bool:
    """Whether ``train`` is a split, not a class of that name (a flat folder among others is a class)."""
    if "train" not in beside:
        return False
    _, nested = _scan(os.fsencode(folder / "train"), Counter())
    return bool(nested) or beside == ["train"] or any(name in beside for name in VAL_NAMES)


def _read(src: str | Path, root: str | Path | None) -> _Part:
    """One split of any kind."""
    if str(src) == "digits":
        return _digits()
    path = Path(src).expanduser().absolute()
    if not path.exists():
        raise SourceError(f"{path} does not exist; SRC is a folder of images, a list file, a JSON file or 'digits'")
    if path.is_dir():
        return _folder(path)
    base = str(Path(root).expanduser().absolute() if root else path.parent)
    if not os.path.isdir(base):
        raise SourceError(f"{base}, given as --root, is no folder")
    return _inaturalist(path, base) if path.suffix == ".json" else _list_file(path, base)


# --- folders


def _folder(path: Path) -> _Part:
    """A class-per-folder tree, or a flat folder without labels."""
    skipped: Counter[str] = Counter()
    try:
        top, folders = _scan(os.fsencode(path), skipped)
        below = {name: _walk(os.path.join(os.fsencode(path), name), name + b"/", skipped) for name in folders}
    except OSError as error:
        raise SourceError(f"{_text(error.filename)} cannot be listed ({error.strerror}); check its permissions") from None
    filled = {name: found for name, found in below.items() if found}
    notes = _skipped_note(path, skipped) + _empty_note(path, folders, filled)
    if top and filled:
        raise SourceError(
            f"{path} holds {len(top):,} image(s) beside class folders ({_listed(map(_text, filled))}); "
            "move them into a folder, or name images and labels in a list file"
        )
    if not top and not filled:
        raise SourceError(f"{path} holds no images{' (' + notes[0] + ')' if notes else ''}; is it the right folder?")
    if top:
        return _Part(what=str(path), listing=_listing(path, top), notes=notes)
    return _class_tree(path, folders, below, notes)


def _class_tree(path: Path, folders: list[bytes], below: dict[bytes, list[bytes]], notes: tuple[str, ...]) -> _Part:
    sizes = [len(below[name]) for name in folders]
    labels = np.repeat(np.arange(len(folders), dtype=np.int32), sizes)
    classes = tuple(map(_text, folders))
    paths = [name for folder in folders for name in below[folder]]
    return _Part(what=str(path), listing=_listing(path, paths, labels), classes=classes, notes=notes)


def _scan(folder: bytes, skipped: Counter[str]) -> tuple[list[bytes], list[bytes]]:
    """Sorted names of the images and of the folders directly inside; everything else is counted."""
    images, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            extension = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith(b"."):
                skipped["hidden"] += 1
            elif entry.is_dir():
                folders.append(entry.name)
            elif extension in IMAGE_EXTENSIONS:
                images.append(entry.name)
            else:
                skipped[_text(extension) or "no extension"] += 1
    return sorted(images), sorted(folders)


def _walk(folder: bytes, prefix: bytes, skipped: Counter[str]) -> list[bytes]:
    """Images at any depth, as paths that begin with ``prefix``."""
    images, folders = _scan(folder, skipped)
    found = [prefix + name for name in images]
    for name in folders:
        found += _walk(os.path.join(folder, name), prefix + name + b"/", skipped)
    return found


def _skipped_note(path: Path, skipped: Counter[str]) -> tuple[str, ...]:
    if not skipped:
        return ()
    kinds = _listed(f"{kind} {count:,}" for kind, count in skipped.most_common())
    return (f"{skipped.total():,} file(s) below {path} are no images by their name: {kinds}",)


def _empty_note(path: Path, folders: list[bytes], filled: dict) -> tuple[str, ...]:
    empty = [_text(name) for name in folders if name not in filled]
    return (f"{len(empty)} folder(s) of {path} hold no images: {_listed(empty)}",) if empty and filled else ()


# --- list files


def _list_file(path: Path, root: str) -> _Part:
    """``path label`` a line, split at the last space; labels are class indices or names, or none."""
    lines = [line.rstrip() for line in path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()]
    lines = [(number, line) for number, line in enumerate(lines, 1) if line]
    if not lines:
        raise SourceError(f"{path} is empty; a list file has a line 'path label' for each image")
    if b"\0" in lines[0][1]:
        raise SourceError(f"{path} is no text file; a list file has a line 'path label' for each image")
    pairs = [_path_and_label(line) for _, line in lines]
    bare = [number for (number, _), (_, label) in zip(lines, pairs, strict=True) if label is None]
    if len(bare) == len(lines):
        return _Part(what=str(path), listing=_listing(root, [image for image, _ in pairs]))
    if bare:
        raise SourceError(f"line {bare[0]} of {path} has no label while others have; give all of them one, or none")
    labels, classes, numbered = _labels([label for _, label in pairs], path)
    listing = _listing(root, [image for image, _ in pairs], labels)
    return _Part(
        what=str(path),
        listing=listing,
        classes=classes,
        numbered=numbered,
        notes=_unused_note(path, labels, classes),
    )


def _path_and_label(line: bytes) -> tuple[bytes, bytes | None]:
    parts = line.rsplit(maxsplit=1)
    is_path = os.path.splitext(parts[-1])[1].lower() in IMAGE_EXTENSIONS  # "my cat.jpg" is a path with a space
    return (line, None) if len(parts) == 1 or is_path else (parts[0], parts[1])


def _labels(tokens: list[bytes], path: Path) -> tuple[np.ndarray, tuple[str, ...], bool]:
    """int32 labels, class names, and whether the labels were numbers."""
    distinct = sorted(set(tokens))
    if all(token.isdigit() for token in distinct):
        labels = np.array([int(token) for token in tokens])
        return labels.astype(np.int32), _numbers(labels, path), True
    index = {token: i for i, token in enumerate(distinct)}
    return np.array([index[token] for token in tokens], np.int32), tuple(map(_text, distinct)), False


def _numbers(labels: np.ndarray, path: Path) -> tuple[str, ...]:
    """Names for labels that are numbers: the numbers."""
    if labels.max() >= MAX_CLASSES:
        raise SourceError(f"label {labels.max()} in {path} is no class index; labels count from 0, or are class names")
    return tuple(map(str, range(labels.max() + 1)))


def _unused_note(path: Path, labels: np.ndarray, classes: tuple[str, ...]) -> tuple[str, ...]:
    unused = np.setdiff1d(np.arange(len(classes)), labels)
    if not len(unused):
        return ()
    return (f"{len(unused)} of {len(classes)} labels do not occur in {path}: {_listed(map(str, unused))}",)


def _inaturalist(path: Path, root: str) -> _Part:
    """A COCO-style JSON file with one annotation an image, as iNaturalist 2018 has."""
    try:
        content = json.loads(path.read_bytes())
        images, annotations = content["images"], content.get("annotations")
        paths = [os.fsencode(image["file_name"]) for image in images]
        ids = [image["id"] for image in images]
        category = {one["image_id"]: one["category_id"] for one in annotations or ()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{path} is no iNaturalist file (images, annotations, file_name, ...): {error!r}") from None
    if not images:
        raise SourceError(f"{path} names no images")
    if not annotations:
        return _Part(what=str(path), listing=_listing(root, paths))
    missing = [one for one in ids if one not in category]
    if missing or len(annotations) != len(images):
        raise SourceError(f"{path} has {len(annotations):,} annotations for {len(images):,} images; it takes one for each")
    labels = np.array([category[one] for one in ids])
    classes = _numbers(labels, path)
    named = {one["id"]: str(one["name"]) for one in content.get("categories", ())}
    if sorted(named) == list(range(len(classes))) and len(set(named.values())) == len(named):
        classes = tuple(named[i] for i in range(len(classes)))
    return _Part(what=str(path), listing=_listing(root, paths, labels.astype(np.int32)), classes=classes, numbered=True)


def _digits() -> _Part:
    """scikit-learn's 1,797 scanned digits: 8x8, 16 gray levels, no download."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    paths = [b"digit_%04d.png" % i for i in range(len(digits.images))]
    blobs = pa.array([_png((image * (255 / 16)).round().astype(np.uint8)) for image in digits.images], pa.large_binary())
    listing = replace(_listing("", paths, digits.target.astype(np.int32)), blobs=blobs)
    return _Part(what="digits", listing=listing, classes=tuple(map(str, range(10))))


def _png(gray: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(gray).save(file, "PNG")
    return file.getvalue()


# --- one set of classes for train and val


def _in_classes_of(train: _Part, val: _Part) -> tuple[_Part, tuple[str, ...] | None, tuple[str, ...]]:
    """``val`` with its labels in terms of train's classes, the classes, and notes."""
    if val.classes is None or train.classes is None:
        notes = tuple(f"{part.what} has no labels" for part in (train, val) if part.classes is None)
        return val, train.classes or val.classes, notes if train.classes or val.classes else ()
    labels = _mapped(train, val)
    absent = [train.classes[i] for i in np.setdiff1d(train.listing.labels, labels)]
    notes = (f"{len(absent)} class(es) of train have no image in val: {_listed(absent)}",) if absent else ()
    return replace(val, listing=replace(val.listing, labels=labels)), train.classes, notes


def _mapped(train: _Part, val: _Part) -> np.ndarray:
    """Val's labels as indices into train's classes: by name, or by number where val has only numbers."""
    index = {name: i for i, name in enumerate(train.classes)}
    used = np.unique(val.listing.labels)
    foreign = [val.classes[i] for i in used if val.classes[i] not in index]
    if not foreign:
        table = np.array([index.get(name, -1) for name in val.classes], np.int32)
        return table[val.listing.labels]
    if val.numbered and used.max() < len(train.classes):
        return val.listing.labels
    raise SourceError(
        f"{val.what} has {len(foreign)} class(es) that {train.what} has not ({_listed(foreign)}); "
        f"val's classes must be among train's {len(train.classes)}, by name or as numbers from 0"
    )


def _listing(root: str | Path, paths: list[bytes], labels: np.ndarray | None = None) -> Listing:
    return Listing(root=str(root), paths=pa.array(paths, pa.large_binary()), labels=labels)


def _text(name: str | bytes) -> str:
    """A file name as text that can be stored and printed, whatever its bytes are."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")
