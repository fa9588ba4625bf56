"""DeepCluster (Caron et al., ECCV 2018): extract, cluster, reassign, train.

``loop`` is section 3 of the paper as every worker runs it; raydc.family prepares a run directory and hands it to Ray.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import numpy as np
import torch

from raydc import checkpoint, training
from raydc.clustering.assignment import Assignment
from raydc.clustering.bank import CoverageError
from raydc.clustering.matching import match
from raydc.clustering.sampling import SamplingPlan, cluster_weights, plain_plan, plan_length, uniform_plan
from raydc.clustering.whitening import moments
from raydc.config import Config, RunError
from raydc.launch import Job
from raydc.measure import FIGURES, probe, probe_alone, push_probe, summary
from raydc.optim import carry_momentum, forget_momentum
from raydc.run import Recorder, Run, collect, first_step, in_blocks
from raydc.seeding import derive
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
    """Features of every image, then their clusters."""

    def once() -> Assignment:
        if run.remembers:
            recall(run, epoch)
            return cluster(run, epoch, from_memory(run, epoch))
        token = extract(run, epoch)
        probe(run, epoch, token)
        return cluster(run, epoch, functools.partial(run.ask_bank, "cluster", token, epoch, run.config.seed))

    return again_if_lost(run, epoch, once)


def again_if_lost(run: Run, epoch: int, once: Callable):
    """``once()``, or again from the start where the bank lost the features meanwhile."""
    for attempt in range(1, EXTRACT_ATTEMPTS + 1):
        try:
            return once()
        except CoverageError as error:
            run.has_memory = False
            run.worker.say(f"epoch {epoch}: {error} (try {attempt} of {EXTRACT_ATTEMPTS})")
    raise RunError(f"epoch {epoch} could not be clustered in {EXTRACT_ATTEMPTS} tries; --verbose shows all of Ray's log")


def recall(run: Run, epoch: int) -> None:
    """Probe, and see that the bank remembers every image."""
    probe_alone(run, epoch)
    fill(run, epoch)


def fill(run: Run, epoch: int) -> None:
    """An extraction pass for a bank that remembers nothing: before the first training pass, or after an accident."""
    if run.has_memory:
        return
    clock = Clock()
    ids, features = collect(run, run.model.embed, run.images.extract("train"), clock, epoch)
    with run.together():
        if run.worker.is_first:
            run.bank.open_memory(run.num_views)
    with run.together():
        steps = np.full(len(ids), first_step(epoch) - 1)
        for block in in_blocks(len(ids)):
            for view in range(run.num_views):
                run.bank.send("remember", view, ids[block], steps[block], features[block])
        run.bank.flush()
    run.has_memory = True
    parts = run.worker.gather(run.unreadable("train"))
    run.unreadable_ids = np.concatenate(parts) if parts else None
    num_unreadable = round(run.worker.sum(len(run.unreadable("train"))))
    run.log(epoch, "extract", **clock.summary(run.worker.sum(clock.images)), num_unreadable=num_unreadable)


def from_memory(run: Run, epoch: int, part: int = 0) -> Callable:
    """The bank's clustering of what it remembers, of the view that ``part`` (a head of DeepCluster-v2) looks at."""
    if run.unreadable_ids is None and run.worker.is_first:  # remembered by an earlier start
        run.unreadable_ids = np.flatnonzero(run.previous(epoch).pseudo_labels < 0)
    seed = derive(run.config.seed, "part", part) if part else run.config.seed
    return functools.partial(run.ask_bank, "cluster_memory", part % run.num_views, run.unreadable_ids, epoch, seed)


def extract(run: Run, epoch: int) -> str:
    """One pass over this rank's images in eval mode; PCA of all ranks' sums; reduced features go to the bank.

    The token of the pass. A rank may have been given no image at all, so nothing collective happens in the pass itself.
    """
    token = run.open_bank()
    clock = Clock()
    ids, features = collect(run, run.model.backbone, run.images.extract("train"), clock, epoch)
    spent, began = clock.summary(run.worker.sum(clock.images)), time.perf_counter()
    with run.together():
        run.bank.send("add_moments", token, run.worker.rank, moments(features, gram=run.config.clustering.pca_dim > 0))
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
    run.log(epoch, "extract", **spent, num_unreadable=num_unreadable, pca_s=round(time.perf_counter() - began, 3))
    return token


def cluster(run: Run, epoch: int, ask: Callable, part: int = 0) -> Assignment:
    """The bank's clusters, committed by rank 0, read by all: what is trained on is what was committed.

    ``ask(digest, previous_labels)`` is the bank's answer.
    """
    if run.compute.device.type == "cuda":
        torch.cuda.empty_cache()  # the bank may share the device
    digest = run.worker.broadcast(checkpoint.weights_hash(run.model.backbone) if run.worker.is_first else None)
    with run.together():
        if run.worker.is_first:
            before = run.previous(epoch, part) if run.config.clustering.start == "warm" else None
            began, cpu = time.perf_counter(), run.bank.cpu_s()
            assignment = ask(digest, None if before is None else before.pseudo_labels)
            spent = {"seconds": round(time.perf_counter() - began, 3), "cpu_s": round(run.bank.cpu_s() - cpu, 2)}
            # Said before it is committed: a start that finds the commit finds the line, one that does not forgets it.
            which = {"head": part} if run.config.algorithm == "deepcluster_v2" else {}
            run.log(epoch, "cluster", **spent, **run.describe(assignment, part), **which)
            checkpoint.save_assignment(run.folder, assignment, part)
    assignment = run.load_assignment(epoch, digest, part)
    if assignment is None:
        raise RunError(f"{run.folder.uri} does not show every worker what rank 0 wrote; give a place that all nodes share")
    return assignment


