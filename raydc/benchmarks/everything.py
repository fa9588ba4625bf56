"""All benchmarks that the given data allow, one after the other, with one extraction and one scorecard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields

from raydc.benchmarks import detection, knn, linear, scorecard, segmentation, semisup, voc07
from raydc.benchmarks.datasets import Voc07, read_voc07
from raydc.benchmarks.learner import LabelledShards, open_shards
from raydc.benchmarks.options import All, Detection, Knn, Linear, Lowshot, Segmentation, Semisup, Setting, Svm
from raydc.benchmarks.scorecard import Row
from raydc.benchmarks.setting import Candidate, claim
from raydc.config import UsageError
from raydc.data.schema import MANIFEST
from raydc.storage import Folder

RUN: dict[type[Setting], Callable[..., list[Row]]] = {
    Knn: knn.run,
    Linear: linear.run,
    Semisup: semisup.run,
    Svm: voc07.run_svm,
    Lowshot: voc07.run_lowshot,
    Detection: detection.run,
    Segmentation: segmentation.run,
}


def run(options: All, candidate: Candidate) -> list[Row]:
    """The rows of all benchmarks, written as they come; a rerun goes on with what is missing.

    What the data do not allow is said and left out; UsageError where nothing is left.
    """
    folder, rows, refused = options.folder, [], []
    opened = {place: _open(place) for place in options.data}  # all of it, before days of work on the first
    claim(options, {"backbone": candidate.fingerprint}, others=("fractions", "lists"))
    for one in _plan(options, opened):
        try:
            rows = scorecard.merge(rows, RUN[type(one)](one, candidate))
        except UsageError as error:
            refused.append(f"{type(one).__name__.lower()} on {one.data}: {error}")
            print(f"left out: {refused[-1]}", flush=True)
            continue
        scorecard.write(folder, rows)
    if not rows:
        raise UsageError(f"nothing could be measured ({'; '.join(refused)})")
    return rows


def _open(place: str) -> LabelledShards | Voc07:
    if Folder(place).exists(MANIFEST):
        return open_shards(place)
    try:
        return read_voc07(place)
    except UsageError as error:
        raise UsageError(f"{place} is neither shards (no {MANIFEST}) nor a VOC2007 folder ({error})") from None


def _plan(options: All, opened: dict[str, LabelledShards | Voc07]) -> Iterator[Setting]:
    """Each benchmark with its options; those with the cached features first."""
    names = [Folder(place).name for place in opened]
    for number, (place, data) in enumerate(opened.items()):
        name = f"{names[number]}_{number}" if names.count(names[number]) > 1 else names[number]
        of_kind = _on_shards if isinstance(data, LabelledShards) else _on_voc07
        yield from of_kind(options, place, data, name)


def _given(options: All, cls: type[Setting], data: str, name: str, **more) -> Setting:
    """Options of one benchmark; its run directory is named after it and its data."""
    common = {field.name: getattr(options, field.name) for field in fields(Setting) if hasattr(options, field.name)}
    features = options.features or options.folder.place("features")
    places = {"data": data, "run_dir": options.folder.place(name), "features": features}
    return cls(**common | places | more)


def _on_shards(options: All, place: str, data: LabelledShards, name: str) -> Iterator[Setting]:
    num_labelled = int((data.labels["train"] >= 0).sum())
    neighbours = tuple(k for k in Knn.neighbours if k <= num_labelled) or (1,)
    yield _given(options, Knn, place, f"knn_{name}", neighbours=neighbours)
    for number, path in enumerate(options.lists):
        yield _given(options, Semisup, place, f"semisup_list{number}_{name}", list=path)
    for fraction in () if options.lists else options.fractions:
        yield _given(options, Semisup, place, f"semisup_{fraction:g}_{name}", fraction=fraction)
    linear = {"preset": options.preset, "epochs": options.epochs}
    yield _given(options, Linear, place, f"linear_{options.preset}_{name}", **linear)


def _on_voc07(options: All, place: str, data: Voc07, name: str) -> Iterator[Setting]:
    svm = _given(options, Svm, place, f"svm_{name}")
    yield svm
    layers = [row for row in scorecard.read(svm.folder) if row.column != "best"]
    if not layers:
        return
    layer = max(layers, key=lambda row: row.value).column
    most = int((data.labels["trainval"] == 1).sum(0).min())
    shots = tuple(k for k in Lowshot.shots if k <= most)
    yield _given(options, Lowshot, place, f"lowshot_{name}", layer=layer, shots=shots)
