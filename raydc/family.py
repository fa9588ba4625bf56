"""DeepCluster and its family: prepare a run directory, hand the algorithm's loop to Ray, keep the result."""

from __future__ import annotations

import os
import time

import numpy as np

from raydc import deepcluster, deepcluster_v2, launch, odc, prepare
from raydc.clustering.bank import FeatureBank
from raydc.clustering.sharded import Shard, ShardedBank, bounds
from raydc.config import Config, UsageError
from raydc.data import stream
from raydc.launch import Job
from raydc.remote import Board, Remote, Shared
from raydc.storage import Folder

LOOPS = {"deepcluster": deepcluster.loop, "deepcluster_v2": deepcluster_v2.loop, "odc": odc.loop}


def pretrain(config: Config, callbacks=()) -> dict:
    """Run (or go on with) ``config`` in its run directory; what result.json holds.

    UsageError for what the user can mend (data, resources, a run directory of another config), RunError for a run that
    cannot go on.
    """
    began, busy = time.time(), prepare.others_are_busy()
    local = config.num_workers == 0
    folder = run_dir(config)
    written = prepare.earlier(config, folder)
    prepare.sweep(folder)
    data, manifest = prepare.open_data(config, folder)
    prepare.check_images(config, written, folder, data, manifest)
    if folder.exists("result.json"):
        print(f"this run is finished; give another --run-dir to train again (its results are in {folder.uri})")
        return folder.read_json("result.json")
    if not local:  # not before all that can be said without Ray, which takes seconds to start
        launch.attach(config.num_workers + launch.SPARE_CPUS, config.verbose)
        launch.check_resources(config.num_workers, folder, data)
    config = prepare.settle(config, written, folder, data, manifest)
    streams = stream.open_streams(config, data, manifest, cached=config.images.cache == "yes", local=local)
    job = Job(
        config=config,
        run_dir=folder,
        board=Remote(Board, local=local, num_cpus=0),
        streams=streams,
        bank=make_bank(config, streams.sizes["train"], local),
        extras={"labels": Shared(prepare.read_labels(data, manifest), local=local)},
        began=began,
    )
    print(prepare.headline(config, streams, folder, busy), flush=True)
    result = launch.fit(
        LOOPS[config.algorithm],
        job,
        num_workers=config.num_workers,
        use_gpu=config.use_gpu == "yes",
        max_failures=config.max_failures,
        callbacks=callbacks,
    )
    result |= {"data_fingerprint": manifest.fingerprint, "versions": launch.versions()}
    folder.write_json("result.json", result)
    return result


def run_dir(config: Config) -> Folder:
    """Where the run lives; in a submitted job a relative path would lie in Ray's copy of the code, which Ray deletes."""
    for field in ("run_dir", "data"):
        place = getattr(config, field)
        if "RAY_ADDRESS" in os.environ and place != "digits" and not ("://" in place or place.startswith(("/", "~"))):
            flag = field.replace("_", "-")
            raise UsageError(
                f"--{flag} {place or '(none)'} is relative to a job's temporary folder; give a full path or a URI"
            )
    return Folder(config.run_dir or f"runs/{config.recipe}")


def make_bank(config: Config, num_images: int, local: bool) -> Remote | ShardedBank:
    """The bank, or where ``bank.num_actors`` asks for several their shards; together these take the GPU share of one.

    Whether it is one GPU or many that they get, the share of one is what workers leave free on each. Only the first takes a
    CPU: the others work while the workers wait.
    """
    num_actors, limits = config.bank.num_actors, bounds(num_images, config.bank.num_actors)
    gpus = config.bank.num_gpus / num_actors if config.use_gpu == "yes" and not local else 0
    options = {"local": local, "num_gpus": gpus, "gpu": gpus > 0, "threads": config.bank.threads}
    if num_actors == 1:
        return Remote(FeatureBank, num_images, config.clustering, **options)
    if not local and not config.bank.threads:
        options["sharing"] = -(-num_actors // len(launch.nodes()))
    shards = [
        Remote(Shard, int(size), config.clustering, spread=True, num_cpus=int(number == 0), **options)
        for number, size in enumerate(np.diff(limits))
    ]
    return ShardedBank(shards, num_images, config.clustering)
