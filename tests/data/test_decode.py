"""Pixels against Pillow's, and every kind of image that is no ordinary one."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from raydc.data.decode import MAX_PIXELS, UnreadableImage, decode, normalise


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A real photograph, 60 x 40."""
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("china.jpg")).resize((60, 40))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return np.abs(a.astype(int) - b.astype(int)).mean()


def test_real_jpegs_have_pillows_pixels_and_are_kept(real_data):
    files = sorted((real_data / "imagenette224" / "val").rglob("*.JPEG"))[:150]
    modes = set()
    for file in files:
        data = file.read_bytes()
        modes.add(opened(data).mode)
        assert np.array_equal(decode(data), np.asarray(opened(data).convert("RGB")))
        assert normalise(data) == (data, [])
    assert modes == {"RGB", "L"}, "grayscale photographs are among them"


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_ordinary_images_are_kept_byte_for_byte(photo, kind, mode):
    data = encoded(photo.convert(mode), kind)
    assert normalise(data) == (data, [])
    assert np.array_equal(decode(data), np.asarray(opened(data).convert("RGB")))


def test_cmyk_jpeg_becomes_an_rgb_jpeg(photo):
    data = encoded(photo.convert("CMYK"), "JPEG", quality=95)
    stored, changes = normalise(data)
    assert changes == ["cmyk"]
    assert (opened(stored).format, opened(stored).mode) == ("JPEG", "RGB")
    assert distance(decode(stored), np.asarray(photo)) < 6
    assert np.array_equal(decode(data), np.asarray(opened(data).convert("RGB")))


def test_palette_png_becomes_an_rgb_png_with_the_same_pixels(photo):
    data = encoded(photo.convert("P", palette=Image.Palette.ADAPTIVE), "PNG")
    stored, changes = normalise(data)
    assert changes == ["palette"]
    assert (opened(stored).format, opened(stored).mode) == ("PNG", "RGB")
    assert np.array_equal(decode(stored), np.asarray(opened(data).convert("RGB")))


def test_16_bit_gray_is_scaled_not_clipped(photo):
    gray = np.asarray(photo.convert("L"))
    data = encoded(Image.fromarray(gray.astype(np.uint16) * 257), "PNG")
    assert opened(data).mode == "I;16"
    stored, changes = normalise(data)
    assert changes == ["16-bit"]
    assert np.array_equal(decode(stored), np.repeat(gray[:, :, None], 3, axis=2))


def test_16_bit_rgb_png_is_found_by_its_header(photo):
    pixels = np.asarray(photo)
    data = png_of(pixels.astype(np.uint16) * 257, depth=16, colour_type=2)
    stored, changes = normalise(data)
    assert changes == ["16-bit"]
    assert np.array_equal(decode(stored), pixels)


def test_alpha_is_laid_over_white(photo):
    layered = photo.convert("RGBA")
    layered.putalpha(Image.new("L", photo.size, 0))
    layered.paste(photo.convert("RGBA").crop((0, 0, 30, 40)), (0, 0))
    stored, changes = normalise(encoded(layered, "PNG"))
    assert changes == ["alpha"]
    pixels = decode(stored)
    assert np.array_equal(pixels[:, :30], np.asarray(photo)[:, :30])
    assert (pixels[:, 30:] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotation_is_applied_as_pillow_does(photo, orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo, kind, exif=exif, **({} if kind in ("PNG", "TIFF") else {"quality": 100}))
    upright = np.asarray(ImageOps.exif_transpose(opened(data)).convert("RGB"))
    stored, changes = normalise(data)
    assert ("exif-rotated" in changes) == (orientation != 1)
    assert decode(stored).shape == upright.shape
    assert distance(decode(stored), upright) < 4  # wrongly rotated: above 50
    assert opened(stored).getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize(("kind", "becomes"), [("BMP", "PNG"), ("GIF", "PNG"), ("TIFF", "PNG"), ("WEBP", "JPEG")])
def test_other_formats_become_jpeg_or_png(photo, kind, becomes):
    data = encoded(photo, kind)
    stored, changes = normalise(data)
    assert kind.lower() in changes
    assert (opened(stored).format, opened(stored).mode) == (becomes, "RGB")
    assert distance(decode(stored), np.asarray(opened(data).convert("RGB"))) < (3 if becomes == "JPEG" else 1e-9)


def test_first_frame_of_an_animation(photo):
    frames = [photo, ImageOps.invert(photo)]
    stored, changes = normalise(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert "first-frame" in changes
    assert distance(decode(stored), np.asarray(photo)) < 20


def test_short_side_shrinks_keeps_the_aspect_and_never_enlarges(photo):
    data = encoded(photo, "JPEG", quality=95)
    stored, changes = normalise(data, short_side=20)
    assert changes == ["resized"]
    assert opened(stored).size == (30, 20)
    assert distance(decode(stored), np.asarray(photo.resize((30, 20), Image.Resampling.BICUBIC))) < 6
    assert normalise(data, short_side=40) == (data, [])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero bytes"),
        (b"this is a text file\n", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
        (b"\xff\xd8\xff\xe0", "truncated"),
    ],
)
def test_what_is_no_image_says_why(data, reason):
    for function in (decode, normalise):
        with pytest.raises(UnreadableImage, match=reason):
            function(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_truncated_files_are_unreadable(photo, kind, share):
    data = encoded(photo, kind)
    for function in (decode, normalise):
        with pytest.raises(UnreadableImage):
            function(data[: int(share * len(data))])


def test_truncated_real_photograph_is_named_truncated(real_data):
    data = next((real_data / "imagenette224" / "val").rglob("*.JPEG")).read_bytes()
    for end in (200, len(data) // 2, len(data) - 100):
        with pytest.raises(UnreadableImage, match="truncated"):
            normalise(data[:end])


def test_damage_that_pillow_reads_past_is_stored_without_it(photo):
    data = encoded(photo, "JPEG", quality=95)
    scan = data.index(b"\xff\xda")
    damaged = data[:scan] + b"\x12\x34\x56" + data[scan:]  # libjpeg: 3 extraneous bytes before marker
    stored, changes = normalise(damaged)
    assert changes == ["irregular-jpeg"]
    assert distance(decode(stored), np.asarray(photo)) < 6
    assert normalise(stored) == (stored, [])
    assert distance(decode(damaged), np.asarray(photo)) < 6


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(pixels: np.ndarray, depth: int, colour_type: int, size: tuple[int, int] | None = None) -> bytes:
    """A PNG written by hand, whose header may lie about its size."""
    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", *(size or (width, height)), depth, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(f">u{depth // 8}").tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(20_000, 20_000), (MAX_PIXELS // 10_000 + 1, 10_000)])
def test_a_decompression_bomb_is_known_by_its_header(size, photo):
    bomb = png_of(np.asarray(photo), depth=8, colour_type=2, size=size)
    for function in (decode, normalise):
        with pytest.raises(UnreadableImage, match="pixels.*limit of 178,956,970"):
            function(bomb)


def test_a_jpeg_bomb_is_known_by_its_header(photo):
    data = bytearray(encoded(photo, "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    with pytest.raises(UnreadableImage, match="60000 x 60000 pixels"):
        normalise(bytes(data))


def test_float_pixels_are_refused_not_guessed(photo):
    data = encoded(Image.fromarray(np.asarray(photo.convert("L"), np.float32)), "TIFF")
    with pytest.raises(UnreadableImage, match="convert the image to 8 bits"):
        normalise(data)
