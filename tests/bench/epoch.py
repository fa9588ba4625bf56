"""How much of a steady epoch is the network and k-means: our whole epoch against the bare computation, side by side.

    uv run python tests/bench/epoch.py --data CIFAR_SHARDS --json epoch.json

Ours: a Ray Train worker and the bank's actor. Bare: extraction, k-means and training steps of the same model, dtype and
batch in the same worker, on pixels that are already there: no augmentation, PCA, bank or commits. Both run in turns
(A B A B ...), the median of the ratios counts.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from measure import finish, parser, row

from raydc import deepcluster, family, launch, prepare
from raydc.clustering.kmeans import kmeans
from raydc.config import Config
from raydc.data import stream
from raydc.launch import Job
from raydc.models.norm import folded
from raydc.recipes import cifar10_resnet18
from raydc.remote import Board, Remote, Shared
from raydc.run import Run
from raydc.storage import Folder


def ours(run: Run, epoch: int) -> float:
    """One whole epoch of the loop, with both of its commits."""
    began = time.perf_counter()
    assignment = deepcluster.extract_and_cluster(run, epoch)
    deepcluster.reassign(run, assignment)
    loss = deepcluster.train(run, assignment)
    deepcluster.report(run, epoch, loss)
    return time.perf_counter() - began


def bare(run: Run) -> float:
    """The computation alone, on as many images and steps; the PCA between them is counted as ours."""
    size, config, num = run.config.images.size, run.config.train, run.sizes["train"]
    pixels = run.compute.place(torch.randint(0, 256, (config.batch_size, 3, size, size)).float())
    labels = torch.randint(0, run.config.clustering.num_clusters, (config.batch_size,))
    matrix = np.random.default_rng(0).standard_normal((num, run.config.clustering.pca_dim)).astype(np.float32)
    began = time.perf_counter()
    network = folded(run.model.backbone)
    with torch.inference_mode():
        for _ in range(-(-num // config.batch_size)):
            with run.compute.autocast():
                network(pixels)
    clustering = run.config.clustering
    kmeans(matrix, clustering.num_clusters, iterations=clustering.iterations, threads=torch.get_num_threads())
    run.model.train()
    for _ in range(run.num_draws // config.batch_size):
        with run.compute.autocast():
            scores = run.model(pixels)
        run.state.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(scores.float(), labels).backward()
        run.state.optimizer.step()
    return time.perf_counter() - began


def loop(job: Job) -> list[tuple[float, float]]:
    """Pairs of seconds; the bare steps train on noise, so the weights are put back after each."""
    run, pairs = Run(job), []
    ours(run, 0)  # warm-up, and the baselines
    for epoch in range(1, 1 + job.extras["repeats"]):
        mine = ours(run, epoch)
        kept = {key: value.clone() for key, value in run.model.state_dict().items()}
        pairs.append((mine, bare(run)))
        run.model.load_state_dict(kept)
        whole, alone = pairs[-1]
        run.worker.say(f"whole epoch {whole:.1f} s, bare {alone:.1f} s, share {alone / whole:.3f}")
    return pairs


def in_a_worker(loop: Callable, config: Config, **extras):
    """What ``loop(job)`` gives in a Ray Train worker, with the bank's actor."""
    with tempfile.TemporaryDirectory() as scratch:
        config = replace(config, run_dir=scratch, probe=replace(config.probe, every=0, num_images=1000, baselines=False))
        run_dir = Folder(scratch)
        launch.attach(config.num_workers + launch.SPARE_CPUS)
        data, manifest = prepare.open_data(config, run_dir)
        config = prepare.settle(config, None, run_dir, data, manifest)
        streams = stream.open_streams(config, data, manifest, cached=config.images.cache == "yes", local=False)
        bank = family.make_bank(config, streams.sizes["train"], local=False)
        extras = {"labels": Shared(prepare.read_labels(data, manifest), local=False), **extras}
        board = Remote(Board, local=False, num_cpus=0)
        job = Job(config, run_dir, board, streams, bank, extras, time.time())
        return launch.fit(loop, job, num_workers=config.num_workers, use_gpu=False)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", required=True, help="shards of CIFAR-10")
    arguments = options.parse_args()
    pairs = in_a_worker(loop, replace(cifar10_resnet18(), data=arguments.data), repeats=arguments.repeats)
    share = statistics.median(alone / whole for whole, alone in pairs)
    quality = {"seconds": [[round(whole, 1), round(alone, 1)] for whole, alone in pairs]}
    finish([row("5", share, 0.85, 0.97, quality)], arguments.json)


if __name__ == "__main__":
    main()
