"""Encoded bytes to pixels, and what ingest makes of bytes that are no ordinary image.

An ordinary JPEG goes through libjpeg-turbo (simplejpeg), which is 1.2 times as fast as Pillow and gives the
same pixels; everything else goes through Pillow.
"""

from __future__ import annotations

import contextlib
import io
import struct
import warnings

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

MAX_PIXELS = 178_956_970  # Pillow's own limit for an error; half a gigabyte of RGB
QUALITY = 95
FORMATS = (
    "JPEG",
    "PNG",
    "BMP",
    "GIF",
    "WEBP",
    "TIFF",
    "PPM",
    "JPEG2000",
    "AVIF",
)  # EPS would run Ghostscript
LOSSY = ("JPEG", "MPO", "WEBP", "JPEG2000", "AVIF")
ORIENTATION = 0x0112
TIFF_MARKS = (b"II", b"MM")
MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")
JPEG_EXIF_MARKS = (b"Exif\0\0", b"tiff:Orientation")  # the second in XMP
EXIF_MARKS = (*JPEG_EXIF_MARKS, b"eXIf", b"EXIF", b"profile type exif")  # PNG, WebP, ImageMagick's PNG

# Pillow warns from half of MAX_PIXELS on; the limit here is MAX_PIXELS itself, and it is an error.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UnreadableImage(ValueError):
    """These bytes give no image; the message is the reason, in a few words."""


def decode(data: bytes) -> np.ndarray:
    """Pixels as (H, W, 3) uint8 RGB; transparency is laid over white, 16 bits are scaled to 8.

    The pixels are as stored: an EXIF rotation is not applied here, ``normalise`` has done so for images in
    shards. Raises UnreadableImage.
    """
    pixels = _decode_jpeg(data)
    return _to_rgb(_open(data)) if pixels is None else pixels


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) of what ``decode`` will give, from the first bytes alone. Raises UnreadableImage."""
    if data[:3] == b"\xff\xd8\xff":
        with contextlib.suppress(ValueError):
            return simplejpeg.decode_jpeg_header(data)[:2]
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS).size[::-1]
    except Exception as error:
        raise UnreadableImage(_reason(error)) from None


def normalise(data: bytes, short_side: int | None = None) -> tuple[bytes, list[str]]:
    """The bytes to store, and what was changed: nothing for an upright 8-bit RGB or grayscale JPEG or PNG.

    Every image is decoded in full, so what comes back is readable. ``short_side`` (pixels) shrinks, never
    enlarges. Raises UnreadableImage.
    """
    pixels = None if _is_rotated(data) else _decode_jpeg(data)
    lossy, changes = True, []
    if pixels is None:
        pixels, lossy, changes = _convert(data)
    shrunk = _shrink(pixels, short_side)
    if shrunk is not pixels:
        changes.append("resized")
    return (_encode(shrunk, lossy) if changes else data), changes


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    """Pixels of an RGB or grayscale JPEG without any fault, else None: then Pillow has the last word."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    try:
        height, width, colour_space, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height)
        return None if "K" in colour_space else simplejpeg.decode_jpeg(data, "RGB")
    except UnreadableImage:
        raise
    except ValueError:
        return None


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"{width} x {height} pixels, above the limit of {MAX_PIXELS:,}")


def _open(data: bytes) -> Image.Image:
    """A fully loaded Pillow image of at most MAX_PIXELS pixels."""
    if not data:
        raise UnreadableImage("zero bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(*image.size)
        image.load()
    except (UnreadableImage, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise UnreadableImage(f"more pixels than the limit of {MAX_PIXELS:,}") from None
    except Image.UnidentifiedImageError:
        cut_off = data.startswith(MAGIC) or any(magic.startswith(data) for magic in MAGIC)
        raise UnreadableImage("truncated" if cut_off else f"not an image (it starts with {data[:8]!r})") from None
    except Exception as error:
        raise UnreadableImage(_reason(error)) from None
    return image


def _reason(error: Exception) -> str:
    text = str(error).lower()
    if "truncated" in text or isinstance(error, (EOFError, struct.error)):
        return "truncated"
    return f"broken: {text.splitlines()[0]}" if text else f"broken: {type(error).__name__}"


def _to_rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 pixels of an image in any of Pillow's modes."""
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        return _scaled_to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _scaled_to_8_bits(image: Image.Image) -> np.ndarray:
    """Gray values 0..65535 to 0..255; Pillow's own conversion would clip them."""
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise UnreadableImage(f"pixels of {values.dtype} in no known range; convert the image to 8 bits first")
    gray = (values.astype(np.float32) / 257).round().astype(np.uint8)
    return np.repeat(gray[:, :, None], 3, axis=2)


def _convert(data: bytes) -> tuple[np.ndarray, bool, list[str]]:
    """Upright RGB pixels, whether the source was lossy, and what makes it no ordinary image."""
    image = _open(data)
    lossy, changes = image.format in LOSSY, _peculiarities(image, data)
    if not changes and image.format in ("JPEG", "MPO"):
        changes = ["irregular-jpeg"]  # Pillow passes over faults that libjpeg warns of; stored anew, without them
    if "exif-rotated" in changes:
        image = ImageOps.exif_transpose(image)
    return _to_rgb(image), lossy, changes


def _peculiarities(image: Image.Image, data: bytes) -> list[str]:
    """Why these bytes are not stored as they are."""
    depth, colour_type = (data[24], data[25]) if image.format == "PNG" else (8, None)
    facts = [
        (str(image.format).lower(), image.format not in ("JPEG", "MPO", "PNG")),
        ("first-frame", image.format in ("GIF", "TIFF", "WEBP") and getattr(image, "n_frames", 1) > 1),
        ("cmyk", image.mode == "CMYK"),
        ("palette", image.mode in ("P", "PA") or colour_type == 3),
        ("16-bit", depth == 16 or image.mode == "I" or image.mode.startswith("I;16")),
        (f"{depth}-bit", colour_type == 0 and depth < 8),
        ("alpha", image.has_transparency_data),
        ("exif-rotated", _is_rotated(data)),
    ]
    return [name for name, holds in facts if holds]


def _is_rotated(data: bytes) -> bool:
    """Whether the EXIF or XMP data ask for a rotation; searching the bytes spares most images the parsing."""
    marks = JPEG_EXIF_MARKS if data.startswith(b"\xff\xd8") else EXIF_MARKS
    if not data.startswith(TIFF_MARKS) and not any(mark in data for mark in marks):
        return False
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS).getexif().get(ORIENTATION, 1) in range(2, 9)
    except Exception:
        return False


def _shrink(pixels: np.ndarray, short_side: int | None) -> np.ndarray:
    """Antialiased, with the aspect kept; the same array where it is small enough."""
    height, width = pixels.shape[:2]
    if short_side is None or min(height, width) <= short_side:
        return pixels
    scale = short_side / min(height, width)
    size = max(short_side, round(width * scale)), max(short_side, round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _encode(pixels: np.ndarray, lossy: bool) -> bytes:
    """A JPEG of quality 95 where the source had lost something already, else a PNG."""
    if lossy:
        return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), QUALITY, "RGB", "420")
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
