"""The network that is kept: residual networks out of torchvision's blocks, with taps feature1..feature5, or the paper's.

A residual network's state dict has torchvision's names and, at width 64 with the imagenet stem, torchvision's shapes: it
loads into ``torchvision.models.resnet50()`` with ``fc`` replaced by ``nn.Identity()`` and ``strict=True``.
"""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from raydc.config import ModelConfig, check
from raydc.models.norm import PixelNorm
from raydc.models.paper import VGG16, AlexNet
from raydc.models.sobel import Sobel

BLOCKS = {
    "resnet10": (BasicBlock, (1, 1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}


class Backbone(nn.Module):
    """Pixels (N, 3, H, W) in 0..255 -> features (N, feature_dim): the average pool of the last stage, after its ReLU.

    Normalisation and Sobel are inside, so a checkpoint is all that is needed to extract.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        block, depths = BLOCKS[config.architecture]
        self.norm = PixelNorm(config.mean, config.std)
        self.sobel = Sobel() if config.sobel else nn.Identity()
        channels = 2 if config.sobel else 3
        if config.stem == "imagenet":
            self.conv1 = nn.Conv2d(channels, config.width, 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = nn.Conv2d(channels, config.width, 3, stride=config.stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(config.width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if config.stem == "imagenet" else nn.Identity()
        inputs = config.width
        for stage, depth in enumerate(depths, start=1):
            planes = config.width * 2 ** (stage - 1)
            setattr(self, f"layer{stage}", _stage(block, inputs, planes, depth, stride=1 if stage == 1 else 2))
            inputs = planes * block.expansion
        self.feature_dim = inputs
        _initialise(self)

    def taps(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Maps feature1 (stem, before its max-pool) to feature5 (last stage), each (N, C, h, w)."""
        stem = self.relu(self.bn1(self.conv1(self.sobel(self.norm(pixels)))))
        maps, x = {"feature1": stem}, self.maxpool(stem)
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
            maps[f"feature{stage + 1}"] = x
        return maps

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.taps(pixels)["feature5"].mean((2, 3))

    def activate(self, features: torch.Tensor) -> torch.Tensor:
        """What a head sees in training: the features, which are past their ReLU already."""
        return features


def _stage(block: type[nn.Module], inputs: int, planes: int, depth: int, stride: int) -> nn.Sequential:
    outputs, downsample = planes * block.expansion, None
    if stride != 1 or inputs != outputs:
        downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    first = block(inputs, planes, stride, downsample)
    return nn.Sequential(first, *(block(outputs, planes) for _ in range(depth - 1)))


def _initialise(model: nn.Module) -> None:
    """Kaiming-normal over fan_in, BatchNorm 1 and 0 also in a block's last one (the published model: protocol 1b, 12)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def make_backbone(config: ModelConfig) -> nn.Module:
    """The network of ``model.architecture``, its weights drawn from torch's generator."""
    return {"alexnet": AlexNet, "vgg16": VGG16}.get(config.architecture, Backbone)(config)


def build_backbone(config: ModelConfig, seed: int) -> nn.Module:
    """Fresh weights that depend on ``seed`` alone; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make_backbone(config)


def check_residual(backbone: nn.Module, task: str) -> None:
    """UsageError for the paper's networks, which have no stages that ``task`` could rebuild."""
    check(
        isinstance(backbone, Backbone),
        f"{task} needs a residual network, this one is {type(backbone).__name__}; give a backbone of model.architecture "
        f"{', '.join(BLOCKS)}",
    )
