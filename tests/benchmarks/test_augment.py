"""Augmentation of images with boxes and masks: drawn rectangles of known colours, cases worked by hand, the numbers of
protocols 6, 7 and 12."""

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from raydc.benchmarks.augment import (
    _choose_crop,
    _generator,
    brighten,
    detection_test,
    detection_train,
    distort,
    fit,
    is_varied,
    saturate,
    scale_contrast,
    segmentation_test,
    segmentation_train,
    turn_hue,
)

SIDES = tuple(range(480, 801, 32))
COLOURS = torch.tensor([[90, 90, 90], [200, 40, 60], [60, 180, 40], [40, 90, 200]], dtype=torch.uint8)
MEAN_COLOUR = (124, 116, 104)

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(height: int = 90, width: int = 120) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels, boxes float32 (3, 4) and classes uint8 (H, W): three rectangles, none of them in the middle."""
    boxes = torch.tensor([[4, 6, 40, 30], [60, 10, 110, 34], [10, 50, 54, 84]], dtype=torch.float32)
    classes = torch.zeros(height, width, dtype=torch.uint8)
    for number, (x1, y1, x2, y2) in enumerate(boxes.int().tolist(), start=1):
        classes[y1:y2, x1:x2] = number
    return COLOURS[classes.long()].permute(2, 0, 1).contiguous(), boxes, classes


def test_sizes_by_hand():
    """mmcv: the smaller of long / longest and short / shortest, times each side, plus a half, cut."""
    assert fit(375, 500, 1333, 800) == (800, 1067), "1066.67"
    assert fit(480, 640, 1333, 480) == (480, 640)
    assert fit(200, 1000, 1333, 800) == (267, 1333), "266.6: the long side is the limit"
    assert fit(1000, 200, 1333, 800) == (1333, 267)
    assert fit(375, 500, 2048, 512) == (512, 683), "682.67: VOC's test"
    assert fit(1024, 2048, 2049, 1025) == (1025, 2049), "1024.5 and a half: Cityscapes' test"
    assert fit(1, 5000, 1333, 800) == (1, 1333), "never nothing"


# --- detection ----------------------------------------------------------------------------------------------------------


def test_boxes_masks_and_labels_stay_on_their_objects():
    pixels, boxes, classes = drawn()
    masks = torch.stack([classes == number for number in (1, 2, 3)]).to(torch.uint8)
    flipped = []
    for seed in range(24):
        out, moved, labels, moved_masks = detection_train(
            pixels, boxes, torch.tensor([1, 2, 3]), masks, short_sides=(60, 90, 135, 200), long_side=240, seed=seed
        )
        assert out.dtype == moved_masks.dtype == torch.uint8 and moved.dtype == torch.float32
        assert moved_masks.shape[1:] == out.shape[1:] and labels.tolist() == [1, 2, 3]
        for box, label, mask in zip(moved, labels, moved_masks, strict=True):
            x1, y1, x2, y2 = box.tolist()
            inside = out[:, int(y1) + 3 : int(y2) - 2, int(x1) + 3 : int(x2) - 2]
            assert inside.numel() and (inside == COLOURS[label][:, None, None]).all()
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            edges = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            assert max(abs(float(edge) - corner) for edge, corner in zip(edges, (x1, y1, x2, y2), strict=True)) <= 1
        flipped.append(bool(moved[0, 0] > moved[1, 0]))
    assert set(flipped) == {True, False}


def test_a_flip_by_hand():
    """In ten columns a box from 1 to 3 is one from 7 to 9; rows stay."""
    pixels = torch.arange(3 * 4 * 10, dtype=torch.uint8).reshape(3, 4, 10)
    boxes, labels = torch.tensor([[1.0, 0, 3, 2], [0.5, 1, 10, 4]]), torch.tensor([5, 6])
    masks = torch.zeros(2, 4, 10, dtype=torch.uint8)
    masks[0, 0:2, 1:3] = 1
    seen = set()
    for seed in range(200):
        out, moved, kept, moved_masks = detection_train(
            pixels, boxes, labels, masks, short_sides=(4,), long_side=10, seed=seed
        )
        flip = not torch.equal(out, pixels)
        seen.add((seed, flip))
        assert np.array_equal(out.numpy(), pixels.numpy()[:, :, :: -1 if flip else 1])
        assert moved.tolist() == ([[7, 0, 9, 2], [0, 1, 9.5, 4]] if flip else boxes.tolist())
        assert kept.tolist() == [5, 6]
        assert moved_masks[0].nonzero()[0].tolist() == ([0, 7] if flip else [0, 1]) and moved_masks[0].sum() == 4
    flips = sum(flip for _, flip in seen)
    assert stats.binomtest(flips, 200, 0.5).pvalue > 1e-3


def test_a_resize_by_hand():
    """50 x 100 to a short side of 75: everything by 1.5. To 200 with at most 300 on the long side: by 3."""
    pixels, boxes = torch.zeros(3, 50, 100, dtype=torch.uint8), torch.tensor([[10.0, 4, 90, 30]])
    for short, long, factor in ((75, 300, 1.5), (200, 300, 3.0), (25, 300, 0.5)):
        found = set()
        for seed in range(12):
            out, moved, _, masks = detection_train(
                pixels, boxes, torch.tensor([0]), None, short_sides=(short,), long_side=long, seed=seed
            )
            assert out.shape == (3, 50 * factor, 100 * factor) and masks is None
            found.add(tuple((moved[0] / factor).tolist()))
        assert found == {(10, 4, 90, 30)}, "its mirror image is itself"


def test_short_sides_are_drawn_alike_up_to_the_long_limit():
    """480, 512, ..., 800 (protocol 6.1): eleven of them."""
    pixels, nothing = torch.zeros(3, 40, 60, dtype=torch.uint8), torch.zeros(0, 4)
    short_sides = tuple(side // 8 for side in SIDES)
    assert len(SIDES) == 11
    shapes = [
        detection_train(pixels, nothing, torch.zeros(0), None, short_sides=short_sides, long_side=166, seed=seed)[0].shape
        for seed in range(550)
    ]
    heights, counts = np.unique([shape[1] for shape in shapes], return_counts=True)
    assert tuple(heights) == short_sides
    assert stats.chisquare(counts).pvalue > 1e-3
    assert all(shape[2] == int(shape[1] * 1.5 + 0.5) for shape in shapes)


def test_objects_without_area_are_dropped_everywhere_alike():
    pixels = torch.zeros(3, 20, 40, dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0, 8, 8], [5, 5, 5, 15], [40, 2, 50, 9], [30, 10, 60, 30], [-9, -9, 0, 0]])
    masks = torch.arange(5, dtype=torch.uint8)[:, None, None].expand(5, 20, 40)
    for seed in range(8):
        _, moved, labels, kept = detection_train(
            pixels, boxes, torch.arange(5), masks, short_sides=(20,), long_side=40, seed=seed
        )
        assert labels.tolist() == [0, 3] and kept[:, 0, 0].tolist() == [0, 3]
        assert sorted(moved[1, [0, 2]].tolist()) in ([30, 40], [0, 10]) and moved[1, [1, 3]].tolist() == [10, 20], "cut"


@pytest.mark.parametrize("masks", [None, torch.zeros(0, 30, 40, dtype=torch.uint8)])
def test_an_image_without_objects_stays_an_image(masks):
    pixels = torch.zeros(3, 30, 40, dtype=torch.uint8)
    for seed in range(4):
        out, boxes, labels, kept = detection_train(
            pixels, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), masks, short_sides=(60,), long_side=100, seed=seed
        )
        assert out.shape == (3, 60, 80) and boxes.shape == (0, 4) and labels.shape == (0,)
        assert kept is None if masks is None else kept.shape == (0, 60, 80)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 700), (700, 1)])
def test_slivers_go_through(height, width):
    pixels, box = torch.full((3, height, width), 7, dtype=torch.uint8), torch.tensor([[0.0, 0, width, height]])
    out, boxes, _, _ = detection_train(pixels, box, torch.tensor([1]), None, short_sides=(32,), long_side=64, seed=0)
    assert (out == 7).all() and boxes.tolist() == [[0, 0, out.shape[2], out.shape[1]]]
    labels = torch.ones(height, width, dtype=torch.uint8)
    out, labels = segmentation_train(pixels, labels, scale=(64, 16), crop=32, fill=MEAN_COLOUR, seed=0)
    assert out.shape == (3, 32, 32) and labels.shape == (32, 32)


def test_resized_photographs_are_pillows(real_data):
    file = sorted((real_data / "voc07").rglob("*.jpg"))[0]
    photo = Image.open(file).convert("RGB")
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
    for resized, size in (
        (detection_test(pixels, short_side=800, long_side=1333), fit(photo.height, photo.width, 1333, 800)),
        (segmentation_test(pixels, scale=(2048, 512)), fit(photo.height, photo.width, 2048, 512)),
        (segmentation_test(pixels, scale=(512, 128)), fit(photo.height, photo.width, 512, 128)),
    ):
        theirs = np.array(photo.resize(size[::-1], Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        assert resized.shape == theirs.shape and resized.dtype == torch.uint8
        assert np.abs(resized.numpy().astype(int) - theirs).max() <= 1


# --- segmentation -------------------------------------------------------------------------------------------------------


def test_labels_stay_on_their_colours_and_the_rest_is_padding():
    """The colours change, but they are one for each class, away from the edges; padding has the mean colour exactly."""
    pixels, _, classes = drawn()
    padded = 0
    for seed in range(40):
        out, labels = segmentation_train(pixels, classes, scale=(120, 90), crop=100, fill=MEAN_COLOUR, seed=seed)
        assert out.shape == (3, 100, 100) and labels.shape == (100, 100) and out.dtype == labels.dtype == torch.uint8
        assert set(labels.unique().tolist()) <= {0, 1, 2, 3, 255}
        content = labels != 255
        rows, columns = int(content.any(1).sum()), int(content.any(0).sum())
        assert content[:rows, :columns].all() and int(content.sum()) == rows * columns, "below and to the right"
        assert (out[:, ~content] == torch.tensor(MEAN_COLOUR, dtype=torch.uint8)[:, None]).all()
        around = torch.nn.functional.unfold(labels[None, None].float(), 7).view(49, 94, 94)
        core = (around == around[24]).all(0) & (around[24] != 255)
        assert core.any()
        for one in labels[3:-3, 3:-3][core].unique():
            colours = out[:, 3:-3, 3:-3][:, core & (around[24] == one)]
            assert (colours == colours[:, :1]).all()
        padded += bool(rows < 100 or columns < 100)
    assert 0 < padded < 40


def test_ratios_are_uniform_from_a_half_to_two():
    """20 x 20 at scale (400, 100): the short limit counts, and the side is a hundred times the ratio."""
    pixels, labels = torch.zeros(3, 20, 20, dtype=torch.uint8), torch.zeros(20, 20, dtype=torch.uint8)
    sides = []
    for seed in range(400):
        _, out = segmentation_train(pixels, labels, scale=(400, 100), crop=201, fill=MEAN_COLOUR, seed=seed)
        rows, columns = int((out != 255).any(1).sum()), int((out != 255).any(0).sum())
        assert rows == columns
        sides.append(rows)
    assert 50 <= min(sides) <= 52 and 197 <= max(sides) <= 199, "a scale of whole pixels, cut"
    spread = np.array(sides) + np.random.default_rng(0).random(400)
    assert stats.kstest(spread, "uniform", (50, 150)).pvalue > 1e-3


def test_the_labels_of_a_flip_by_hand():
    """Left half dark and of class 0, right half bright and of class 1: bright stays class 1 on either side."""
    pixels, labels = torch.full((3, 32, 32), 40, dtype=torch.uint8), torch.zeros(32, 32, dtype=torch.uint8)
    pixels[:, :, 16:], labels[:, 16:] = 160, 1
    flips = 0
    for seed in range(200):
        out, found = segmentation_train(pixels, labels, scale=(64, 16), crop=32, fill=MEAN_COLOUR, seed=seed)
        side = int((found != 255).any(0).sum())
        flip = bool(found[0, 0] == 1)
        flips += flip
        out = out[:, :side, :side].flip(-1) if flip else out[:, :side, :side]
        assert out[:, :, side // 2 + 2 :].min() > out[:, :, : side // 2 - 2].max()
    assert stats.binomtest(flips, 200, 0.5).pvalue > 1e-3


def test_varied_crops_by_hand():
    def of(*counts: tuple[int, int]) -> torch.Tensor:
        return torch.cat([torch.full((count,), label, dtype=torch.uint8) for label, count in counts])[None]

    assert not is_varied(of((0, 75), (1, 25))), "75 % is too much"
    assert is_varied(of((0, 74), (1, 26)))
    assert not is_varied(of((3, 100))), "one class"
    assert is_varied(of((0, 2), (254, 1), (255, 97))), "ignored pixels are not counted"
    assert not is_varied(of((0, 3), (254, 1), (255, 96)))
    assert not is_varied(of((255, 100))), "no class at all"


def test_crops_lie_anywhere_and_eleven_are_drawn_at_most():
    """The share of varied crops is that of eleven draws where the first varied one is taken; p by counting all places."""
    labels = torch.zeros(30, 36, dtype=torch.uint8)
    labels[:6, :8] = 1
    windows = labels.unfold(0, 20, 1).unfold(1, 20, 1)
    varied = np.array([[is_varied(window) for window in row] for row in windows])
    assert varied.shape == (11, 17)
    assert not varied.any(), "48 of 400 pixels are too few"
    places = np.array([[part.start for part in _choose_crop(labels, 20, _generator(seed))] for seed in range(1500)])
    for column, count in ((0, 11), (1, 17)):
        values, counts = np.unique(places[:, column], return_counts=True)
        assert values.tolist() == list(range(count)) and stats.chisquare(counts).pvalue > 1e-3
    labels[:11, :12] = 1
    varied = np.array([[is_varied(window) for window in row] for row in labels.unfold(0, 20, 1).unfold(1, 20, 1)])
    share = varied.mean()
    assert 0.01 < share < 0.2
    hits = sum(is_varied(labels[_choose_crop(labels, 20, _generator(seed))]) for seed in range(1500))
    assert stats.binomtest(hits, 1500, 1 - (1 - share) ** 11).pvalue > 1e-3


def test_an_image_without_classes_is_cropped_all_the_same():
    pixels, labels = torch.zeros(3, 40, 50, dtype=torch.uint8), torch.full((40, 50), 255, dtype=torch.uint8)
    out, found = segmentation_train(pixels, labels, scale=(200, 100), crop=32, fill=MEAN_COLOUR, seed=0)
    assert out.shape == (3, 32, 32) and (found == 255).all()


# --- colours ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pixels_of_all_colours() -> torch.Tensor:
    """float32 (3, 1, 500), with black, white, gray and pure colours."""
    some = np.random.default_rng(0).integers(0, 256, (490, 3))
    edges = [[0, 0, 0], [255, 255, 255], [128, 128, 128], [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]]
    edges += [[1, 0, 0], [254, 255, 255], [0, 77, 77]]
    return torch.tensor(np.concatenate([some, edges]).T[:, None], dtype=torch.float32)


def through_hsv(x: torch.Tensor, hue: float, saturation: float) -> np.ndarray:
    """The standard library's conversion, pixel for pixel."""
    changed = []
    for colour in (x[:, 0].T / 255).tolist():
        h, s, v = colorsys.rgb_to_hsv(*colour)
        changed.append(colorsys.hsv_to_rgb((h + hue) % 1, min(1, s * saturation), v))
    return 255 * np.array(changed).T[:, None]


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 1.2, 1.5])
def test_saturation_is_the_standard_librarys(pixels_of_all_colours, factor):
    expected = through_hsv(pixels_of_all_colours, 0, factor)
    assert np.allclose(saturate(pixels_of_all_colours, factor).numpy(), expected, atol=1e-3)


