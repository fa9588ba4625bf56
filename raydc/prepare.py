"""Before a run: its data, and every "auto" decided once and written down, so that each later start decides alike."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path

import numpy as np

from raydc import config as configs
from raydc import launch, training
from raydc.clustering.kmeans import choose_engine
from raydc.config import Config, UsageError
from raydc.data import ingest, shards, stream
from raydc.storage import Folder

FREE_TO_CHANGE = ("num_workers", "run_dir", "data", "use_gpu", "max_failures", "verbose")
FREE_IN_TRAIN = ("threads",)


def open_data(config: Config, run_dir: Folder):
    """The shards folder and its manifest; scikit-learn's digits are written into the run directory."""
    if config.data == "digits":
        folder = run_dir.child("shards")
        if not folder.exists("manifest.json"):
            ingest.make_shards("digits", folder.uri, val_fraction=0.2, seed=config.seed, use_ray=False, progress=False)
    elif config.data:
        folder = Folder(config.data)
    else:
        raise UsageError(f"recipe {config.recipe} needs images; make shards with jobs/make_shards.py and give --data SHARDS")
    try:
        manifest = shards.open_manifest(folder)
    except shards.ShardError as error:
        raise UsageError(str(error)) from None
    if not manifest.splits.get("train") or not manifest.splits["train"].rows:
        raise UsageError(f"{folder.uri} has no images to train on; make shards of a folder that has some")
    return folder, manifest


def read_labels(data: Folder, manifest) -> tuple[np.ndarray, np.ndarray]:
    """int32 labels of train and val by image_id, -1 where there are none."""
    none = np.empty(0, np.int32)
    return tuple(shards.labels(data, manifest, s) if s in manifest.splits else none for s in ("train", "val"))


def earlier(config: Config, run_dir: Folder) -> dict | None:
    """What an earlier start wrote into config.json, None where there was none; UsageError where it was another run's."""
    if not run_dir.exists("config.json") or not run_dir.names("assignments"):  # nothing that another config could spoil
        return None
    try:
        written = run_dir.read_json("config.json")
        asked = configs.from_dict(Config, written["config"])
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{run_dir.uri}/config.json is not one of a run; give another --run-dir") from None
    others = configs.differences(config, _changed(asked, config))
    if others:
        raise UsageError(f"{run_dir.uri} belongs to another config: {'; '.join(others)}. Give another --run-dir")
    return written


def check_images(config: Config, written: dict | None, run_dir: Folder, data: Folder, manifest) -> None:
    """UsageError for shards that are not those of the run (``written``: what ``earlier`` found), or too few for it."""
    if written and written["data_fingerprint"] != manifest.fingerprint:
        raise UsageError(f"the shards in {data.uri} are not those {run_dir.uri} was started with; give another --run-dir")
    k, num_images = config.clustering.num_clusters, manifest.splits["train"].rows
    if k > num_images and config.clustering.method != "pic":
        raise UsageError(f"clustering.num_clusters {k} is above the number of images {num_images}; lower it")
    neighbours = config.clustering.neighbours
    if config.clustering.method == "pic" and neighbours >= num_images:
        raise UsageError(f"clustering.neighbours {neighbours} is not below the number of images {num_images}; lower it")
    if config.algorithm == "odc" and config.odc.min_cluster * k > num_images:
        raise UsageError(
            f"{num_images} images make {k} clusters smaller than odc.min_cluster {config.odc.min_cluster}; lower "
            f"clustering.num_clusters to {num_images // config.odc.min_cluster} or lower odc.min_cluster"
        )


def sweep(run_dir: Folder) -> None:
    """Remove what a killed start left half-written; files of other names stay, whoever put them there."""
    run_dir.sweep(files=r"config\.json|result\.json|metrics\.jsonl|backbone\.safetensors")
    run_dir.sweep("assignments")
    run_dir.sweep("shards", r"manifest\.json")  # what lies deeper there, the ingest removes
    for epoch in run_dir.names("checkpoints"):
        run_dir.sweep(f"checkpoints/{epoch}", r"state\.pt|memory\.safetensors")


