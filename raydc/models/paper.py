"""The paper's networks, AlexNet and VGG16 with BatchNorm (protocol 1a). Their feature is fc7, before its last ReLU.

At width 64, with the imagenet stem and colours, VGG16's state dict loads into ``torchvision.models.vgg16_bn()`` with
``classifier`` cut to its first four layers and ``strict=True``. AlexNet's has names of the same kind.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from raydc.config import ModelConfig, UsageError
from raydc.models.norm import PixelNorm
from raydc.models.sobel import Sobel

# Channels, kernel, stride, padding of AlexNet's convolutions; channels and number of 3x3 convolutions of VGG16's stages.
ALEXNET = ((96, 11, 4, 2), (256, 5, 1, 2), (384, 3, 1, 1), (384, 3, 1, 1), (256, 3, 1, 1))
VGG16_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
FULLY_CONNECTED = 4096  # outputs of fc6, and of fc7
DROPOUT = 0.5


class _PaperNetwork(nn.Module):
    """Pixels (N, 3, H, W) in 0..255 -> features (N, feature_dim), before the ReLU that ``activate`` is.

    Normalisation and Sobel are inside, as in ``Backbone``. UsageError for images of which the max-pools would leave nothing.
    """

    def __init__(self, config: ModelConfig, stages: list[list[nn.Module]], pools: list[list[nn.Module]]) -> None:
        """``stages`` end in the ReLU that a tap shows; the pools are what comes after each. No weight is drawn yet."""
        super().__init__()
        self.norm = PixelNorm(config.mean, config.std)
        self.sobel = Sobel() if config.sobel else nn.Identity()
        self.stem, self.feature_dim = config.stem, _scaled(FULLY_CONNECTED, config)
        layers, self.ends = [], []
        for stage, pool in zip(stages, pools, strict=True):
            layers += stage
            self.ends.append(len(layers) - 1)
            layers += pool
        self.features = nn.Sequential(*layers)

    def taps(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Maps feature1 to feature5, each (N, C, h, w): after a ReLU, before its max-pool."""
        self._check_side(pixels)
        x, maps = self.sobel(self.norm(pixels)), {}
        for number, layer in enumerate(self.features[:-1]):
            x = layer(x)
            if number in self.ends:
                maps[f"feature{len(maps) + 1}"] = x
        return maps

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        last_pool = self.features[-1]
        return self.classifier(self.avgpool(last_pool(self.taps(pixels)["feature5"])).flatten(1))

    def activate(self, features: torch.Tensor) -> torch.Tensor:
        """What a head sees in training; clustered are the features themselves."""
        return F.relu(features)

    def _check_side(self, pixels: torch.Tensor) -> None:
        height, width = pixels.shape[-2:]
        if min(height, width) < self.least_side:
            other = ", or give --model.stem small" if self.stem == "imagenet" else ""
            raise UsageError(
                f"images of {height} x {width} pixels are too small for {type(self).__name__} with model.stem {self.stem}, "
                f"which needs {self.least_side}; raise images.size{other}"
            )


class AlexNet(_PaperNetwork):
    """Five convolutions with BatchNorm in place of the local response normalisation, fc6 and fc7.

    The small stem is one 3x3 convolution of ``stem_stride``, with no max-pool after it.
    """

    def __init__(self, config: ModelConfig) -> None:
        small, inputs, stages = config.stem == "small", _inputs(config), []
        for channels, *shape in ALEXNET:
            channels = _scaled(channels, config)
            stages.append(_convolve(inputs, channels, *((3, config.stem_stride, 1) if small and not stages else shape)))
            inputs = channels
        first = nn.Identity() if small else nn.MaxPool2d(3, 2)
        super().__init__(config, stages, [[first], [nn.MaxPool2d(3, 2)], [], [], [nn.MaxPool2d(3, 2)]])
        # Backwards: the last pool reads 3 pixels, the one before it 7, the first 15 (and that makes 4 * 14 + 11 - 2 * 2).
        self.least_side = 6 * config.stem_stride + 1 if small else 63
        self.avgpool = _Grid(3 if small else 6)
        hidden = self.feature_dim
        self.classifier = nn.Sequential(
            nn.Dropout(DROPOUT),
            nn.Linear(inputs * self.avgpool.output_size**2, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(DROPOUT),
            nn.Linear(hidden, hidden),
        )
        _initialise(self)


class VGG16(_PaperNetwork):
    """Configuration D: thirteen 3x3 convolutions with BatchNorm in five stages, fc6 and fc7.

    The small stem leaves out the first max-pool; no convolution has a stride, so ``stem_stride`` says nothing here.
    """

    def __init__(self, config: ModelConfig) -> None:
        small, inputs, stages = config.stem == "small", _inputs(config), []
        for channels, depth in VGG16_STAGES:
            stages.append([])
            for _ in range(depth):
                stages[-1] += _convolve(inputs, _scaled(channels, config), 3, 1, 1)
                inputs = _scaled(channels, config)
        pools = [[nn.MaxPool2d(2, 2)] for _ in stages]
        if small:
            pools[0] = [nn.Identity()]
        super().__init__(config, stages, pools)
        self.least_side = 16 if small else 32
        self.avgpool = _Grid(2 if small else 7)
        hidden = self.feature_dim
        self.classifier = nn.Sequential(
            nn.Linear(inputs * self.avgpool.output_size**2, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(DROPOUT),
            nn.Linear(hidden, hidden),
        )
        _initialise(self)


class _Grid(nn.AdaptiveAvgPool2d):
    """(N, C, h, w) -> (N, C, side, side). Skipped where it changes nothing: its gradient is not deterministic on GPUs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.shape[-2:] == (self.output_size, self.output_size) else super().forward(x)


def _scaled(number: int, config: ModelConfig) -> int:
    """Of the published network's channels, as many as ``width`` asks for."""
    return max(1, number * config.width // 64)


def _inputs(config: ModelConfig) -> int:
    return 2 if config.sobel else 3


def _convolve(inputs: int, outputs: int, kernel: int, stride: int, padding: int) -> list[nn.Module]:
    """The convolution keeps its bias, as in the paper's code."""
    return [nn.Conv2d(inputs, outputs, kernel, stride, padding), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def _initialise(model: nn.Module) -> None:
    """Convolutions N(0, 2 / (kernel height x width x outputs)), fully connected layers N(0, 0.01 squared), biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0, math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels)))
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)