@pytest.mark.parametrize("turns", [-0.1, -0.03, 0.0, 0.1])
def test_hue_is_the_standard_librarys(pixels_of_all_colours, turns):
    expected = through_hsv(pixels_of_all_colours, turns, 1)
    assert np.allclose(turn_hue(pixels_of_all_colours, turns).numpy(), expected, atol=1e-2)


def test_brightness_and_contrast_by_hand():
    x = torch.tensor([0.0, 100, 250])[None, None]
    assert brighten(x, 32).flatten().tolist() == [32, 132, 255]
    assert brighten(x, -32).flatten().tolist() == [0, 68, 218]
    assert scale_contrast(x, 1.5).flatten().tolist() == [0, 150, 255], "about black"
    assert scale_contrast(x, 0.5).flatten().tolist() == [0, 50, 125]


GRAYS, REDDISH = (60, 120), (120, 80, 80)


@pytest.fixture(scope="module")
def distortions() -> dict[str, np.ndarray]:
    """What 1,500 distortions did, worked out from three pixels that nothing clamps.

    Two grays g give contrast and brightness, (g + b) c; a colour whose saturation is then 40 / (120 + b) gives the rest.
    """
    patches = torch.tensor([[GRAYS[0]] * 3, [GRAYS[1]] * 3, REDDISH], dtype=torch.uint8).T[:, None]
    found = []
    for seed in range(1500):
        (low, *_), (high, *_), colour = distort(patches, _generator(seed))[:, 0].T.tolist()
        contrast = (high - low) / (GRAYS[1] - GRAYS[0])
        brightness = high / contrast - GRAYS[1]
        hue, saturation, _ = colorsys.rgb_to_hsv(*(one / 255 for one in colour))
        found.append((brightness, contrast, saturation * (120 + brightness) / 40, (hue + 0.5) % 1 - 0.5))
    return dict(zip(("brightness", "contrast", "saturation", "hue"), np.array(found).T, strict=True))


