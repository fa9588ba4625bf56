"""Crops and augmentation, in two halves: parameters drawn for (seed, epoch, image_id, draw), and their application.

Parameters are a pure function of who they are for, so a cached and a streamed run, on any number of workers, cut the same
crops. Application is batched and runs on the device that trains.

B images in a batch, S the side of a crop in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF

from raydc.config import ImagesConfig
from raydc.seeding import derive, uniforms

TRIES = 10  # torchvision's RandomResizedCrop gives up after ten boxes that do not fit
WARPS = ("rotation", "zoom", "shear", "shift", "elastic")  # fields of ImagesConfig that move pixels after the crop
COLOURS = ("brightness", "contrast", "saturation", "hue", "grayscale")
GRAY = (0.2989, 0.587, 0.114)  # torchvision's luma weights
# Principal colours of ImageNet's pixels in [0, 1] and their strengths (protocol 3.1, 12): rows R, G, B; a column each.
PRINCIPAL = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
STRENGTH = (0.2175, 0.0188, 0.0045)


@dataclass(frozen=True, eq=False)
class Augmentation:
    """What happens to each image of a batch. Float32 arrays of length B unless said."""

    box: np.ndarray  # int64 (B, 4): top, left, height, width in pixels of the source
    flip: np.ndarray  # bool
    matrix: np.ndarray  # (B, 2, 3): output to input coordinates in [-1, 1], for affine_grid
    elastic: np.ndarray | None  # (B, 4, 4, 2) displacements on a coarse grid, or None
    brightness: np.ndarray
    contrast: np.ndarray
    saturation: np.ndarray
    hue: np.ndarray
    order: np.ndarray  # int64 (B, 4): order of the four colour operations
    grayscale: np.ndarray  # bool
    lighting: np.ndarray | None = None  # (B, 3): what is added to R, G and B, in 0..255
    blur: np.ndarray | None = None  # standard deviation in pixels, 0 where there is no blur


def draw_augmentation(
    config: ImagesConfig, seed: int, image_ids: np.ndarray, draws: np.ndarray, heights: np.ndarray, widths: np.ndarray
) -> Augmentation:
    """Parameters for a batch; ``seed`` already holds the epoch."""
    num = len(image_ids)

    def numbers(purpose: str, count: int) -> np.ndarray:
        return uniforms(derive(seed, purpose), image_ids, draws, count)

    colour = numbers("colour", 4)
    if config.jitter < 1:
        colour[numbers("jitter", 1)[:, 0] >= config.jitter] = np.nan
    elastic = None
    if config.elastic:
        elastic = _normal(numbers("elastic", 64)).reshape(num, 4, 4, 2).astype(np.float32) * config.elastic * 2
    return Augmentation(
        box=_boxes(config, numbers("box", 2 * TRIES + 2), heights, widths),
        flip=numbers("flip", 1)[:, 0] < config.flip,
        matrix=_warp_matrices(config, numbers("warp", 6)),
        elastic=elastic,
        brightness=_factor(colour[:, 0], config.brightness),
        contrast=_factor(colour[:, 1], config.contrast),
        saturation=_factor(colour[:, 2], config.saturation),
        hue=np.nan_to_num((2 * colour[:, 3] - 1) * config.hue).astype(np.float32),
        order=np.argsort(numbers("order", 4), axis=1),
        grayscale=numbers("grayscale", 1)[:, 0] < config.grayscale,
        lighting=_lighting(config, numbers("lighting", 6)) if config.lighting else None,
        blur=_blur_sigmas(config, numbers("blur", 2)) if config.blur else None,
    )


def _normal(u: np.ndarray) -> np.ndarray:
    """Box-Muller over pairs of columns."""
    half = u.shape[1] // 2
    return np.sqrt(-2 * np.log1p(-u[:, :half])) * np.cos(2 * np.pi * u[:, half:])


def _factor(u: np.ndarray, amount: float) -> np.ndarray:
    """From 1 - amount to 1 + amount, never below 0; 1 where nothing was drawn (NaN)."""
    drawn = max(0.0, 1 - amount) + u * (1 + amount - max(0.0, 1 - amount))
    return np.where(np.isnan(u), 1, drawn).astype(np.float32)


def _blur_sigmas(config: ImagesConfig, u: np.ndarray) -> np.ndarray:
    low, high = config.blur_sigma
    return np.where(u[:, 0] < config.blur, low + u[:, 1] * (high - low), 0).astype(np.float32)


def _lighting(config: ImagesConfig, u: np.ndarray) -> np.ndarray:
    """One shift of all pixels an image: principal colours times their strengths times N(0, ``lighting``)."""
    alphas = _normal(u) * config.lighting * np.array(STRENGTH)
    return (255 * alphas @ np.array(PRINCIPAL).T).astype(np.float32)


def _boxes(config: ImagesConfig, u: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    return (_random_boxes if config.crop == "resized" else _square_boxes)(config, u, heights, widths)


def _square_boxes(config: ImagesConfig, u: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Resize and CenterCrop to ``resize``, then a RandomCrop of ``size`` (protocol 4, Places205): boxes in the source."""
    square = np.minimum(heights, widths)
    side = np.maximum(np.rint(square * config.size / config.resize), 1)
    top = (heights - square) // 2 + np.floor(u[:, -2] * (square - side + 1))
    left = (widths - square) // 2 + np.floor(u[:, -1] * (square - side + 1))
    return np.stack([top, left, side, side], 1).astype(np.int64)


