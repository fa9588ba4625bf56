"""svm and lowshot of a backbone on VOC2007: features of its layers, squashed to a square, then ``svm``'s arithmetic."""

from __future__ import annotations

import os
from functools import partial

from tqdm import tqdm

from raydc.benchmarks import published, svm
from raydc.benchmarks.datasets import IMAGES, Voc07, read_voc07
from raydc.benchmarks.features import ImageSet, extract, image_files, variants
from raydc.benchmarks.options import Lowshot, Setting, Svm
from raydc.benchmarks.scorecard import Row
from raydc.benchmarks.setting import OFFICIAL_SIZE, Candidate, notes, once

OFFICIAL = published.OFFICIAL["voc07"]


def image_sets(data: Voc07) -> dict[str, ImageSet]:
    """trainval and test, as images to extract from."""
    paths = {split: [f"{IMAGES}/{name}" for name in data.names[split]] for split in OFFICIAL}
    return {split: image_files(data.folder, f"VOC07 {split}", paths[split]) for split in OFFICIAL}


def describe(data: Voc07) -> str:
    """The data in words, for a row of the scorecard."""
    counts = {split: len(data.names[split]) for split in OFFICIAL}
    if counts == OFFICIAL:
        return "VOC07: 5,011 trainval, 4,952 test images"
    parts = [f"{counts[split]:,} of {whole:,} {split}" for split, whole in OFFICIAL.items()]
    return f"VOC07 subset: {', '.join(parts)} images"


def is_full(data: Voc07, candidate: Candidate) -> bool:
    return all(len(data.names[split]) == whole for split, whole in OFFICIAL.items()) and candidate.size == OFFICIAL_SIZE


def _measure(options: Setting, candidate: Candidate, data: Voc07, images, layers: tuple[str, ...], arithmetic) -> dict:
    """{BatchNorm statistics: result of ``arithmetic(features, progress)``} for each variant of the candidate."""
    found = {}
    for variant in variants(options, candidate, images["trainval"], squash=True):
        extracted = {split: extract(options, variant, images[split], "layers", squash=True) for split in images}
        features = {layer: (extracted["trainval"].load(layer), extracted["test"].load(layer)) for layer in layers}
        with tqdm(desc=variant.name, unit="task", leave=False, disable=None) as bar:
            found[variant.statistics] = arithmetic(features, partial(_move, bar))
    options.folder.write_json("result.json", {"data": describe(data), "backbone": candidate.label, "variants": found})
    return found


def _facts(candidate: Candidate, images: dict[str, ImageSet]) -> dict[str, str]:
    return {"backbone": candidate.fingerprint, "data": "/".join(one.fingerprint for one in images.values())}


def _move(bar: tqdm, done: int, total: int, what: str) -> None:
    bar.total = total
    bar.set_postfix_str(what, refresh=False)
    bar.update(done - bar.n)


def _ignored(data: Voc07) -> str:
    """A note on images whose every object is difficult: negatives in training, in no class of the test."""
    counts = ", ".join(f"{num} of {split}" for split, num in data.num_only_ignored.items() if num)
    return f"images with difficult objects alone: {counts}" if counts else ""


def run_svm(options: Svm, candidate: Candidate) -> list[Row]:
    """The rows of the scorecard: each layer, and the best; for fresh weights the better of both variants, layer by layer."""
    candidate.check_residual("svm")
    data = read_voc07(options.data)
    labels = data.labels["trainval"], data.labels["test"]
    svm.check_classes(*labels, list(data.classes))
    images = image_sets(data)

    def arithmetic(features, progress) -> dict:
        parallel = options.num_workers > 0
        return svm.run_svm(features, *labels, data.classes, seed=options.seed, parallel=parallel, progress=progress)

    def measure() -> list[Row]:
        return _svm_rows(options, candidate, data, _measure(options, candidate, data, images, options.layers, arithmetic))

    return once(options, _facts(candidate, images), measure, cpus=os.cpu_count() or 1)


def _svm_rows(options: Svm, candidate: Candidate, data: Voc07, found: dict) -> list[Row]:
    maps = {
        layer: max((result["layers"][layer]["map"], statistics) for statistics, result in found.items())
        for layer in options.layers
    }
    best = max(maps, key=lambda layer: maps[layer][0])
    return [
        Row(
            benchmark="svm",
            column=column,
            value=round(maps[layer][0], 2),
            data=describe(data),
            backbone=candidate.label,
            full=is_full(data, candidate),
            notes=notes(candidate, maps[layer][1], f"best layer {layer}" if column == "best" else "", _ignored(data)),
        )
        for column, layer in [*((layer, layer) for layer in options.layers), ("best", best)]
    ]


def run_lowshot(options: Lowshot, candidate: Candidate) -> list[Row]:
    """The rows of the scorecard: k shots as published (cost chosen on test), and beside them the clean choice."""
    data = read_voc07(options.data)
    labels = data.labels["trainval"], data.labels["test"]
    svm.check_shots(*labels, list(data.classes), options.shots, options.num_samples)
    images = image_sets(data)

    def arithmetic(features, progress) -> dict:
        return svm.run_low_shot(
            features,
            *labels,
            data.classes,
            shots=options.shots,
            num_samples=options.num_samples,
            seed=options.seed,
            parallel=options.num_workers > 0,
            progress=progress,
        )

    def measure() -> list[Row]:
        found = _measure(options, candidate, data, images, (options.layer,), arithmetic)
        return _lowshot_rows(options, candidate, data, found)

    return once(options, _facts(candidate, images), measure, cpus=os.cpu_count() or 1)


def _lowshot_rows(options: Lowshot, candidate: Candidate, data: Voc07, found: dict) -> list[Row]:
    draws = "" if options.num_samples == svm.NUM_SAMPLES else f"{options.num_samples} draws instead of {svm.NUM_SAMPLES}"
    rows = []
    for place, k in enumerate(options.shots):
        for kind, benchmark in (("as_published", "lowshot"), ("clean", "lowshot_clean")):
            figures = {s: result["layers"][options.layer][place][kind] for s, result in found.items()}
            statistics, one = max(figures.items(), key=lambda item: item[1]["map"])
            how = (
                "cost chosen on the test set, as published"
                if kind == "as_published"
                else "cost chosen without looking at the test set"
            )
            rows.append(
                Row(
                    benchmark=benchmark,
                    column=f"k={k}",
                    value=round(one["map"], 2),
                    spread=round(one["std"], 2),
                    seeds=options.num_samples,
                    data=describe(data),
                    backbone=candidate.label,
                    full=is_full(data, candidate) and kind == "as_published" and not draws,
                    notes=notes(candidate, statistics, options.layer, how, draws, _ignored(data)),
                )
            )
    return rows