@pytest.mark.parametrize(
    ("name", "still", "half", "noise"),
    [("brightness", 0, 32, 4), ("contrast", 1, 0.5, 0.02), ("saturation", 1, 0.5, 0.2), ("hue", 0, 18 / 180, 0.02)],
)
def test_each_distortion_acts_half_the_time_over_its_range(distortions, name, still, half, noise):
    """Brightness 32, contrast and saturation 0.5 to 1.5, hue 18 of 180 steps, each with probability .5 (protocol 12).

    Half of the values are ``still``, the others uniform over ``half`` to either side; ``noise``: from rounded pixels.
    """
    shift = (distortions[name] - still) / half
    assert np.abs(shift).max() < 1 + noise / half
    outer = np.abs(shift) > 0.5  # a quarter of all
    assert stats.binomtest(int(outer.sum()), 1500, 0.25).pvalue > 1e-3
    assert stats.binomtest(int((shift[outer] > 0).sum()), int(outer.sum()), 0.5).pvalue > 1e-3
    assert shift.min() < -0.95 and shift.max() > 0.95


def test_distortions_are_independent(distortions):
    assert np.abs(np.corrcoef(list(distortions.values())) - np.eye(4)).max() < 0.1


def test_nothing_happens_to_one_image_in_sixteen():
    colours = torch.tensor([[200, 90, 30], [30, 140, 220]], dtype=torch.uint8).T[:, None]
    same = sum(torch.equal(distort(colours, _generator(seed)), colours) for seed in range(1600))
    assert stats.binomtest(same, 1600, 1 / 16).pvalue > 1e-3


