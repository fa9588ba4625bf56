"""The layer over pseudo-labels: one linear map, new after every clustering."""

from __future__ import annotations

import torch
from torch import nn

from raydc.models.backbone import Backbone


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


class Classifier(nn.Module):
    """Backbone and head as one module, the unit that is trained. Pixels (N, 3, H, W) -> scores (N, k)."""

    def __init__(self, backbone: Backbone, num_clusters: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = Head(backbone.feature_dim, num_clusters)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(pixels))
