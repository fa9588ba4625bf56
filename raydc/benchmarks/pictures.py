"""Test images with what is there (left) and what was found (right), for a person to look at."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

WIDTH = 480  # pixels, of each image
OPACITY = 0.6


def pair(truth: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Two images uint8 (3, H, W) of one size, side by side."""
    size = [round(WIDTH * truth.shape[1] / truth.shape[2]), WIDTH]
    return torch.cat([TF.resize(one, size) for one in (truth, found)], 2)


def png(pairs: Sequence[torch.Tensor]) -> bytes:
    """One below the other."""
    file = io.BytesIO()
    Image.fromarray(torch.cat(list(pairs), 1).permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def with_boxes(
    pixels: torch.Tensor, boxes: torch.Tensor, labels: Sequence[int], names: Sequence[str], masks: torch.Tensor | None = None
) -> torch.Tensor:
    """The image with a frame for each object in its class's colour, and its mask, bool (n, H, W), where there are masks."""
    if not len(labels):
        return pixels
    palette = colours(len(names))
    mine = [palette[label] for label in labels]
    if masks is not None:
        pixels = draw_segmentation_masks(pixels, masks, OPACITY, mine)
    return draw_bounding_boxes(pixels, boxes, [names[label] for label in labels], mine, width=2)


def with_classes(pixels: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """The image under the colours of its pixels' classes, (H, W); those without a class stay as they are."""
    masks = labels == torch.arange(num_classes)[:, None, None]
    return draw_segmentation_masks(pixels, masks, OPACITY, colours(num_classes))


def colours(number: int) -> list[tuple[int, int, int]]:
    """Far from each other: steps of the golden angle around the colour circle."""
    hues = np.arange(number) * 0.618 % 1
    waves = np.stack([(hues + shift) % 1 for shift in (0, 1 / 3, 2 / 3)], 1)
    return [tuple(map(int, row)) for row in 255 * (0.5 + 0.5 * np.cos(2 * np.pi * waves))]