def test_contrast_comes_before_or_after_the_colours():
    """Of a bright red that contrast clamps, the order tells: one is nearer than the other wherever they differ."""
    bright = (255, 150, 150)
    patches = torch.tensor([[GRAYS[0]] * 3, [GRAYS[1]] * 3, REDDISH, bright], dtype=torch.uint8).T[:, None]
    firsts = []
    for seed in range(4000):
        out = distort(patches, _generator(seed))[:, 0].T
        contrast = (int(out[1, 0]) - int(out[0, 0])) / 60
        hue, saturation, _ = colorsys.rgb_to_hsv(*(out[2] / 255).tolist())
        if abs(int(out[1, 0]) - 120 * contrast) > 2 or hue != 0:
            continue  # only images that keep their brightness and hue
        factor = saturation * 3
        x = torch.tensor(bright, dtype=torch.float32)[:, None, None]
        first = saturate(scale_contrast(x, contrast), factor).flatten()
        last = scale_contrast(saturate(x, factor), contrast).flatten()
        if (first - last).abs().max() > 25:
            errors = [float((one - out[3]).abs().max()) for one in (first, last)]
            assert min(errors) < 12
            firsts.append(errors[0] < errors[1])
    assert len(firsts) > 20
    assert stats.binomtest(sum(firsts), len(firsts), 0.5).pvalue > 1e-3