def settle(config: Config, written: dict | None, run_dir: Folder, data: Folder, manifest) -> Config:
    """Every "auto" decided, once per run: written to config.json by the first start, reused by the later ones."""
    if written is None:
        chosen = choose(config, data, manifest)
        facts = {"config": configs.to_dict(config), "chosen": configs.to_dict(chosen)}
        run_dir.write_json("config.json", facts | {"data_fingerprint": manifest.fingerprint, "versions": launch.versions()})
        return chosen
    chosen, asked = configs.from_dict(Config, written["chosen"]), configs.from_dict(Config, written["config"])
    same = (config.num_workers, config.train.threads) == (asked.num_workers, asked.train.threads)
    threads = chosen.train.threads if same else _threads(config)
    use_gpu = _yes(launch.choose_gpu(config.use_gpu, config.num_workers))
    return dataclasses.replace(
        _changed(chosen, config), use_gpu=use_gpu, train=dataclasses.replace(chosen.train, threads=threads)
    )


def _changed(written: Config, now: Config) -> Config:
    """An earlier start's config with the fields that a later one may change, as they are now."""
    train = dataclasses.replace(written.train, **{name: getattr(now.train, name) for name in FREE_IN_TRAIN})
    return dataclasses.replace(written, train=train, **{name: getattr(now, name) for name in FREE_TO_CHANGE})


def choose(config: Config, data: Folder, manifest) -> Config:
    """Decide from the machine and the sizes, never from a stopwatch, so that two runs on one machine choose alike."""
    k = config.clustering.num_clusters or max(2, manifest.splits["train"].rows // 128)
    use_gpu = launch.choose_gpu(config.use_gpu, config.num_workers)
    cached = stream.choose_cache(config, data, manifest)
    if not cached and config.num_workers == 0:
        raise UsageError("these images are streamed through Ray, and num_workers 0 runs without it; give --num-workers 1")
    decode = "tasks" if stream.decode_in_tasks(config) else "worker"
    engine, dim = config.clustering.engine, config.clustering.pca_dim
    if engine == "auto":  # the torch engine wants the directions of a PCA: raw features may have columns that say the same
        engine = choose_engine(manifest.splits["train"].rows, dim, k, use_gpu) if dim else "faiss"
    return dataclasses.replace(
        config,
        use_gpu=_yes(use_gpu),
        clustering=dataclasses.replace(config.clustering, num_clusters=k, engine=engine),
        images=dataclasses.replace(config.images, cache=_yes(cached), decode=decode),
        train=dataclasses.replace(
            config.train,
            precision=training.choose_precision(config.train.precision, "cuda" if use_gpu else "cpu"),
            threads=_threads(config),
            channels_last="no" if config.train.channels_last == "no" else "yes",
        ),
    )


def _threads(config: Config) -> int:
    """On a cluster each node has its own CPUs and workers, and the worker decides."""
    alone = config.num_workers == 0 or len(launch.nodes()) == 1
    return training.choose_threads(config.train.threads, config.num_workers) if alone else config.train.threads


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def others_are_busy(loadavg: Path = Path("/proc/loadavg")) -> bool:
    """Whether other work wants all CPUs, over the last minute and right now; to be asked before ours begins. False where
    that cannot be told (another system than Linux, CPUs of which this process may use only some)."""
    with contextlib.suppress(OSError, ValueError):
        load, _, _, running, _ = loadavg.read_text().split()
        cpus = os.cpu_count() or 1
        now = int(running.split("/")[0]) - 1  # less this process
        return len(os.sched_getaffinity(0)) == cpus and float(load) >= cpus and now >= 1
    return False


def headline(config: Config, streams, run_dir: Folder, busy: bool = False) -> str:
    """``busy``: what ``others_are_busy`` said."""
    held = f", {streams.sizes['val']:,} held out" if "val" in streams.sizes else ""
    how = "cached" if streams.cached is not None else f"streamed, decoded in {config.images.decode}"
    workers = f"{config.num_workers} worker{'s' * (config.num_workers != 1)}" if config.num_workers else "in this process"
    where = "GPU" if config.use_gpu == "yes" else "CPU"
    k, num_images = config.clustering.num_clusters, streams.sizes["train"]
    clusters = "clusters found by PIC" if config.clustering.method == "pic" else f"{k} clusters"
    text = (
        f"raydc {config.recipe} · {num_images:,} images{held} · {clusters} · {how} · {workers} on {where}, "
        f"{config.train.precision} · {run_dir.uri}"
    )
    if k < 10 and config.clustering.method != "pic":
        text += f"\nnote: {k} clusters are few; try --clustering.num-clusters {max(10, num_images // 10)}"
    if busy and config.use_gpu != "yes" and config.train.threads > 1 and streams.cached is not None:
        text += (
            "\nnote: other work keeps this machine's CPUs busy, and threads that wait for each other are then many times "
            "slower; the same command with --train.threads 1 goes on from here and may be faster"
        )
    return text
