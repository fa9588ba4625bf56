"""Normalisation of pixels, and what BatchNorm's running statistics need around a distributed training loop."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn


class PixelNorm(nn.Module):
    """Pixels in 0..255 (uint8 or float), any layout (N, 3, H, W) -> standardised float32."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        scale = 1 / (255 * torch.tensor(std))
        self.register_buffer("scale", scale.view(1, -1, 1, 1), persistent=False)
        self.register_buffer("bias", -(torch.tensor(mean) / torch.tensor(std)).view(1, -1, 1, 1), persistent=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(self.bias, pixels.float(), self.scale)


def batchnorms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@torch.no_grad()
def equalise_statistics(model: nn.Module) -> None:
    """Average the running statistics over all ranks.

    Under DDP each rank's BatchNorm sees its own images; without this rank 1 would extract with another network than
    rank 0 (and only rank 0's would be saved).
    """
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return
    for norm in batchnorms(model):
        for buffer in (norm.running_mean, norm.running_var):
            dist.all_reduce(buffer)
            buffer /= dist.get_world_size()


@torch.no_grad()
def adapt_statistics(model: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """Replace the running statistics by the average over ``batches`` of pixels; no weight changes."""
    norms = batchnorms(model)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch: a cumulative average
    was_training = model.training
    model.train()
    for pixels in batches:
        model(pixels)
    model.train(was_training)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
