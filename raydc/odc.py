"""Online deep clustering (Zhan et al., CVPR 2020; protocol 1d): labels that change with each step.

What differs from DeepCluster: one clustering before the first epoch; from then on each step mixes the batch's new features
into the memory, gives these images the label of the nearest centroid, and keeps clusters from becoming small. The memory,
its labels and centroids live in the bank; rank 0 tells it of each global batch, and everyone of the labels that changed.

The first memory is of a network whose BatchNorm statistics are the data's, unlike the reference's. With untouched ones the
features that training brings lie elsewhere than those remembered: on CIFAR-10 one cluster takes all images as they come, a
tenth of them within 40 steps.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from raydc import checkpoint, training
from raydc.clustering.assignment import Assignment
from raydc.clustering.sampling import cluster_weights
from raydc.config import Config, RunError
from raydc.deepcluster import again_if_lost, cluster, fill, finish, from_memory, make_plan, recall, report
from raydc.launch import Job
from raydc.measure import adapt, probe_alone
from raydc.models.head import Embedding, Head
from raydc.run import Run
from raydc.seeding import derive


class Neck(nn.Sequential):
    """Backbone features (N, D) -> (N, d), after a ReLU: what is remembered and what the head sees."""

    def __init__(self, inputs: int, hidden: int, outputs: int, dropout: float) -> None:
        norm = nn.BatchNorm1d(hidden, momentum=0.001, affine=False)
        first, last = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)
        for layer in (first, last):
            nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        super().__init__(first, norm, nn.ReLU(inplace=True), nn.Dropout(dropout), last, nn.ReLU(inplace=True))


class NeckedClassifier(nn.Module):
    """Backbone, neck and head. Pixels (N, 3, H, W) -> (features (N, d), scores (N, k))."""

    def __init__(self, config: Config, backbone: nn.Module) -> None:
        super().__init__()
        odc = config.odc
        self.backbone = backbone
        self.neck = Neck(backbone.feature_dim, odc.hidden_dim, odc.projection_dim, odc.dropout)
        self.head = Head(odc.projection_dim, config.clustering.num_clusters)

    @property
    def trunk(self) -> nn.Module:
        return nn.ModuleList([self.backbone, self.neck])

    @property
    def embed(self) -> nn.Module:
        return Embedding(self.backbone, self.neck)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.neck(self.backbone.activate(self.backbone(pixels)))
        return features, self.head(features)


def loop(job: Job) -> dict | None:
    """Every worker's run, from the last commit point to the end. Rank 0 returns what result.json holds."""
    run = Run(job, NeckedClassifier, online=options(job.config))
    for epoch in run.state.remaining(run.config.train.epochs):
        assignment = run.committed_assignment(epoch) or labels_in_force(run, epoch)
        loss = train(run, assignment)
        report(run, epoch, loss)
    return finish(run, labels_in_force)


def options(config: Config) -> dict:
    """How the bank keeps labels, as keywords of OnlineClusters."""
    odc = config.odc
    seed = derive(config.seed, "online")
    return {"momentum": odc.momentum, "centroids_every": odc.centroids_every, "min_cluster": odc.min_cluster, "seed": seed}


def labels_in_force(run: Run, epoch: int) -> Assignment:
    """What the epoch begins with: a clustering of all images before the first, from then on the labels the steps left.

    The head is new only with a clustering of all images: online labels keep their clusters.
    """
    if run.has_memory:
        recall(run, epoch)
        return cluster(run, epoch, lambda digest, _: run.bank.online_assignment(epoch, digest))
    if epoch > 0:
        raise RunError(
            f"{run.folder.uri}/{checkpoint.memory_file(epoch - 1)} is missing, and the labels of odc with it; give another "
            "--run-dir"
        )
    assignment = again_if_lost(run, epoch, lambda: first_clustering(run, epoch))
    run.model.head.refresh(derive(run.config.seed, "head", epoch))
    labels = None
    with run.together():
        if run.worker.is_first:
            start = assignment.pseudo_labels, assignment.num_clusters, options(run.config)
            labels = run.ask_bank("open_online", *start)  # clusters that were empty have images now
    return replace(assignment, pseudo_labels=run.worker.broadcast(labels))


def first_clustering(run: Run, epoch: int) -> Assignment:
    """Of features as the training pass will bring them; the probe before it sees the untouched network."""
    probe_alone(run, epoch)
    adapt(run, run.model)
    fill(run, epoch)
    return cluster(run, epoch, from_memory(run, epoch))


def train(run: Run, assignment: Assignment) -> float:
    """One pass over all images, every step with the labels that the step before left; the mean loss."""
    epoch, compute, power = assignment.epoch, run.compute, run.config.train.reweight_power
    targets = torch.from_numpy(assignment.pseudo_labels.copy()).long()
    sizes = assignment.sizes.copy()
    weighted = run.config.train.balance == "reweight"
    batch: list[tuple[np.ndarray, np.ndarray]] = []

    def loss_of(image_ids: np.ndarray, pixels: torch.Tensor) -> torch.Tensor:
        with compute.autocast():
            features, scores = run.trained(compute.place(pixels))
        batch.append((image_ids, features.detach().float().cpu().numpy()))
        weights = torch.from_numpy(cluster_weights(sizes, power)).to(compute.device) if weighted else None
        return training.cross_entropy(scores, targets[torch.from_numpy(image_ids)].to(compute.device), weights)

    def after_step() -> None:
        ids, labels = relabel(run, batch)
        batch.clear()
        rows = torch.from_numpy(ids)
        np.subtract.at(sizes, targets[rows].numpy(), 1)
        np.add.at(sizes, labels, 1)
        targets[rows] = torch.from_numpy(labels).long()

    return run.train_pass(epoch, make_plan(run.config, assignment), loss_of, after_step=after_step)


def relabel(run: Run, batch: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """A global batch's new features to the bank; (image_ids, labels) that changed, on every rank.

    Labels and features hang on each other: where the bank lost them (CoverageError), the run starts again from the last
    commit point.
    """
    ids, features = (np.concatenate(column) for column in zip(*batch, strict=True))
    everyone, changed = run.worker.gather((ids, features)), None
    with run.together():
        if run.worker.is_first:
            ids, features = (np.concatenate(column) for column in zip(*everyone, strict=True))
            changed = run.ask_bank("update_online", ids, features)
    return run.worker.broadcast(changed)
