"""The layer over pseudo-labels: one linear map, new after every clustering or carried over to it."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from raydc.clustering.whitening import Whitening


class Head(nn.Linear):
    """(N, D) features -> (N, k) scores. Weights N(0, 0.01), biases 0 (protocols 1a and 1b)."""

    def reset_parameters(self) -> None:
        self.refresh(0)

    @torch.no_grad()
    def refresh(self, seed: int) -> None:
        """New weights, in place: DDP, the optimizer and a compiled graph keep theirs. Drawn on the CPU, alike anywhere."""
        generator = torch.Generator().manual_seed(seed)
        self.weight.copy_(torch.empty(self.weight.shape).normal_(0, 0.01, generator=generator))
        self.bias.zero_()

    @torch.no_grad()
    def take_over(self, source: torch.Tensor, seed: int) -> None:
        """Cluster j takes the weights that cluster ``source[j]`` had; fresh ones where that is -1. The size stays."""
        old = self.weight.clone(), self.bias.clone()
        self.refresh(seed)
        kept = (source >= 0).to(self.weight.device)
        source = source.to(self.weight.device)[kept]
        self.weight[kept], self.bias[kept] = old[0][source], old[1][source]

    @torch.no_grad()
    def copy_centroids(self, centroids_kd: np.ndarray, whitening: Whitening, temperature: float) -> None:
        """Scores that give the pseudo-labels: x.c - |c|^2 / 2 over the temperature, where x is the whitened feature over
        the root mean square length of all of them (k-means sees each at length one)."""
        centroids = centroids_kd / (temperature * max(whitening.norm, 1e-10))  # features that are all alike have no length
        weight = centroids if whitening.matrix_Dd is None else centroids @ whitening.matrix_Dd.T
        bias = -weight @ whitening.mean_D - (centroids_kd**2).sum(1) / (2 * temperature)
        self.weight.copy_(torch.from_numpy(np.ascontiguousarray(weight, np.float32)))
        self.bias.copy_(torch.from_numpy(np.ascontiguousarray(bias, np.float32)))

    def resize(self, num_clusters: int) -> None:
        """Another number of clusters: rows are cut off or, of zeros, put at the end; the parameters are new objects."""
        self.out_features = num_clusters
        self.weight = nn.Parameter(with_rows(self.weight.detach(), num_clusters))
        self.bias = nn.Parameter(with_rows(self.bias.detach(), num_clusters))


def with_rows(values: torch.Tensor, num: int) -> torch.Tensor:
    """The first ``num`` rows, zeros where there are fewer."""
    rows = values.new_zeros(num, *values.shape[1:])
    rows[: len(values)] = values[:num]
    return rows


class Embedding(nn.Module):
    """Pixels (N, 3, H, W) -> what a neck makes of the backbone's features (N, d)."""

    def __init__(self, backbone: nn.Module, neck: nn.Module) -> None:
        super().__init__()
        self.backbone, self.neck = backbone, neck

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.neck(self.backbone.activate(self.backbone(pixels)))


class Classifier(nn.Module):
    """Backbone and head as one module, the unit that is trained. Pixels (N, 3, H, W) -> scores (N, k).

    ``trunk`` is what is trained at the backbone's settings, ``embed`` what is clustered.
    """

    def __init__(self, backbone: nn.Module, num_clusters: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = Head(backbone.feature_dim, num_clusters)

    @property
    def trunk(self) -> nn.Module:
        return self.backbone

    @property
    def embed(self) -> nn.Module:
        return self.backbone

    def forward(self, pixels: torch.Tensor, with_features: bool = False):
        features = self.backbone(pixels)
        scores = self.head(self.backbone.activate(features))
        return (features, scores) if with_features else scores