# --- seeds --------------------------------------------------------------------------------------------------------------


def both(seed: int) -> list[torch.Tensor]:
    pixels, boxes, classes = drawn()
    masks = torch.stack([classes == number for number in (1, 2, 3)]).to(torch.uint8)
    found = detection_train(pixels, boxes, torch.arange(3), masks, short_sides=(60, 90, 120), long_side=200, seed=seed)
    return [*found, *segmentation_train(pixels, classes, scale=(120, 90), crop=64, fill=MEAN_COLOUR, seed=seed)]


def test_results_hang_on_the_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = both(2**62 + 5)
    assert torch.equal(torch.get_rng_state(), before), "torch's generator is left as it was"
    torch.manual_seed(2)
    assert all(torch.equal(one, other) for one, other in zip(first, both(2**62 + 5), strict=True))
    assert len({both(seed)[4].numpy().tobytes() for seed in range(20)}) == 20
    assert all(type(one) is torch.Tensor for one in first), "plain tensors"


def test_what_is_given_is_left_alone():
    pixels, boxes, classes = drawn()
    kept = [one.clone() for one in (pixels, boxes, classes)]
    for seed in range(10):
        detection_train(
            pixels, boxes, torch.arange(3), classes[None].repeat(3, 1, 1), short_sides=(90,), long_side=120, seed=seed
        )
        segmentation_train(pixels, classes, scale=(120, 90), crop=64, fill=MEAN_COLOUR, seed=seed)
    assert all(torch.equal(one, old) for one, old in zip((pixels, boxes, classes), kept, strict=True))
