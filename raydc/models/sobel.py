"""The fixed gradient filter in front of the paper's networks (protocol 1a: after normalisation, inside the model)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

KERNELS = (((1.0, 0.0, -1.0), (2.0, 0.0, -2.0), (1.0, 0.0, -1.0)), ((1.0, 2.0, 1.0), (0.0, 0.0, 0.0), (-1.0, -2.0, -1.0)))


class Sobel(nn.Module):
    """(N, 3, H, W) -> (N, 2, H, W): horizontal and vertical gradient of the mean of the colours. Nothing to learn.

    Its weights are no part of a state dict, so that a saved backbone holds torchvision's names and no others.
    """

    def __init__(self) -> None:
        super().__init__()
        # Averaging the channels and filtering the average is one convolution: each kernel divided by 3, per channel.
        weight = torch.tensor(KERNELS)[:, None].expand(2, 3, 3, 3) / 3
        self.register_buffer("weight", weight.contiguous(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight.to(x.dtype), padding=1)
