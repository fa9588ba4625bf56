"""Normalisation of pixels, and what BatchNorm's running statistics need around a distributed training loop."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


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
def equalise_statistics(model: nn.Module, weight: float = 1.0) -> None:
    """Average the running statistics over all ranks, each with its ``weight`` (images it saw; not all may be 0).

    Under DDP each rank's BatchNorm sees its own images; without this rank 1 would extract with another network than
    rank 0 (and only rank 0's would be saved).
    """
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return
    buffers = [buffer for norm in batchnorms(model) for buffer in (norm.running_mean, norm.running_var)]
    if not buffers:
        return
    total = torch.tensor(float(weight), device=buffers[0].device)
    dist.all_reduce(total)
    for buffer in buffers:
        buffer *= weight
        dist.all_reduce(buffer)
        buffer /= total


@torch.no_grad()
def adapt_statistics(model: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """Replace the running statistics by the average over ``batches`` of pixels; no weight changes.

    Each rank by itself, also where BatchNorm is SyncBN, which would wait for the batches of ranks that have fewer.
    """
    norms = batchnorms(model)
    kinds, momenta = [type(norm) for norm in norms], [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch: a cumulative average
        if isinstance(norm, nn.SyncBatchNorm):
            norm.__class__ = _OwnBatchNorm
    was_training = model.training
    model.train()
    for pixels in batches:
        model(pixels)
    model.train(was_training)
    for norm, kind, momentum in zip(norms, kinds, momenta, strict=True):
        norm.__class__, norm.momentum = kind, momentum


class _OwnBatchNorm(nn.modules.batchnorm._BatchNorm):
    """What a SyncBN is on one rank alone, for inputs of any number of dimensions."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        pass


def folded(model: nn.Module) -> nn.Module:
    """A copy for inference, its BatchNorms folded into the convolutions before them: the same function, 1.5x the speed on a
    CPU. A pair is a convolution and the BatchNorm that follows it in the order of definition, as in every network here.
    """
    model = copy.deepcopy(model).eval()
    for parent in list(model.modules()):
        names = list(parent._modules)
        for first, second in itertools.pairwise(names):
            _fold(parent, first, second)
    return model


def _fold(parent: nn.Module, first: str, second: str) -> None:
    convolution, norm = parent._modules[first], parent._modules[second]
    if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
        parent._modules[first] = fuse_conv_bn_eval(convolution, norm)
        parent._modules[second] = nn.Identity()