def _random_boxes(config: ImagesConfig, u: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """torchvision's RandomResizedCrop.get_params for a batch: the first of ten boxes that fits, else a central one."""
    log_ratio = np.log(config.crop_ratio)
    area = (heights * widths)[:, None] * (
        config.crop_scale[0] + u[:, :TRIES] * (config.crop_scale[1] - config.crop_scale[0])
    )
    ratio = np.exp(log_ratio[0] + u[:, TRIES : 2 * TRIES] * (log_ratio[1] - log_ratio[0]))
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= widths[:, None]) & (h > 0) & (h <= heights[:, None])
    first, rows = fits.argmax(1), np.arange(len(u))
    h, w = h[rows, first], w[rows, first]
    top, left = np.floor(u[:, -2] * (heights - h + 1)), np.floor(u[:, -1] * (widths - w + 1))
    central_h = np.minimum(heights, np.rint(widths / config.crop_ratio[0]))
    central_w = np.minimum(widths, np.rint(heights * config.crop_ratio[1]))
    central = ((heights - central_h) // 2, (widths - central_w) // 2, central_h, central_w)
    found = fits.any(1)
    box = [np.where(found, ours, theirs) for ours, theirs in zip((top, left, h, w), central, strict=True)]
    return np.stack(box, 1).astype(np.int64)


def _warp_matrices(config: ImagesConfig, u: np.ndarray) -> np.ndarray:
    """(B, 2, 3) maps from output to input coordinates: rotation after shear after zoom, then a shift."""
    v = 2 * u - 1
    angle, zoom = np.radians(v[:, 0] * config.rotation), 1 / (1 + v[:, 1] * config.zoom)
    shear_x, shear_y = np.tan(np.radians(v[:, 2] * config.shear)), np.tan(np.radians(v[:, 3] * config.shear))
    cos, sin = np.cos(angle) * zoom, np.sin(angle) * zoom
    matrix = np.empty((len(u), 2, 3), np.float32)
    matrix[:, 0, 0], matrix[:, 0, 1] = cos - sin * shear_y, cos * shear_x - sin
    matrix[:, 1, 0], matrix[:, 1, 1] = sin + cos * shear_y, sin * shear_x + cos
    matrix[:, :, 2] = 2 * config.shift * v[:, 4:6]
    return matrix


def centre_boxes(config: ImagesConfig, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Resize to ``resize``, then crop the centre to ``size``: one box (B, 4) in the source's pixels.

    Integer like torchvision's CenterCrop, so that a source of exactly ``size`` pixels comes through untouched.
    """
    side = np.rint(np.minimum(heights, widths) * config.size / config.resize).astype(np.int64)
    side = np.maximum(side, 1)
    return np.stack([(heights - side) // 2, (widths - side) // 2, side, side], 1)


# --- pixels -----------------------------------------------------------------------------------------------------------


def crop_one(pixels_HWC: np.ndarray, box: np.ndarray, size: int) -> torch.Tensor:
    """One box of one image, resized: uint8 (3, size, size), antialiased bilinear as torchvision does it."""
    top, left, height, width = (int(value) for value in box)
    # Without gaps between its rows torch resizes the box in one go, in two thirds of the time.
    whole = np.ascontiguousarray(pixels_HWC[top : top + height, left : left + width])
    return TF.resize(torch.from_numpy(whole).permute(2, 0, 1), [size, size], antialias=True)


def crop_batch(pixels_BHWC: torch.Tensor, box: np.ndarray, flip: np.ndarray | None, size: int) -> torch.Tensor:
    """The same crops of images of one size, as two batched matrix products: float32 (B, 3, size, size) in 0..255."""
    num, height, width, _ = pixels_BHWC.shape
    whole = (box == (0, 0, height, width)).all()
    x = pixels_BHWC.float()
    if not (whole and height == width == size):
        rows = _resize_matrix(box[:, 0], box[:, 2], height, size).to(x.device)
        columns = _resize_matrix(box[:, 1], box[:, 3], width, size).to(x.device)
        x = torch.bmm(rows, x.reshape(num, height, -1)).reshape(num, size, width, 3)
        x = torch.bmm(columns, x.transpose(1, 2).reshape(num, width, -1)).reshape(num, size, size, 3).transpose(1, 2)
    x = x.permute(0, 3, 1, 2)
    if flip is not None and flip.any():
        x = torch.where(torch.from_numpy(flip).to(x.device)[:, None, None, None], x.flip(3), x)
    return x


def _resize_matrix(start: np.ndarray, length: np.ndarray, source: int, size: int) -> torch.Tensor:
    """(B, size, source): weights of antialiased bilinear resizing of source[start : start + length] to ``size``.

    The triangle filter of torch and PIL: as wide as a source pixel when enlarging, as an output pixel when shrinking.
    """
    start, length = torch.from_numpy(start)[:, None, None], torch.from_numpy(length)[:, None, None]
    scale = length / size
    centre = start + (torch.arange(size)[None, :, None] + 0.5) * scale
    pixel = torch.arange(source)[None, None, :]
    weight = (1 - (pixel + 0.5 - centre).abs() / scale.clamp(min=1)).clamp(min=0)
    weight = torch.where((pixel >= start) & (pixel < start + length), weight, 0)
    return (weight / weight.sum(2, keepdim=True)).float()


def augment(crops: torch.Tensor, parameters: Augmentation, config: ImagesConfig) -> torch.Tensor:
    """Warp and colours of cropped, flipped images (B, 3, S, S) in 0..255, on the device they are on; float32, or the crops
    as they are where nothing changes them."""
    if not _any(config, (*WARPS, *COLOURS, "lighting", "blur")):
        return crops
    x = crops.float()
    if _any(config, WARPS):
        x = _warp(x, parameters, config.warp)
    if _any(config, COLOURS):
        recolour = recolour_linear if config.colour == "linear" else recolour_torchvision
        x = recolour(x, parameters)
    if parameters.lighting is not None:
        x = x + torch.from_numpy(parameters.lighting).to(x.device)[:, :, None, None]
    if parameters.blur is not None and parameters.blur.any():
        x = _blurred(x, parameters.blur, config.blur_sigma[1])
    return x


def _any(config: ImagesConfig, names: tuple[str, ...]) -> bool:
    return any(getattr(config, name) for name in names)


def _blurred(x: torch.Tensor, sigmas: np.ndarray, largest: float) -> torch.Tensor:
    """Each image with its own Gaussian, of three times ``largest`` to a side, borders mirrored as torchvision has them."""
    where = torch.from_numpy(np.flatnonzero(sigmas > 0)).to(x.device)
    sigma = torch.from_numpy(sigmas).to(x.device)[where]
    _, channels, height, width = x.shape
    reach = min(math.ceil(3 * largest), height - 1, width - 1)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=x.device) / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)[:, None, None]  # (B * 3, 1, 1, taps)
    planes = F.pad(x[where].reshape(1, -1, height, width), (reach,) * 4, mode="reflect")
    planes = F.conv2d(F.conv2d(planes, kernel, groups=len(kernel)), kernel.transpose(2, 3), groups=len(kernel))
    x = x.clone()
    x[where] = planes.reshape(-1, channels, height, width)
    return x


def _warp(x: torch.Tensor, parameters: Augmentation, mode: str) -> torch.Tensor:
    """Samples outside the image are black (torchvision's rotation fills with 0)."""
    num, _, height, width = x.shape
    grid = F.affine_grid(torch.from_numpy(parameters.matrix).to(x.device), (num, 3, height, width), align_corners=False)
    if parameters.elastic is not None:
        coarse = torch.from_numpy(parameters.elastic).to(x.device).permute(0, 3, 1, 2)
        grid = grid + F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    return F.grid_sample(x.contiguous(), grid, mode=mode, align_corners=False)


def _column(values: np.ndarray, x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values).to(x.device)[:, None, None, None]


def _gray(x: torch.Tensor) -> torch.Tensor:
    weights = torch.tensor(GRAY, device=x.device).view(1, 3, 1, 1)
    return (x * weights).sum(1, keepdim=True)


def recolour_torchvision(x: torch.Tensor, parameters: Augmentation) -> torch.Tensor:
    """ColorJitter in each image's own order, clamped after every operation, then RandomGrayscale (protocol 1b.3)."""

    def blend(images, other, factor):
        return (factor * images + (1 - factor) * other).clamp(0, 255)

    operations = (
        lambda y, i: blend(y, 0.0, _column(parameters.brightness[i], y)),
        lambda y, i: blend(y, _gray(y).mean((2, 3), keepdim=True), _column(parameters.contrast[i], y)),
        lambda y, i: blend(y, _gray(y), _column(parameters.saturation[i], y)),
        lambda y, i: _turn_hue(y / 255, _column(parameters.hue[i], y)) * 255,
    )
    x = x.clone()
    for position in range(4):
        for number, operation in enumerate(operations):
            rows = np.flatnonzero(parameters.order[:, position] == number)
            if len(rows):
                where = torch.from_numpy(rows).to(x.device)
                x[where] = operation(x[where], rows)
    return torch.where(_column(parameters.grayscale, x), _gray(x), x)


def _turn_hue(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Shift the hue of RGB in [0, 1] by ``turns`` of the colour circle, in HSV."""
    r, g, b = x.unbind(1)
    high, low = x.amax(1), x.amin(1)
    chroma = high - low
    safe = torch.where(chroma > 0, chroma, 1)
    hue = torch.where(high == r, (g - b) / safe % 6, torch.where(high == g, (b - r) / safe + 2, (r - g) / safe + 4))
    hue = (hue / 6 + turns[:, 0]) % 1
    # Hoelscher-Ohnmacht: a channel is value - chroma * max(0, min(k, 4 - k, 1)) with k its distance on the circle.
    k = (torch.tensor((5.0, 3.0, 1.0), device=x.device).view(1, 3, 1, 1) + hue[:, None] * 6) % 6
    return high[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def recolour_linear(x: torch.Tensor, parameters: Augmentation) -> torch.Tensor:
    """All colour operations as one affine map of RGB for each image, without clamps between them."""
    num, _, height, width = x.shape
    gray = np.array(GRAY, np.float64)
    matrix = parameters.saturation[:, None, None] * np.eye(3) + (1 - parameters.saturation)[:, None, None] * gray
    matrix = _hue_matrices(parameters.hue) @ matrix
    matrix[parameters.grayscale] = gray
    scale = (parameters.brightness * parameters.contrast)[:, None, None]
    mean = (_gray(x).mean((1, 2, 3)) * torch.from_numpy(parameters.brightness * (1 - parameters.contrast)).to(x.device))[
        :, None
    ]
    # Rows of every matrix above sum to one, so the contrast's gray mean passes through them unchanged.
    weight = torch.from_numpy((scale * matrix).astype(np.float32)).to(x.device)
    out = torch.baddbmm(mean[:, :, None], weight, x.reshape(num, 3, height * width))
    return out.reshape(num, 3, height, width)


def _hue_matrices(turns: np.ndarray) -> np.ndarray:
    """(B, 3, 3): rotation by ``turns`` of the chroma plane of YIQ."""
    to_yiq = np.array([GRAY, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])
    cos, sin = np.cos(2 * math.pi * turns), np.sin(2 * math.pi * turns)
    turn = np.zeros((len(turns), 3, 3))
    turn[:, 0, 0], turn[:, 1, 1], turn[:, 1, 2], turn[:, 2, 1], turn[:, 2, 2] = 1, cos, sin, -sin, cos
    return np.linalg.inv(to_yiq) @ turn @ to_yiq
