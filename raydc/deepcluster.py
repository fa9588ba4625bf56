"""DeepCluster (Caron et al., ECCV 2018): extract, cluster, reassign, train.

``loop`` is section 3 of the paper as every worker runs it; ``pretrain`` prepares a run directory and hands it to Ray.
"""

from __future__ import annotations

import os
import time

import torch

from raydc import checkpoint, launch, prepare, training
from raydc.clustering.assignment import Assignment
from raydc.clustering.bank import CoverageError, FeatureBank
from raydc.clustering.sampling import SamplingPlan, plain_plan, plan_length, uniform_plan
from raydc.clustering.whitening import moments
from raydc.config import Config, RunError, UsageError
from raydc.data import stream
from raydc.launch import Job, Remote, Shared
from raydc.measure import FIGURES, probe, push_probe, summary
from raydc.models.norm import equalise_statistics
from raydc.optim import forget_momentum
from raydc.run import Run, collect, in_blocks
from raydc.seeding import derive
from raydc.storage import Folder
from raydc.training import Clock

EXTRACT_ATTEMPTS = 3


def loop(job: Job) -> dict | None:
    """Every worker's run, from the last commit point to the end. Rank 0 returns what result.json holds."""
    run = Run(job)
    for epoch in run.state.remaining(run.config.train.epochs):
        assignment = run.committed_assignment(epoch)
        if assignment is None:
            assignment = extract_and_cluster(run, epoch)
        reassign(run, assignment)
        loss = train(run, assignment)
        report(run, epoch, loss)
    return finish(run)


def extract_and_cluster(run: Run, epoch: int) -> Assignment:
    """Features of every image under today's weights, then k-means; again from the start if the bank lost them."""
    for attempt in range(1, EXTRACT_ATTEMPTS + 1):
        try:
            token = extract(run, epoch)
            probe(run, epoch, token)
            return cluster(run, epoch, token)
        except CoverageError as error:
            run.worker.say(f"epoch {epoch}: {error} (try {attempt} of {EXTRACT_ATTEMPTS})")
    raise RunError(f"epoch {epoch} could not be clustered in {EXTRACT_ATTEMPTS} tries; --verbose shows all of Ray's log")


def extract(run: Run, epoch: int) -> str:
    """One pass over this rank's images in eval mode; PCA of all ranks' sums; reduced features go to the bank.

    The token of the pass. A rank may have been given no image at all, so nothing collective happens in the pass itself.
    """
    token = run.open_bank()
    clock = Clock()
    ids, features = collect(run, run.model.backbone, run.images.extract("train"), clock, epoch)
    with run.together():
        run.bank.send("add_moments", token, run.worker.rank, moments(features))
        run.bank.send("skip", token, run.unreadable("train"))
        run.bank.flush()
    with run.together():
        whitening = run.ask_bank("whitening", token)
        for block in in_blocks(len(ids)):
            run.bank.send("push", token, ids[block], whitening(features[block]))
        if run.probe_is_due(epoch):
            push_probe(run, token, "train", ids, features)
        run.bank.flush()
    num_unreadable = round(run.worker.sum(len(run.unreadable("train"))))
    run.log(epoch, "extract", **clock.summary(run.worker.sum(clock.images)), num_unreadable=num_unreadable)
    return token


def cluster(run: Run, epoch: int, token: str) -> Assignment:
    """k-means on the bank, committed by rank 0, read by all: what is trained on is what was committed."""
    if run.compute.device.type == "cuda":
        torch.cuda.empty_cache()  # the bank may share the device
    digest = run.worker.broadcast(checkpoint.weights_hash(run.model.backbone) if run.worker.is_first else None)
    with run.together():
        if run.worker.is_first:
            began = time.perf_counter()
            assignment = run.ask_bank("cluster", token, epoch, run.config.seed, digest)
            # Said before it is committed: a start that finds the commit finds the line, one that does not forgets it.
            run.log(epoch, "cluster", seconds=round(time.perf_counter() - began, 3), **run.describe(assignment))
            checkpoint.save_assignment(run.folder, assignment)
    assignment = run.load_assignment(epoch, digest)
    if assignment is None:
        raise RunError(f"{run.folder.uri} does not show every worker what rank 0 wrote; give a place that all nodes share")
    return assignment


