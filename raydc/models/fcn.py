"""The segmentation benchmark's network: FCN R50-d8, a dilated backbone with two convolutional heads (protocols 7 and 12).

N images of H x W pixels, K classes, h x w the side of a map of the backbone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from raydc.config import UsageError
from raydc.models.backbone import Backbone, check_residual

DILATIONS = {3: (1, 2), 4: (2, 4)}  # of a stage: in its first convolution (contract_dilation), and in all after it
AUXILIARY_WEIGHT = 0.4
DROPOUT = 0.1
IGNORED = 255  # the label of pixels that no class has


def dilate(backbone: Backbone) -> None:
    """Stages 3 and 4 keep the resolution of stage 2, in place and with the same weights: strides 1, dilations 2 and 4.

    What the network computed before is what it now computes at every second or fourth pixel, the first one included.
    Doing it twice is doing it once. UsageError for a backbone that is no residual network.
    """
    check_residual(backbone, "segmentation")
    for stage, dilations in DILATIONS.items():
        convolutions = [one for one in getattr(backbone, f"layer{stage}").modules() if isinstance(one, nn.Conv2d)]
        for one in convolutions:
            one.stride = (1, 1)
        first, *others = (one for one in convolutions if one.kernel_size == (3, 3))
        _spread(first, dilations[0])  # it is the one that had the stride: what it reads is as dense as before
        for one in others:
            _spread(one, dilations[1])


def _spread(convolution: nn.Conv2d, dilation: int) -> None:
    convolution.dilation = convolution.padding = (dilation, dilation)


def _convolve(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class FCNHead(nn.Module):
    """A map (N, C, h, w) -> logits (N, K, h, w), with C/4 channels between.

    ``concat``: one more convolution, over what the others made and the map itself.
    """

    def __init__(self, channels: int, num_classes: int, *, num_convolutions: int, concat: bool) -> None:
        super().__init__()
        inner = channels // 4
        inputs = [channels] + [inner] * (num_convolutions - 1)
        self.convolutions = nn.Sequential(*(_convolve(one, inner) for one in inputs))
        self.merge = _convolve(channels + inner, inner) if concat else None
        self.dropout = nn.Dropout2d(DROPOUT)
        self.classifier = nn.Conv2d(inner, num_classes, 1)
        _initialise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.convolutions(x)
        if self.merge is not None:
            out = self.merge(torch.cat([x, out], 1))
        return self.classifier(self.dropout(out))


def _initialise(head: FCNHead) -> None:
    """Kaiming-normal over fan_out, the classifier N(0, 0.01) and 0; BatchNorm keeps torch's 1 and 0 (protocol 12)."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    nn.init.normal_(head.classifier.weight, 0, 0.01)
    nn.init.zeros_(head.classifier.bias)


class FCN(nn.Module):
    """Pixels (N, 3, H, W) in 0..255 -> logits (N, K, H, W), float32; in train mode {"out", "aux"}, two of them.

    ``backbone`` comes with its weights and is dilated in place; the heads' weights are drawn from torch's generator.
    """

    def __init__(self, backbone: Backbone, num_classes: int, *, align_corners: bool) -> None:
        super().__init__()
        dilate(backbone)
        self.backbone = backbone
        self.num_classes, self.align_corners = num_classes, align_corners
        self.decode = FCNHead(backbone.feature_dim, num_classes, num_convolutions=2, concat=True)
        self.auxiliary = FCNHead(backbone.feature_dim // 2, num_classes, num_convolutions=1, concat=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        maps, size = self.backbone.taps(pixels), tuple(pixels.shape[-2:])
        out = self.enlarge(self.decode(maps["feature5"]), size)
        if not self.training:
            return out
        return {"out": out, "aux": self.enlarge(self.auxiliary(maps["feature4"]), size)}

    def enlarge(self, logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """(N, K, h, w) -> (N, K, *size), bilinear, float32 also under autocast."""
        return F.interpolate(logits.float(), size, mode="bilinear", align_corners=self.align_corners)


def segmentation_loss(outputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """out + 0.4 aux, each the cross-entropy against labels (N, H, W) over ALL pixels: an ignored one counts as 0.

    So it is in the reference; an image that is mostly padding weighs less than one that is not.
    """
    return _cross_entropy(outputs["out"], labels) + AUXILIARY_WEIGHT * _cross_entropy(outputs["aux"], labels)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels.long(), ignore_index=IGNORED, reduction="none").mean()


@torch.inference_mode()
def predict(model: FCN, pixels: torch.Tensor, size: tuple[int, int], *, window: int = 0, stride: int = 0) -> torch.Tensor:
    """Pixels (3, H, W), on the model's device -> classes, uint8 of ``size``, of a model in eval mode.

    The image as a whole, or (``window`` above 0) in squares ``stride`` pixels apart, their logits averaged where they
    overlap.
    """
    logits = _slide(model, pixels, window, stride) if window else model(pixels[None])[0]
    if tuple(logits.shape[-2:]) != tuple(size):
        logits = model.enlarge(logits[None], tuple(size))[0]
    return logits.argmax(0).to(torch.uint8)


def _slide(model: FCN, pixels: torch.Tensor, window: int, stride: int) -> torch.Tensor:
    """Logits (K, H, W)."""
    if not 0 < stride <= window:
        raise UsageError(f"stride is {stride} and window {window}; give a stride of 1 to {window}, else pixels are left out")
    height, width = pixels.shape[-2:]
    total = torch.zeros(model.num_classes, height, width, device=pixels.device)
    times = torch.zeros(height, width, device=pixels.device)
    for top in _starts(height, window, stride):
        for left in _starts(width, window, stride):
            place = (slice(top, top + window), slice(left, left + window))
            total[:, *place] += model(pixels[None, :, *place])[0]
            times[place] += 1
    return total / times


def _starts(side: int, window: int, stride: int) -> list[int]:
    """Where the windows of one direction begin; the last lies flush with the edge, and a small image is one window."""
    last = max(side - window, 0)
    return [*range(0, last, stride), last]
