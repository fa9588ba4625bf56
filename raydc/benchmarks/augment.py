"""What images, boxes and masks go through before a detector or a segmenter sees them (protocols 6, 7 and 12).

torchvision's v2 transforms on its TV tensors; no Ray. Pixels are uint8 (3, H, W), RGB; n objects; boxes are x1, y1, x2, y2
in pixels; labels of pixels are uint8 (H, W). What is random depends on ``seed`` alone, drawn from a generator of its own.
"""

from __future__ import annotations

import torch
from torchvision.transforms.v2 import functional as TF
from torchvision.tv_tensors import BoundingBoxes, Image, Mask

from raydc.benchmarks.masks import IGNORE_MASK

FLIP = 0.5
RATIOS = (0.5, 2.0)  # of a segmentation image's scale
CAT_MAX_RATIO = 0.75
CROP_TRIES = 10
CHANCE = 0.5  # of each step of the photometric distortion
BRIGHTNESS = 32.0  # of 255
CONTRAST = (0.5, 1.5)
SATURATION = (0.5, 1.5)
HUE = 18 / 180  # turns: the reference's 18 is in OpenCV's 180 steps of a byte image, 36 degrees


# --- detection


def detection_train(
    pixels: torch.Tensor,
    boxes: torch.Tensor,
    labels: torch.Tensor,
    masks: torch.Tensor | None,
    *,
    short_sides: tuple[int, ...],
    long_side: int,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Resize to one of ``short_sides``, no longer than ``long_side``, and flip every other time.

    boxes float32 (n, 4), labels (n,), masks uint8 (n, H, W) or None; objects without an area left are dropped from all.
    """
    generator = _generator(seed)
    short_side = short_sides[_integer(generator, len(short_sides))]
    height, width = pixels.shape[-2:]
    size = fit(height, width, long_side, short_side)
    objects = [Image(pixels), BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width))]
    objects += [] if masks is None else [Mask(masks)]
    objects = [TF.resize(one, list(size)) for one in objects]
    if _chance(generator, FLIP):
        objects = [TF.horizontal_flip(one) for one in objects]
    pixels, boxes, *rest = (one.as_subclass(torch.Tensor) for one in objects)
    return pixels, *_keep_areas(boxes, labels, rest[0] if rest else None, size)


def _keep_areas(boxes, labels, masks, size: tuple[int, int]):
    boxes = TF.clamp_bounding_boxes(boxes, format="XYXY", canvas_size=size, clamping_mode="hard")
    kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return boxes[kept], labels[kept], None if masks is None else masks[kept]


def detection_test(pixels: torch.Tensor, *, short_side: int, long_side: int) -> torch.Tensor:
    """Resize to ``short_side``, no longer than ``long_side``."""
    return TF.resize(pixels, list(fit(*pixels.shape[-2:], long_side, short_side)))


def fit(height: int, width: int, long_side: float, short_side: float) -> tuple[int, int]:
    """The largest size of this aspect whose sides are within both limits, with the rounding of mmcv."""
    factor = min(long_side / max(height, width), short_side / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


# --- segmentation


def segmentation_train(
    pixels: torch.Tensor,
    labels: torch.Tensor,
    *,
    scale: tuple[int, int],
    crop: int,
    fill: tuple[int, int, int],
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Resize to ``scale`` (long, short) times a random ratio, crop, flip, distort the colours, pad to ``crop`` x ``crop``.

    Below and to the right of a smaller image there is ``fill``, the mean colour (0 once normalised), under the label 255.
    """
    generator = _generator(seed)
    ratio = _uniform(generator, *RATIOS)
    size = list(fit(*labels.shape, int(scale[0] * ratio), int(scale[1] * ratio)))
    pixels, labels = TF.resize(Image(pixels), size), TF.resize(Mask(labels), size)
    place = _choose_crop(labels, crop, generator)
    pixels, labels = pixels[:, *place], labels[place]
    if _chance(generator, FLIP):
        pixels, labels = pixels.flip(-1), labels.flip(-1)
    return _pad(Image(distort(pixels, generator)), crop, list(fill)), _pad(Mask(labels), crop, IGNORE_MASK)


def segmentation_test(pixels: torch.Tensor, *, scale: tuple[int, int]) -> torch.Tensor:
    """Resize to fit into ``scale`` (long, short)."""
    return TF.resize(pixels, list(fit(*pixels.shape[-2:], *scale)))


def _choose_crop(labels: torch.Tensor, crop: int, generator: torch.Generator) -> tuple[slice, slice]:
    """The first of ten that is varied; else an eleventh, whatever it shows (as in the reference)."""
    for _ in range(CROP_TRIES):
        place = _draw_crop(labels, crop, generator)
        if is_varied(labels[place]):
            return place
    return _draw_crop(labels, crop, generator)


def _draw_crop(labels: torch.Tensor, crop: int, generator: torch.Generator) -> tuple[slice, slice]:
    top, left = (_integer(generator, max(side - crop, 0) + 1) for side in labels.shape)
    return slice(top, top + crop), slice(left, left + crop)


def is_varied(labels: torch.Tensor) -> bool:
    """Two classes or more, none with 0.75 of the pixels that have a class."""
    counts = torch.bincount(labels.flatten(), minlength=IGNORE_MASK + 1)[:IGNORE_MASK]
    return bool(counts.max() < CAT_MAX_RATIO * counts.sum())


def _pad(image: Image | Mask, crop: int, fill: list[int] | int) -> torch.Tensor:
    height, width = image.shape[-2:]
    return TF.pad(image, [0, 0, crop - width, crop - height], fill=fill).as_subclass(torch.Tensor)


# --- colours, float32 (3, H, W) in 0..255


def distort(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The reference's photometric distortion: brightness, then contrast before or after saturation and hue, each or not."""
    contrast = (scale_contrast, *CONTRAST)
    colours = ((saturate, *SATURATION), (turn_hue, -HUE, HUE))
    steps = (contrast, *colours) if _chance(generator, 0.5) else (*colours, contrast)
    x = pixels.float()
    for change, low, high in ((brighten, -BRIGHTNESS, BRIGHTNESS), *steps):
        if _chance(generator, CHANCE):
            x = change(x, _uniform(generator, low, high))
    return x.round().to(torch.uint8)


def brighten(x: torch.Tensor, amount: float) -> torch.Tensor:
    return (x + amount).clamp(0, 255)


def scale_contrast(x: torch.Tensor, factor: float) -> torch.Tensor:
    """Times ``factor`` about black, not about the mean as in torchvision: so it is in the reference."""
    return (x * factor).clamp(0, 255)


def saturate(x: torch.Tensor, factor: float) -> torch.Tensor:
    """HSV's saturation times ``factor``, at most 1; hue and value stay, so all distances from the largest channel scale."""
    value = x.amax(0, keepdim=True)
    most = value / (value - x.amin(0, keepdim=True)).clamp(min=1e-6)  # where the saturation is 1
    return value - (value - x) * most.clamp(max=factor)


def turn_hue(x: torch.Tensor, turns: float) -> torch.Tensor:
    """HSV's hue by ``turns`` of the colour circle; saturation and value stay."""
    return 255 * TF.adjust_hue(x / 255, turns)


# --- chance


def _generator(seed: int) -> torch.Generator:
    """One of its own, not torch's global one for a while: images are prepared in several threads at once."""
    return torch.Generator().manual_seed(seed)


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


def _chance(generator: torch.Generator, probability: float) -> bool:
    return _uniform(generator, 0, 1) < probability


def _integer(generator: torch.Generator, count: int) -> int:
    """0 to ``count`` - 1."""
    return int(torch.randint(count, (), generator=generator))