def reassign(run: Run, assignment: Assignment) -> None:
    """New pseudo-labels need a new head: fresh weights in place, no momentum left of the old ones."""
    run.model.head.refresh(derive(run.config.seed, "head", assignment.epoch))
    forget_momentum(run.state.optimizer, run.model.head.parameters())


def train(run: Run, assignment: Assignment) -> float:
    """One pass over the plan's draws with the pseudo-labels as targets; the mean loss."""
    epoch, config = assignment.epoch, run.config.train
    plan = make_plan(run.config, assignment)
    seed = derive(run.config.seed, "crops", epoch)
    num_steps = plan.num_draws // config.batch_size
    clock = Clock()
    loss = training.run_steps(
        run.trained,
        run.prefetched(run.images.train(plan, seed, config.batch_size)),
        torch.from_numpy(assignment.pseudo_labels).long(),
        run.state.optimizer,
        config,
        run.compute,
        epoch=epoch,
        num_steps=num_steps,
        clock=clock,
        on_step=lambda step: run.progress(epoch, "train", step * config.batch_size),
    )
    equalise_statistics(run.model)
    loss = run.worker.mean(loss)
    drawn = int((plan.counts > 0).sum())
    run.log(epoch, "train", **clock.summary(run.worker.sum(clock.images)), loss=round(loss, 4), num_images_drawn=drawn)
    return loss


def make_plan(config: Config, assignment: Assignment) -> SamplingPlan:
    """How often each image is drawn in the assignment's epoch."""
    length = plan_length(len(assignment.pseudo_labels), config.train.plan_length, config.train.batch_size)
    seed = derive(config.seed, "plan", assignment.epoch)
    if config.train.balance == "none":
        return plain_plan(assignment.pseudo_labels, length, seed)
    return uniform_plan(assignment.pseudo_labels, assignment.num_clusters, length, seed)


def report(run: Run, epoch: int, loss: float) -> None:
    """The second commit point: model and optimizer, and a barrier for all workers."""
    if run.worker.is_first:
        checkpoint.check_finite(run.model, epoch)
        checkpoint.save_state(run.folder, run.state, epoch)
        checkpoint.save_backbone(run.folder, run.model.backbone, run.config)
    metrics = {"epoch": epoch, "loss": loss}
    if run.worker.is_first:
        metrics |= {key: run.journal.last("cluster", key) for key in ("nmi_previous", "nmi_labels", "num_empty_clusters")}
        metrics |= {key: run.journal.last("probe", key) for key in FIGURES if key != "nmi_labels"}
    run.worker.report(metrics)


def finish(run: Run) -> dict | None:
    """Cluster and probe the features of the final weights; what result.json holds."""
    epochs = run.config.train.epochs
    if run.committed_assignment(epochs) is None:
        extract_and_cluster(run, epochs)
    if not run.worker.is_first:
        return None
    checkpoint.save_backbone(run.folder, run.model.backbone, run.config)
    return summary(run)


def pretrain(config: Config, callbacks=()) -> dict:
    """Run (or go on with) ``config`` in its run directory; what result.json holds.

    UsageError for what the user can mend (data, resources, a run directory of another config), RunError for a run that
    cannot go on.
    """
    began = time.time()
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
        launch.check_resources(config.num_workers, folder)
    config = prepare.settle(config, written, folder, data, manifest)
    streams = stream.open_streams(config, data, manifest, cached=config.images.cache == "yes", local=local)
    job = Job(
        config=config,
        run_dir=folder,
        board=Remote(launch.Board, local=local, num_cpus=0),
        streams=streams,
        bank=make_bank(config, streams.sizes["train"], local),
        extras={"labels": Shared(prepare.read_labels(data, manifest), local=local)},
        began=began,
    )
    print(prepare.headline(config, streams, folder), flush=True)
    result = launch.fit(
        loop,
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


def make_bank(config: Config, num_images: int, local: bool) -> Remote:
    gpus = config.bank.num_gpus if config.use_gpu == "yes" and not local else 0
    options = {"threads": config.bank.threads, "gpu": gpus > 0}
    return Remote(FeatureBank, num_images, config.clustering, local=local, num_gpus=gpus, **options)
