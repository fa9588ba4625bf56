"""What an epoch costs beside extraction, k-means and training: rows 4, 9 and 10 of README's table.

    uv run python tests/bench/bookkeeping.py --data CIFAR_SHARDS --json bookkeeping.json

Row 4: labels, cluster sizes, sampling plan in order and NMI for 1.28 M images and k = 10,000, against textbook.py, in turns
on one thread; ``bytes_an_image`` stays alive beside the labels until the next clustering (row 4 is missed above 16),
``peak_bytes`` is the most at any moment.
Row 9 (with --data): seconds from the last step of an epoch to the first batch of the next in a real run with one worker,
minus what the journal says of extraction and k-means; the median over the epochs.
Row 10: what a bank and a driver hold for an image beside its features after five epochs, 1.28 M synthetic features, d = 16,
k = 1,000; ``rounds`` are the bytes after each epoch, which must not grow.
"""

from __future__ import annotations

import gc
import statistics
import time
import tracemalloc
from dataclasses import replace

import numpy as np
import textbook
from epoch import in_a_worker
from measure import finish, in_turns, median_ratio, parser, row, seconds
from threadpoolctl import threadpool_limits

from raydc import deepcluster
from raydc.clustering.bank import FeatureBank
from raydc.clustering.diagnostics import nmi
from raydc.clustering.kmeans import kmeans
from raydc.clustering.sampling import uniform_plan
from raydc.config import ClusteringConfig
from raydc.launch import Job
from raydc.recipes import cifar10_resnet18
from raydc.run import Run

NUM, K, BATCH = 1_280_000, 10_000, 256
LENGTH = NUM // BATCH * BATCH


def ours(labels: np.ndarray, previous: np.ndarray, k: int, length: int, seed: int) -> dict:
    """The same as textbook.bookkeeping, as the loop does it (deepcluster.make_plan, Run.describe, CachedImages.train)."""
    plan = uniform_plan(labels, k, length, seed)
    return {"sizes": np.bincount(labels, minlength=k), "plan": plan, "draws": plan.draws(), "nmi": nmi(labels, previous)}


def two_clusterings() -> tuple[np.ndarray, np.ndarray]:
    """Clusters of uneven sizes, of which two fifths of the images change theirs."""
    random = np.random.default_rng(0)
    popular = random.dirichlet(np.full(K, 2.0))
    labels = random.choice(K, NUM, p=popular).astype(np.int32)
    moved = random.random(NUM) < 0.4
    return labels, np.where(moved, random.choice(K, NUM, p=popular), labels).astype(np.int32)


def row_4(repeats: int) -> list[dict]:
    labels, previous = two_clusterings()
    arguments = labels, previous, K, LENGTH, 1
    kept = textbook.cluster_lists(previous.tolist(), K), [f"train/{image}.jpg" for image in range(NUM)], K, LENGTH, 1
    with threadpool_limits(1):
        pairs = in_turns(lambda: textbook.bookkeeping(labels, *kept), lambda: ours(*arguments), repeats)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    mine = ours(*arguments)
    gc.collect()
    alive, peak = ((one - before) / NUM for one in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    theirs = textbook.bookkeeping(labels, *kept)
    per_cluster = np.bincount(labels[mine["draws"][0]], minlength=K)
    quality = {
        "seconds": [round(statistics.median(side), 3) for side in zip(*pairs, strict=True)],
        "bytes_an_image": round(alive, 1),
        "peak_bytes": round(peak, 1),
        "nmi": [round(theirs["nmi"], 6), round(float(mine["nmi"]), 6)],
        "draws_of_a_cluster": [int(per_cluster.min()), int(per_cluster.max())],
    }
    one = row("4", median_ratio(pairs), 25, 100, quality)
    return [one | {"ok": one["ok"] and alive <= 16}]


class Watched:
    """The images of a run, with the moments of a pass: its first batch is there, its last step is done."""

    def __init__(self, images, moments: list[float]) -> None:
        self.images, self.moments = images, moments

    def __getattr__(self, name: str):
        return getattr(self.images, name)

    def train(self, *arguments, **options):
        first = True
        for batch in self.images.train(*arguments, **options):
            if first:
                self.moments.append(time.perf_counter())
            first = False
            yield batch
        self.moments.append(time.perf_counter())


def loop(job: Job) -> tuple[list[float], list[float]]:
    """Seconds between two training passes, and of extraction and k-means in them."""
    run, moments = Run(job), []
    run.images = Watched(run.images, moments)
    for epoch in range(job.config.train.epochs):
        assignment = deepcluster.extract_and_cluster(run, epoch)
        deepcluster.reassign(run, assignment)
        loss = deepcluster.train(run, assignment)
        deepcluster.report(run, epoch, loss)
    gaps = [b - a for a, b in zip(moments[1::2], moments[2::2], strict=False)]
    work = [
        sum(times) for times in zip(*(run.journal.all(phase, "seconds") for phase in ("extract", "cluster")), strict=True)
    ]
    return gaps, work[1:]


def row_9(data: str) -> list[dict]:
    config = replace(cifar10_resnet18(), data=data)
    # A short plan: what is measured lies between the passes.
    config = replace(config, train=replace(config.train, epochs=5, plan_length=0.02))
    gaps, work = in_a_worker(loop, config)
    between = statistics.median(gap - own for gap, own in zip(gaps, work, strict=True))
    sort = seconds(lambda: np.sort(np.random.default_rng(0).random(2_000_000)))
    quality = {
        "gap": [round(gap, 2) for gap in gaps],
        "extraction_and_kmeans": [round(own, 2) for own in work],
        "sort_s": round(sort, 3),
    }
    return [row("9", between, 0.5 + 0.2e-6 * 50_000, 0.1, quality, least=False)]


def row_10() -> list[dict]:
    dim, k, random = 16, 1000, np.random.default_rng(0)
    config = ClusteringConfig(num_clusters=k, pca_dim=dim, iterations=2)
    bank, rounds = FeatureBank(NUM, config), []
    features = np.empty((NUM, dim), np.float32)
    kmeans(np.eye(2, dtype=np.float32), 2)  # what it imports is no image's
    tracemalloc.start()
    for epoch in range(5):
        random.standard_normal(out=features, dtype=np.float32)
        token = bank.open()
        for start in range(0, NUM, 65536):
            ids = np.arange(start, min(NUM, start + 65536))
            bank.push(token, ids, features[ids])
        assignment = bank.cluster(token, epoch, 0, "")
        plan = uniform_plan(assignment.pseudo_labels, k, LENGTH, epoch)  # noqa: F841 (alive, as it is while a pass goes on)
        gc.collect()
        rounds.append(round(tracemalloc.get_traced_memory()[0] / NUM - 4 * dim, 2))
    tracemalloc.stop()
    flat = rounds[-1] <= rounds[1] + 0.1
    one = row("10", rounds[-1], 16, 8, {"rounds": rounds, "flat": flat}, least=False)
    return [one | {"ok": one["ok"] and flat}]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", help="shards of CIFAR-10, for row 9")
    arguments = options.parse_args()
    rows = row_4(arguments.repeats) + (row_9(arguments.data) if arguments.data else []) + row_10()
    finish(rows, arguments.json)


if __name__ == "__main__":
    main()
