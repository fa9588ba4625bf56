"""Crops and augmentation against torchvision's, on real images; parameters against their laws."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from raydc.config import ImagesConfig
from raydc.data.transforms import (
    Augmentation,
    augment,
    centre_boxes,
    crop_batch,
    crop_one,
    draw_augmentation,
    recolour_linear,
    recolour_torchvision,
)

EVERYTHING = ImagesConfig(
    size=32,
    resize=32,
    rotation=20,
    zoom=0.2,
    shear=10,
    shift=0.1,
    elastic=0.03,
    brightness=0.4,
    contrast=0.4,
    saturation=1.0,
    hue=0.5,
    grayscale=0.2,
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cifar(real_data) -> torch.Tensor:
    """20 real images, uint8 (20, 32, 32, 3)."""
    files = sorted((real_data / "cifar10" / "test").rglob("*.jpg"))[::250]
    return torch.from_numpy(np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files]))


@pytest.fixture(scope="module")
def photo(real_data) -> np.ndarray:
    """One real photograph, uint8 (H, W, 3), short side 320."""
    file = min((real_data / "imagewoof320" / "val").rglob("*.JPEG"))
    return np.array(Image.open(file).convert("RGB"))


def drawn(config: ImagesConfig, num: int, height: int = 32, width: int = 32, seed: int = 0) -> Augmentation:
    sizes = np.full(num, height), np.full(num, width)
    return draw_augmentation(config, seed, np.arange(num), np.zeros(num, int), *sizes)


def as_planes(images_BHWC: torch.Tensor) -> torch.Tensor:
    return images_BHWC.permute(0, 3, 1, 2).float()


def take(parameters: Augmentation, rows: np.ndarray) -> Augmentation:
    """The parameters of some images of a batch."""
    values = {spec.name: getattr(parameters, spec.name) for spec in fields(parameters)}
    return Augmentation(**{name: None if value is None else value[rows] for name, value in values.items()})


# --- boxes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (375, 500, (0.08, 1.0), (3 / 4, 4 / 3)),
        (32, 32, (0.2, 1.0), (3 / 4, 4 / 3)),
        (500, 100, (0.5, 1.0), (3 / 4, 4 / 3)),  # hardly any box fits: the central one
        (60, 400, (0.5, 1.0), (3 / 4, 4 / 3)),
        (64, 64, (0.9, 1.0), (0.5, 2.0)),
    ],
)
def test_boxes_follow_torchvisions_law(height, width, scale, ratio):
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(2000)])
    ours = drawn(ImagesConfig(crop_scale=scale, crop_ratio=ratio), 3000, height, width).box
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] > 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()
    for what in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0], lambda b: b[:, 1]):
        assert stats.ks_2samp(what(ours), what(theirs)).pvalue > 1e-3


def test_a_box_of_the_whole_image_is_the_whole_image():
    config = ImagesConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    assert (drawn(config, 50, 16, 16).box == (0, 0, 16, 16)).all()


def test_every_image_has_a_box_of_its_own_size():
    heights, widths = np.arange(1, 400), np.arange(400, 1, -1)
    box = draw_augmentation(ImagesConfig(), 0, np.arange(399), np.zeros(399, int), heights, widths).box
    assert (box[:, :2] >= 0).all() and (box[:, 2:] >= 1).all()
    assert (box[:, 0] + box[:, 2] <= heights).all() and (box[:, 1] + box[:, 3] <= widths).all()


@pytest.mark.parametrize("size", [8, 20, 32, 48])
def test_batched_crops_are_torchvisions(cifar, size):
    boxes = drawn(ImagesConfig(crop_scale=(0.05, 1.0), size=size, resize=size), len(cifar)).box
    ours = crop_batch(cifar, boxes, None, size)
    planes = as_planes(cifar)
    for image, box, crop in zip(planes, boxes.tolist(), ours, strict=True):
        assert (crop - TF.resized_crop(image, *box, [size, size], antialias=True)).abs().max() < 1e-2


def test_whole_images_of_the_right_size_are_untouched(cifar):
    boxes = np.tile((0, 0, 32, 32), (len(cifar), 1))
    assert torch.equal(crop_batch(cifar, boxes, None, 32), as_planes(cifar))


def test_one_crop_is_torchvisions_bit_for_bit(photo):
    image = torch.from_numpy(photo).permute(2, 0, 1)
    for box in drawn(ImagesConfig(), 8, *photo.shape[:2]).box:
        theirs = TF.resized_crop(image, *box.tolist(), [96, 96], antialias=True)
        assert torch.equal(crop_one(photo, box, 96), theirs)


def test_one_crop_and_batched_crops_agree_to_rounding(cifar):
    boxes = drawn(ImagesConfig(size=24, resize=24), len(cifar)).box
    batched = crop_batch(cifar, boxes, None, 24)
    single = torch.stack([crop_one(image.numpy(), box, 24) for image, box in zip(cifar, boxes, strict=True)])
    assert (batched - single).abs().max() < 1.1, "bytes are rounded after each of two directions"
    assert (batched - single).abs().mean() < 0.35


def test_flips_mirror_the_crop_and_only_those_asked_for(cifar):
    boxes = drawn(EVERYTHING, len(cifar)).box
    flip = np.arange(len(cifar)) % 3 == 0
    plain, flipped = (crop_batch(cifar, boxes, which, 32) for which in (None, flip))
    assert torch.equal(flipped[flip], plain[flip].flip(3))
    assert torch.equal(flipped[~flip], plain[~flip])
    for chance in (0.0, 0.3, 1.0):
        assert abs(drawn(replace(EVERYTHING, flip=chance), 4000).flip.mean() - chance) < 0.03


def test_the_centre_of_an_image_of_the_networks_size_is_the_image(cifar):
    config = ImagesConfig(size=32, resize=32)
    boxes = centre_boxes(config, np.full(20, 32), np.full(20, 32))
    assert torch.equal(crop_batch(cifar, boxes, None, 32), as_planes(cifar))


@pytest.mark.parametrize(("resize", "size"), [(256, 224), (112, 96), (320, 320)])
def test_the_centre_is_resize_and_centercrop(photo, resize, size):
    """Up to a shift of less than a pixel of the source."""
    box = centre_boxes(ImagesConfig(size=size, resize=resize), *np.array(photo.shape[:2])[:, None])[0]
    image = torch.from_numpy(photo).permute(2, 0, 1)
    theirs = TF.center_crop(TF.resize(image, resize, antialias=True), [size, size])
    ours = crop_one(photo, box, size)
    assert (ours.float() - theirs.float()).abs().mean() < 4
    far = crop_one(photo, box + np.array((8, 8, 0, 0)), size)
    assert (ours.float() - theirs.float()).abs().mean() < 0.4 * (far.float() - theirs.float()).abs().mean()


@pytest.mark.parametrize(("height", "width"), [(320, 500), (500, 320), (1, 40), (33, 32)])
def test_centre_boxes_are_square_central_and_inside(height, width):
    top, left, h, w = centre_boxes(ImagesConfig(), np.array([height]), np.array([width]))[0]
    assert h == w == max(1, round(min(height, width) * 224 / 256))
    assert abs(top - (height - h) / 2) <= 0.5 and abs(left - (width - w) / 2) <= 0.5


# --- parameters ---------------------------------------------------------------------------------------------------------


def test_parameters_do_not_hang_on_the_batch():
    rng = np.random.default_rng(0)
    ids, draws = rng.integers(0, 10**6, 200), rng.integers(0, 9, 200)
    heights, widths = rng.integers(20, 400, 200), rng.integers(20, 400, 200)
    config = replace(EVERYTHING, lighting=0.1, blur=0.5, jitter=0.8)
    whole = draw_augmentation(config, 5, ids, draws, heights, widths)
    some = rng.permutation(200)[:37]
    alone = draw_augmentation(config, 5, ids[some], draws[some], heights[some], widths[some])
    for spec in fields(Augmentation):
        assert np.array_equal(getattr(alone, spec.name), getattr(whole, spec.name)[some]), spec.name
        assert np.array_equal(getattr(take(whole, some), spec.name), getattr(alone, spec.name)), spec.name


def test_parameters_differ_for_every_seed_image_and_draw():
    def one(seed: int, image_id: int, draw: int) -> bytes:
        parameters = draw_augmentation(
            EVERYTHING, seed, np.array([image_id]), np.array([draw]), np.array([300]), np.array([300])
        )
        return parameters.matrix.tobytes() + parameters.brightness.tobytes()

    assert len({one(s, i, d) for s in range(5) for i in range(5) for d in range(5)}) == 125


def test_turning_one_operation_off_changes_no_other():
    less = drawn(replace(EVERYTHING, rotation=0, zoom=0, shear=0, shift=0, hue=0, flip=0), 50)
    all_of_them = drawn(EVERYTHING, 50)
    for name in ("box", "elastic", "brightness", "contrast", "saturation", "order", "grayscale"):
        assert np.array_equal(getattr(less, name), getattr(all_of_them, name))


def test_jitter_is_uniform_in_its_range():
    """torchvision: factors from max(0, 1 - x) to 1 + x, hue from -h to h, operations in any of 24 orders."""
    config = replace(EVERYTHING, brightness=0.4, contrast=1.5, saturation=1.0, hue=0.1)
    found = drawn(config, 6000)
    for values, low, high in (
        (found.brightness, 0.6, 1.4),
        (found.contrast, 0.0, 2.5),
        (found.saturation, 0.0, 2.0),
        (found.hue, -0.1, 0.1),
    ):
        assert stats.kstest(values, "uniform", (low, high - low)).pvalue > 1e-3
    _, times = np.unique(found.order, axis=0, return_counts=True)
    assert len(times) == 24 and stats.chisquare(times).pvalue > 1e-3
    assert abs(found.grayscale.mean() - 0.2) < 0.02
    independent = (found.brightness, found.contrast, found.saturation, found.hue, found.grayscale, found.flip)
    correlations = np.corrcoef(np.array(independent, float)) - np.eye(6)
    assert np.abs(correlations).max() < 0.05


def test_rotation_zoom_and_shift_are_uniform_in_their_range():
    off = {"rotation": 0.0, "zoom": 0.0, "shear": 0.0, "shift": 0.0}
    turned = drawn(replace(EVERYTHING, **off | {"rotation": 30.0}), 4000).matrix
    angles = np.degrees(np.arctan2(turned[:, 1, 0], turned[:, 0, 0]))
    assert stats.kstest(angles, "uniform", (-30, 60)).pvalue > 1e-3
    assert np.allclose(np.linalg.det(turned[:, :, :2]), 1, atol=1e-5)
    zoomed = drawn(replace(EVERYTHING, **off | {"zoom": 0.2}), 4000).matrix
    assert stats.kstest(1 / zoomed[:, 0, 0], "uniform", (0.8, 0.4)).pvalue > 1e-3
    shifted = drawn(replace(EVERYTHING, **off | {"shift": 0.1}), 4000).matrix
    for axis in (0, 1):
        assert stats.kstest(shifted[:, axis, 2] / 2, "uniform", (-0.1, 0.2)).pvalue > 1e-3  # sides are two long
    assert np.allclose(drawn(replace(EVERYTHING, **off), 10).matrix, np.eye(2, 3), atol=1e-7)


def test_elastic_displacements_are_normal_with_the_given_deviation():
    found = drawn(replace(EVERYTHING, elastic=0.03), 500).elastic
    assert found.shape == (500, 4, 4, 2)
    assert stats.kstest(found.ravel() / 2, "norm", (0, 0.03)).pvalue > 1e-3
    assert drawn(replace(EVERYTHING, elastic=0), 5).elastic is None


# --- warps --------------------------------------------------------------------------------------------------------------


def still(num: int, **changes) -> Augmentation:
    """Parameters that change nothing, but for ``changes``."""
    one, no = np.ones(num, np.float32), np.zeros(num, bool)
    values = {"box": np.zeros((num, 4), np.int64), "flip": no, "matrix": np.tile(np.eye(2, 3, dtype="f4"), (num, 1, 1))}
    values |= {"elastic": None, "brightness": one, "contrast": one, "saturation": one, "hue": 0 * one}
    values |= {"order": np.tile(np.arange(4), (num, 1)), "grayscale": no}
    return Augmentation(**(values | changes))


ROTATING = ImagesConfig(size=32, resize=32, rotation=90)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_a_still_warp_changes_nothing(cifar, mode):
    x = as_planes(cifar)
    assert torch.allclose(augment(x, still(len(x)), replace(ROTATING, warp=mode)), x, atol=1e-2)
    flat = still(len(x), elastic=np.zeros((len(x), 4, 4, 2), np.float32))
    assert torch.allclose(augment(x, flat, replace(ROTATING, warp=mode)), x, atol=1e-2)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_a_quarter_turn_by_hand(mode):
    """Output (x, y) is taken from input (-y, x): a turn against the clock."""
    image = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]).expand(1, 3, 3, 3)
    turn = still(1, matrix=np.array([[[0, -1, 0], [1, 0, 0]]], np.float32))
    out = augment(image, turn, replace(ROTATING, warp=mode))
    assert torch.allclose(out[0, 0], torch.tensor([[3.0, 6, 9], [2, 5, 8], [1, 4, 7]]), atol=1e-4)


def test_a_shift_by_hand_leaves_black_behind():
    """A third of the side: one pixel. The output is taken from one pixel further to the right."""
    image = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]).expand(1, 3, 3, 3)
    shift = still(1, matrix=np.array([[[1, 0, 2 / 3], [0, 1, 0]]], np.float32))
    out = augment(image, shift, ROTATING)
    assert torch.allclose(out[0, 0], torch.tensor([[2.0, 3, 0], [5, 6, 0], [8, 9, 0]]), atol=1e-4)


def test_drawn_rotations_are_torchvisions(cifar):
    """rotation nearest, black fill, no expand (protocol 12); a pixel in a hundred may fall on the other side of a tie."""
    parameters = drawn(replace(ImagesConfig(size=32, resize=32), rotation=30), len(cifar))
    x = as_planes(cifar)
    ours = augment(x, parameters, ImagesConfig(size=32, resize=32, rotation=30))
    for image, out, matrix in zip(x, ours, parameters.matrix, strict=True):
        angle = float(np.degrees(np.arctan2(matrix[1, 0], matrix[0, 0])))
        theirs = TF.rotate(image, angle, TF.InterpolationMode.NEAREST)
        assert ((out - theirs).abs() < 1e-3).float().mean() > 0.99


# --- colours ------------------------------------------------------------------------------------------------------------

OPERATIONS = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)


def test_recolouring_is_torchvisions_in_each_images_order(cifar):
    x = as_planes(cifar).repeat(3, 1, 1, 1)
    parameters = drawn(EVERYTHING, len(x), seed=4)
    assert 0 < parameters.grayscale.sum() < len(x)
    ours = recolour_torchvision(x, parameters)
    for n, (image, out) in enumerate(zip(x / 255, ours, strict=True)):
        factors = [float(getattr(parameters, name)[n]) for name in ("brightness", "contrast", "saturation", "hue")]
        for number in parameters.order[n]:
            image = OPERATIONS[number](image, factors[number])
        if parameters.grayscale[n]:
            image = TF.rgb_to_grayscale(image, 3)
        assert (out - 255 * image).abs().max() < 1e-2


@pytest.mark.parametrize("recolour", [recolour_torchvision, recolour_linear])
def test_still_colours_change_nothing(cifar, recolour):
    x = as_planes(cifar)
    before = x.clone()
    assert (recolour(x, still(len(x))) - x).abs().max() < 1e-2
    recolour(x, drawn(EVERYTHING, len(x)))
    assert torch.equal(x, before), "the input is left alone"


@pytest.mark.parametrize("recolour", [recolour_torchvision, recolour_linear])
def test_gray_is_gray_and_only_where_asked_for(cifar, recolour):
    x = as_planes(cifar)
    which = np.arange(len(x)) % 2 == 0
    out = recolour(x, still(len(x), grayscale=which))
    assert (out[which] - TF.rgb_to_grayscale(x[which], 3)).abs().max() < 1e-2
    assert (out[~which] - x[~which]).abs().max() < 1e-2


@pytest.mark.parametrize("recolour", [recolour_torchvision, recolour_linear])
def test_brightness_then_contrast_by_hand(recolour):
    """Gray 100 and 200, brightness 1.2: 120 and 240, of mean 180; contrast one half: 150 and 210."""
    image = torch.tensor([100.0, 200.0]).expand(1, 3, 1, 2)
    half = still(1, brightness=np.float32([1.2]), contrast=np.float32([0.5]))
    assert torch.allclose(recolour(image, half)[0, 0, 0], torch.tensor([150.0, 210.0]), atol=0.05)


def test_linear_colours_are_torchvisions_where_nothing_is_clamped(cifar):
    """Mild jitter of mid-range pixels in the fixed order brightness, contrast, saturation."""
    x = 90 + as_planes(cifar) * 60 / 255
    config = replace(EVERYTHING, brightness=0.2, contrast=0.2, saturation=0.3, hue=0.0)
    parameters = replace(drawn(config, len(x)), order=np.tile(np.arange(4), (len(x), 1)))
    difference = recolour_linear(x, parameters) - recolour_torchvision(x, parameters)
    assert difference.abs().max() < 0.1


def test_a_linear_hue_turn_keeps_gray_and_luma_and_comes_round(cifar):
    x = as_planes(cifar)
    gray = TF.rgb_to_grayscale(x, 3)
    for turns in (0.1, 0.5):
        turned = still(len(x), hue=np.full(len(x), turns, np.float32))
        assert (recolour_linear(gray, turned) - gray).abs().max() < 0.05
        assert (TF.rgb_to_grayscale(recolour_linear(x, turned)) - TF.rgb_to_grayscale(x)).abs().max() < 0.1
    half = still(len(x), hue=np.full(len(x), 0.5, np.float32))
    assert (recolour_linear(x, half) - x).abs().max() > 20
    assert (recolour_linear(recolour_linear(x, half), half) - x).abs().max() < 0.05


def test_a_linear_hue_turn_goes_the_same_way_as_torchvisions():
    """A third of a turn takes red towards green, not blue, in both."""
    red = torch.zeros(1, 3, 1, 1)
    red[:, 0] = 255
    third = still(1, hue=np.float32([1 / 3]))
    for recolour in (recolour_torchvision, recolour_linear):
        out = recolour(red, third)[0, :, 0, 0]
        assert out[1] > out[0] and out[1] > out[2], recolour.__name__


def test_augment_does_only_what_is_asked_for(cifar):
    x = as_planes(cifar)
    assert torch.equal(augment(x, drawn(EVERYTHING, len(x)), ImagesConfig(size=32, resize=32)), x)
    linear = replace(EVERYTHING, rotation=0, zoom=0, shear=0, shift=0, elastic=0, colour="linear")
    parameters = drawn(linear, len(x))
    assert torch.equal(augment(x, parameters, linear), recolour_linear(x, parameters))
    assert torch.equal(augment(x, parameters, replace(linear, colour="torchvision")), recolour_torchvision(x, parameters))


# --- jitter of a part of the images -------------------------------------------------------------------------------------

FACTORS = ("brightness", "contrast", "saturation", "hue")
COLOURS = ImagesConfig(size=32, resize=32, brightness=0.4, contrast=0.4, saturation=1.0, hue=0.5, grayscale=0.2)


@pytest.mark.parametrize("colour", ["torchvision", "linear"])
def test_jitter_of_nobody_leaves_pixels_alone(cifar, colour):
    x = as_planes(cifar)
    config = replace(COLOURS, jitter=0.0, grayscale=0.0, colour=colour)
    assert (augment(x, drawn(config, len(x)), config) - x).abs().max() < 1e-2
    everyone = replace(config, jitter=1.0)
    assert (augment(x, drawn(everyone, len(x)), everyone) - x).abs().amax((1, 2, 3)).min() > 1, "else it changes each one"


def test_jitter_of_everybody_draws_what_was_drawn_before_it_could_be_less():
    """Numbers of commit 23b8317, for images 0, 5 and 49,999 and draws 0, 1 and 2 of seed 7."""
    config = replace(COLOURS, rotation=2.0)
    sizes = np.full(3, 32), np.full(3, 32)
    found = draw_augmentation(config, 7, np.array([0, 5, 49_999]), np.array([0, 1, 2]), *sizes)
    assert found.box.tolist() == [[6, 2, 22, 27], [6, 10, 18, 20], [5, 8, 23, 19]]
    assert found.flip.tolist() == [True, False, True]
    for name, expected in (
        ("brightness", (0.9278056, 0.79157215, 1.263104)),
        ("contrast", (0.97696596, 1.0929022, 1.0930905)),
        ("saturation", (1.2741071, 1.1164093, 1.1704651)),
        ("hue", (0.0954081, -0.049725, 0.13958623)),
    ):
        np.testing.assert_array_equal(getattr(found, name), np.float32(expected), err_msg=name)
    assert found.order.tolist() == [[2, 3, 0, 1], [0, 1, 2, 3], [1, 0, 2, 3]]


def test_jitter_changes_its_share_of_the_images_and_these_as_if_it_were_all():
    part, whole = drawn(replace(COLOURS, jitter=0.8), 6000), drawn(COLOURS, 6000)
    changed = part.brightness != 1
    assert abs(changed.mean() - 0.8) < 0.02
    for name in FACTORS:
        ours, theirs = getattr(part, name), getattr(whole, name)
        assert np.array_equal(ours[changed], theirs[changed])
        assert (ours[~changed] == (0 if name == "hue" else 1)).all(), "all four or none"
    independent = np.array([changed, part.grayscale, part.flip, whole.brightness > 1], float)
    assert np.abs(np.corrcoef(independent) - np.eye(4)).max() < 0.05
    for name in ("box", "order", "grayscale", "flip"):
        assert np.array_equal(getattr(part, name), getattr(whole, name))


# --- blur ---------------------------------------------------------------------------------------------------------------

BLURRING = ImagesConfig(size=32, resize=32, blur=0.5, blur_sigma=(0.1, 2.0))


@pytest.mark.parametrize(("side", "largest"), [(32, 2.0), (32, 0.9), (32, 0.1), (5, 2.0), (2, 1.0)])
def test_blur_is_torchvisions(cifar, side, largest):
    """A kernel of 2 ceil(3 sigma) + 1 for the largest sigma, as far as there are pixels to mirror."""
    x = as_planes(cifar)[:, :, :side, :side]
    sigmas = np.linspace(largest, 0.1, len(x)).astype(np.float32)
    sigmas[3::4] = 0
    out = augment(x, still(len(x), blur=sigmas), replace(BLURRING, blur_sigma=(0.1, largest)))
    size = 2 * min(int(np.ceil(3 * np.float32(largest))), side - 1) + 1
    for image, ours, sigma in zip(x, out, sigmas.tolist(), strict=True):
        theirs = TF.gaussian_blur(image, [size, size], [sigma, sigma]) if sigma else image
        assert (ours - theirs).abs().max() < 1e-2
    assert torch.equal(out[3::4], x[3::4]), "to the bit where there is none"
    if largest >= 0.9:
        assert (out[0] - x[0]).abs().max() > 1


def test_blur_leaves_the_input_and_flat_colours_alone(cifar):
    x = as_planes(cifar)
    before = x.clone()
    blurred = still(len(x), blur=np.full(len(x), 1.5, np.float32))
    augment(x, blurred, BLURRING)
    assert torch.equal(x, before)
    flat = torch.tensor([10.0, 100.0, 250.0]).view(1, 3, 1, 1).expand(len(x), 3, 32, 32)
    assert torch.allclose(augment(flat, blurred, BLURRING), flat, atol=1e-3), "no channel runs into another"


def test_blur_takes_its_share_and_its_sigma_is_uniform():
    """Protocol 1c: probability .5, .1 to 2."""
    sigmas = drawn(BLURRING, 6000).blur
    blurred = sigmas > 0
    assert abs(blurred.mean() - 0.5) < 0.02
    assert stats.kstest(sigmas[blurred], "uniform", (0.1, 1.9)).pvalue > 1e-3
    everybody = drawn(replace(BLURRING, blur=1.0), 200).blur
    assert everybody.min() >= 0.1 and everybody.max() <= 2.0
    assert drawn(replace(BLURRING, blur=0.0), 5).blur is None


def test_blur_changes_no_other_number():
    plain, blurred = drawn(COLOURS, 50), drawn(replace(COLOURS, blur=0.5), 50)
    for name in ("box", "flip", "order", "grayscale", *FACTORS):
        assert np.array_equal(getattr(plain, name), getattr(blurred, name)), name


def test_blur_comes_after_the_colours(cifar):
    x = as_planes(cifar)
    config = replace(COLOURS, blur=1.0)
    parameters = drawn(config, len(x))
    expected = augment(recolour_torchvision(x, parameters), still(len(x), blur=parameters.blur), BLURRING)
    assert torch.allclose(augment(x, parameters, config), expected, atol=1e-3)


def test_an_image_is_blurred_alike_whoever_is_in_its_batch(cifar):
    """Else the crops of a run hang on its number of workers, and on micro batches."""
    x = as_planes(cifar)
    sigmas = np.linspace(0.3, 1.9, len(x)).astype(np.float32)
    together = augment(x, still(len(x), blur=sigmas), BLURRING)
    for n in range(len(x)):
        alone = augment(x[n : n + 1], still(1, blur=sigmas[n : n + 1]), BLURRING)
        assert torch.allclose(together[n : n + 1], alone, atol=1e-2), n
