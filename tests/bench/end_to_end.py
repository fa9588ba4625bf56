"""Five epochs on 5,000 CIFAR-10 images at 64 pixels, ours against textbook.py: row 12 of README's table.

    uv run python tests/bench/end_to_end.py --cifar FOLDER --json end_to_end.json

FOLDER holds train/ and test/ with a folder for each class. Both train the same AlexNet of half width behind Sobel from the
same weights: k = 100, PCA to 256, whitened, fresh heads, uniform draws over clusters, crops and flips, rate .05, batch
128. The clock runs from the first extraction to the end of the last epoch, ours with both commits of each epoch; Ray, the
shards and the decoding of ours (once, before) are set-up. ``--repeats`` seeds, in turns. Then both extract the images again:
a linear probe on the 5,000 test images, and the NMI of k-means with the classes; ours may not be .01 below.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import textbook
import torch
from epoch import in_a_worker
from measure import finish, parser, row
from torch import nn

from raydc import deepcluster, make_shards
from raydc.config import ClusteringConfig, ImagesConfig, ModelConfig
from raydc.launch import Job
from raydc.models.backbone import build_backbone
from raydc.probe import linear_top1, nmi_of_kmeans
from raydc.recipes import cifar10_alexnet_sobel
from raydc.run import Run, collect
from raydc.seeding import derive
from raydc.training import Clock

SIZE, K, DIM, BATCH, LR, EPOCHS, IMAGES = 64, 100, 256, 128, 0.05, 5, 5000
MODEL = ModelConfig(architecture="alexnet", width=32, sobel=True)


def settings(seed: int):
    plain = cifar10_alexnet_sobel()
    train = replace(
        plain.train, epochs=EPOCHS, batch_size=BATCH, lr=LR, schedule="constant", schedule_epochs=0, head_momentum=0.0
    )
    return replace(
        plain,
        seed=seed,
        model=MODEL,
        images=ImagesConfig(size=SIZE, resize=SIZE, cache="yes"),
        clustering=ClusteringConfig(num_clusters=K, pca_dim=DIM),
        train=replace(train, threads=os.cpu_count()),
    )


def quality(train_ND: np.ndarray, train_labels: np.ndarray, val_MD: np.ndarray, val_labels: np.ndarray) -> dict:
    return {
        "linear": round(linear_top1(train_ND, train_labels, val_MD, val_labels), 4),
        "nmi": round(nmi_of_kmeans(train_ND, train_labels, K, seed=0, whiten_dim=DIM), 4),
    }


def by_textbook(lists: list[str], seed: int) -> dict:
    """In a process of its own."""
    backbone = build_backbone(MODEL, derive(seed, "backbone"))
    backbone.norm = nn.Identity()  # its pixels are normalised by the transforms
    (train, train_labels), (val, val_labels) = (read_list(Path(file)) for file in lists)
    began = time.perf_counter()
    textbook.deepcluster(backbone, train, size=SIZE, k=K, dim=DIM, batch=BATCH, lr=LR, epochs=EPOCHS, seed=seed)
    seconds = time.perf_counter() - began
    features = [textbook.features_of(backbone, paths, SIZE, BATCH) for paths in (train, val)]
    return {"seconds": seconds} | quality(features[0], train_labels, features[1], val_labels)


def loop(job: Job) -> dict:
    run = Run(job)
    began = time.perf_counter()
    for epoch in range(EPOCHS):
        assignment = deepcluster.extract_and_cluster(run, epoch)
        deepcluster.reassign(run, assignment)
        loss = deepcluster.train(run, assignment)
        deepcluster.report(run, epoch, loss)
    seconds, sides = time.perf_counter() - began, []
    for split, labels in zip(("train", "val"), run.labels, strict=True):
        ids, features = collect(run, run.model.backbone, run.images.extract(split), Clock())
        sides += [features, labels[ids]]
    return {"seconds": seconds} | quality(*sides)


def write_lists(cifar: Path, folder: Path) -> list[str]:
    """List files of 500 images of each class, and of the test images."""
    found = []
    for name, each in (("train", IMAGES // 10), ("test", None)):
        classes = sorted(one for one in (cifar / name).iterdir() if one.is_dir())
        lines = [f"{file.resolve()} {label}\n" for label, one in enumerate(classes) for file in sorted(one.iterdir())[:each]]
        found.append(str(folder / f"{name}.txt"))
        Path(found[-1]).write_text("".join(lines))
    return found


def read_list(file: Path) -> tuple[list[str], np.ndarray]:
    paths, labels = zip(*(line.rsplit(" ", 1) for line in file.read_text().splitlines()), strict=True)
    return list(paths), np.array(labels, int)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--cifar", type=Path, required=True, help="folder of train/CLASS/* and test/CLASS/*")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        lists, shards = write_lists(arguments.cifar, Path(scratch)), f"{scratch}/shards"
        make_shards(lists[0], shards, val=lists[1], root="/", use_ray=False, progress=False)
        pairs = []
        for seed in range(arguments.repeats):
            mine = in_a_worker(loop, replace(settings(seed), data=shards))
            done = subprocess.run(
                [sys.executable, __file__, "--textbook", str(seed), *lists], capture_output=True, check=True
            )
            pairs.append((mine, json.loads(done.stdout)))
            print(f"seed {seed}: ours {pairs[-1][0]}, textbook {pairs[-1][1]}", flush=True)
    found = {}
    for name, side in (("ours", 0), ("textbook", 1)):
        for key in ("seconds", "linear", "nmi"):
            values = [pair[side][key] for pair in pairs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            found[f"{name}_{key}"] = [round(statistics.mean(values), 4), round(spread, 4)]
    ratio = statistics.median(theirs["seconds"] / mine["seconds"] for mine, theirs in pairs)
    kept = all(found[f"ours_{key}"][0] >= found[f"textbook_{key}"][0] - 0.01 for key in ("linear", "nmi"))
    one = row("12", ratio, 2, 4, found)
    finish([one | {"ok": one["ok"] and kept}], arguments.json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--textbook"]:
        torch.set_num_threads(os.cpu_count() or 1)
        print(json.dumps(by_textbook(sys.argv[3:], int(sys.argv[2]))))
    else:
        main()
