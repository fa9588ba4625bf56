"""All benchmarks that the given data allow, one after the other, with one extraction and one scorecard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace

from raydc.benchmarks import knn, linear, scorecard, semisup, voc07
from raydc.benchmarks.datasets import read_voc07
from raydc.benchmarks.options import All, Knn, Linear, Lowshot, Semisup, Setting, Svm
from raydc.benchmarks.scorecard import Row
from raydc.benchmarks.setting import Candidate
from raydc.config import UsageError
from raydc.data.schema import MANIFEST
from raydc.storage import Folder

RUN: dict[type[Setting], Callable[..., list[Row]]] = {
    Knn: knn.run,
    Linear: linear.run,
    Semisup: semisup.run,
    Svm: voc07.run_svm,
    Lowshot: voc07.run_lowshot,
}


def run(options: All, candidate: Candidate) -> list[Row]:
    """The rows of all benchmarks, written as they come; a rerun goes on with what is missing."""
    folder = Folder(options.run_dir)
    rows: list[Row] = []
    for one in _plan(options):
        done = scorecard.read(one.folder) if one.folder.exists(scorecard.SCORECARD) else RUN[type(one)](one, candidate)
        rows = scorecard.merge(rows, done)
        scorecard.write(folder, rows)
    return rows


def _plan(options: All) -> Iterator[Setting]:
    """Each benchmark with its options; those with the cached features first."""
    for place in options.data:
        if Folder(place).exists(MANIFEST):
            yield from _on_shards(options, place)
        else:
            yield from _on_voc07(options, place)


def _given(options: All, cls: type[Setting], data: str, name: str, **more) -> Setting:
    """Options of one benchmark; its run directory is named after it and its data."""
    where = f"{options.run_dir.rstrip('/')}/{name}_{data.rstrip('/').rpartition('/')[2]}"
    common = {field.name: getattr(options, field.name) for field in fields(Setting) if hasattr(options, field.name)}
    features = f"{options.run_dir.rstrip('/')}/features"
    return cls(**common | {"data": data, "run_dir": where, "features": features} | more)


def _on_shards(options: All, data: str) -> Iterator[Setting]:
    yield _given(options, Knn, data, "knn")
    for fraction in options.fractions:
        yield _given(options, Semisup, data, f"semisup_{fraction:g}", fraction=fraction)
    yield _given(options, Linear, data, f"linear_{options.preset}", preset=options.preset, epochs=options.epochs)


def _on_voc07(options: All, data: str) -> Iterator[Setting]:
    try:
        labels = read_voc07(data).labels["trainval"]
    except UsageError as error:
        raise UsageError(f"{data} is neither shards (no {MANIFEST}) nor a VOC2007 folder ({error})") from None
    svm = _given(options, Svm, data, "svm")
    yield svm
    best = next(row for row in scorecard.read(svm.folder) if row.column == "best")
    layer = next(note.removeprefix("best layer ") for note in best.notes if note.startswith("best layer "))
    most = int((labels == 1).sum(0).min())
    lowshot = _given(options, Lowshot, data, "lowshot", layer=layer)
    yield replace(lowshot, shots=tuple(k for k in lowshot.shots if k <= most))
