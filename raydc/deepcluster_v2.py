"""DeepCluster-v2 (Caron et al., NeurIPS 2020, appendix; protocol 1c): the same four verbs, with several crops of an image, a
projection, and heads made of centroids.

What differs from DeepCluster: features are remembered from the training pass and spherical, each head clusters one of the
first two crops, its centroids are the head, and every crop is trained towards every head's label. Of the reference's initial
pass we keep the features but not the crops: it runs in eval mode on one central crop (so before the first epoch the heads
differ by their seeds alone), for statistics of BatchNorm adapted to random weights make the first clusters worse. Empty
clusters are split as in DeepCluster; the reference keeps their centroids.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from raydc import training
from raydc.clustering.assignment import Assignment
from raydc.config import Config, ImagesConfig
from raydc.data.cache import Crops
from raydc.deepcluster import again_if_lost, cluster, fill, finish, from_memory, make_plan, recall, remember, report
from raydc.launch import Job
from raydc.models.head import Embedding
from raydc.run import Recorder, Run


class Projection(nn.Sequential):
    """Backbone features (N, D) -> (N, d) of length one, through one hidden layer with BatchNorm."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__(
            nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, outputs)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.normalize(super().forward(features).float(), dim=1)


class Prototypes(nn.Module):
    """Backbone, projection, and for each head its centroids, which no gradient reaches (the reference freezes them).

    Crops of several sizes go through the backbone a size at a time and through the projection together.
    """

    def __init__(self, config: Config, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = Projection(backbone.feature_dim, config.v2.hidden_dim, config.v2.projection_dim)
        shape = config.v2.num_heads, config.clustering.num_clusters, config.v2.projection_dim
        self.register_buffer("centroids", torch.zeros(shape))

    @property
    def trunk(self) -> nn.Module:
        return self.backbone

    @property
    def embed(self) -> nn.Module:
        return Embedding(self.backbone, self.head)

    def forward(self, crops: list[torch.Tensor]) -> torch.Tensor:
        """(V, B, d): the projections of V crops of B images."""
        sizes = [crop.shape[-1] for crop in crops]
        groups = [[crop for crop in crops if crop.shape[-1] == size] for size in dict.fromkeys(sizes)]
        features = torch.cat([self.backbone(torch.cat(group)) for group in groups])
        return self.head(self.backbone.activate(features)).view(len(crops), -1, self.centroids.shape[2])


def loop(job: Job) -> dict | None:
    """Every worker's run, from the last commit point to the end. Rank 0 returns what result.json holds."""
    run = Run(job, Prototypes, num_views=num_views(job.config))
    for epoch in run.state.remaining(run.config.train.epochs):
        assignments = committed(run, epoch) or recall_and_cluster(run, epoch)
        reassign(run, assignments)
        loss = train(run, assignments)
        report(run, epoch, loss)
    return finish(run, recall_and_cluster)


def num_views(config: Config) -> int:
    """Crops that are remembered; one where there is only one."""
    return min(2, sum(config.v2.num_crops))


def committed(run: Run, epoch: int) -> list[Assignment] | None:
    """The clusterings of all heads that an earlier start committed for these very weights; the first one comes last."""
    first = run.committed_assignment(epoch)
    if first is None:
        return None
    return [first, *(run.load_assignment(epoch, first.weights_hash, part) for part in range(1, run.config.v2.num_heads))]


def recall_and_cluster(run: Run, epoch: int) -> list[Assignment]:
    """A clustering for each head, of what was remembered of one crop."""

    def once() -> list[Assignment]:
        recall(run, epoch)
        parts = reversed(range(run.config.v2.num_heads))  # the commit of the first is the commit of all
        return [cluster(run, epoch, from_memory(run, epoch, part), part) for part in parts][::-1]

    return again_if_lost(run, epoch, once)


@torch.no_grad()
def reassign(run: Run, assignments: list[Assignment]) -> None:
    """Centroids become the heads; nothing else of the network is new."""
    for head, assignment in zip(run.model.centroids, assignments, strict=True):
        head.copy_(torch.from_numpy(assignment.centroids))


def train(run: Run, assignments: list[Assignment]) -> float:
    """One pass over the plan's draws: all crops towards the labels of every head; the mean loss."""
    epoch, compute = assignments[0].epoch, run.compute
    fill(run, epoch)
    targets = torch.stack([torch.from_numpy(one.pseudo_labels).long() for one in assignments])
    recorder = Recorder(run, epoch)

    def loss_of(image_ids: np.ndarray, crops: Crops) -> torch.Tensor:
        labels = targets[:, torch.from_numpy(image_ids)].to(compute.device)
        with compute.autocast():
            projected = run.trained([compute.place(crop) for crop in crops])
        recorder.keep(image_ids, *projected[: run.num_views])
        return swapped(projected, labels, run.model.centroids, run.config.train.temperature)

    views = views_of(run.config)
    loss = run.train_pass(epoch, make_plan(run.config, assignments[0]), loss_of, views=views)
    remember(run, epoch, recorder)
    return loss


def swapped(projected_VBd: torch.Tensor, labels_HB: torch.Tensor, centroids_Hkd: torch.Tensor, temperature: float):
    """Cross-entropy of every crop towards every head's label; the mean over crops and heads."""
    crops = projected_VBd.flatten(0, 1).float()
    repeats = len(projected_VBd)
    losses = [
        training.cross_entropy(crops @ centroids.T / temperature, labels.repeat(repeats))
        for centroids, labels in zip(centroids_Hkd, labels_HB, strict=True)
    ]
    return torch.stack(losses).mean()


def views_of(config: Config) -> list[ImagesConfig]:
    """How each crop of an image is cut and coloured, large ones first."""
    v2 = config.v2
    return [
        replace(config.images, size=size, crop_scale=(low, high))
        for number, size, low, high in zip(v2.num_crops, v2.crop_sizes, v2.min_scales, v2.max_scales, strict=True)
        for _ in range(number)
    ]