def reassign(run: Run, assignment: Assignment) -> None:
    """New pseudo-labels need a new head: in place, so that DDP, the optimizer and a compiled graph keep theirs."""
    epoch, head, optimizer = assignment.epoch, run.model.head, run.state.optimizer
    seed, source = derive(run.config.seed, "head", epoch), None
    before = run.previous(epoch) if run.config.train.head == "matched" and run.worker.is_first else None
    if before is not None:
        source = match(before.pseudo_labels, assignment.pseudo_labels, before.num_clusters, assignment.num_clusters)
    source = run.worker.broadcast(source)
    if source is not None:
        carry_over(run, torch.from_numpy(source), seed)
        return
    if assignment.num_clusters != head.out_features:  # PIC finds the number of clusters itself
        run.state.resize_head(assignment.num_clusters)
        run.wrap()
    head.refresh(seed)
    # Not before the first epoch: its features have BatchNorm's untouched statistics, and training sees others.
    if run.config.train.head == "centroids" and epoch > 0:
        head.copy_centroids(assignment.centroids, assignment.whitening, run.config.train.temperature)
    forget_momentum(optimizer, head.parameters())


def carry_over(run: Run, source: torch.Tensor, seed: int) -> None:
    """Cluster j goes on with the weights and the momentum of cluster ``source[j]`` (-1: fresh), however many there are."""
    head, before, now = run.model.head, run.model.head.out_features, len(source)
    if now > before:
        run.state.resize_head(now)
    every = torch.cat([source, source.new_full((head.out_features - now,), -1)])
    head.take_over(every, seed)
    carry_momentum(run.state.optimizer, head.parameters(), every)
    if now < before:
        run.state.resize_head(now)
    if now != before:
        run.wrap()


def train(run: Run, assignment: Assignment) -> float:
    """One pass over the plan's draws with the pseudo-labels as targets; the mean loss."""
    epoch, compute = assignment.epoch, run.compute
    if run.remembers:
        fill(run, epoch)
    targets = torch.from_numpy(assignment.pseudo_labels).long()
    weights = class_weights(run, assignment.sizes)
    recorder = Recorder(run, epoch) if run.remembers else None

    def loss_of(image_ids: np.ndarray, pixels: torch.Tensor) -> torch.Tensor:
        with compute.autocast():
            features, scores = run.trained(compute.place(pixels), with_features=True)
        if recorder is not None:
            recorder.keep(image_ids, features)
        return training.cross_entropy(scores, targets[torch.from_numpy(image_ids)].to(compute.device), weights)

    loss = run.train_pass(epoch, make_plan(run.config, assignment), loss_of)
    if recorder is not None:
        remember(run, epoch, recorder)
    return loss


def remember(run: Run, epoch: int, recorder: Recorder) -> None:
    """The last features of the pass reach the bank; a memory that was lost is filled by an extraction pass."""
    try:
        run.log(epoch, "remember", num_images_not_drawn=recorder.finish())
    except CoverageError as error:
        run.has_memory = False
        run.worker.say(f"epoch {epoch}: {error}; an extraction pass will fill it again")


def class_weights(run: Run, sizes: np.ndarray) -> torch.Tensor | None:
    """(k,) weights of the loss, where the config balances clusters so."""
    if run.config.train.balance != "reweight":
        return None
    return torch.from_numpy(cluster_weights(sizes, run.config.train.reweight_power)).to(run.compute.device)


def make_plan(config: Config, assignment: Assignment) -> SamplingPlan:
    """How often each image is drawn in the assignment's epoch."""
    length = plan_length(len(assignment.pseudo_labels), config.train.plan_length, config.train.batch_size)
    seed = derive(config.seed, "plan", assignment.epoch)
    if config.train.balance != "uniform":
        return plain_plan(assignment.pseudo_labels, length, seed)
    return uniform_plan(assignment.pseudo_labels, assignment.num_clusters, length, seed)


def report(run: Run, epoch: int, loss: float) -> None:
    """The second commit point: what is remembered, model and optimizer, and a barrier for all workers."""
    if run.worker.is_first:
        checkpoint.check_finite(run.model, epoch)
    if run.remembers and run.has_memory:
        save_memory(run, epoch)
    if run.worker.is_first:
        checkpoint.save_state(run.folder, run.state, epoch)
        checkpoint.save_backbone(run.folder, run.model.backbone, run.config)
    metrics = {"epoch": epoch, "loss": loss}
    if run.worker.is_first:
        metrics |= {key: run.journal.last("cluster", key) for key in ("nmi_previous", "nmi_labels", "num_empty_clusters")}
        metrics |= {key: run.journal.last("probe", key) for key in FIGURES if key != "nmi_labels"}
    run.worker.report(metrics)


def save_memory(run: Run, epoch: int) -> None:
    """Before the state it belongs to; a start that finds the state without it fills it by an extraction pass.

    CoverageError where ODC's labels are lost with it: the run starts again from the last commit point.
    """
    try:
        with run.together():
            if run.worker.is_first:
                run.ask_bank("save_memory", run.folder, checkpoint.memory_file(epoch))
    except CoverageError as error:
        if run.online:
            raise
        run.has_memory = False
        run.worker.say(f"epoch {epoch}: {error}; an extraction pass will fill it again")


def finish(run: Run, cluster_again: Callable = extract_and_cluster) -> dict | None:
    """Cluster and probe the features of the final weights; what result.json holds."""
    epochs = run.config.train.epochs
    if run.committed_assignment(epochs) is None:
        cluster_again(run, epochs)
    if not run.worker.is_first:
        return None
    checkpoint.save_backbone(run.folder, run.model.backbone, run.config)
    return summary(run)
