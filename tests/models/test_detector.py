"""Detectors against the facts of protocol 6, cases worked by hand, torchvision's own detector and two real images."""

import math

import pytest
import torch
import torchvision
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch import nn
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import box_iou, roi_align

from raydc.benchmarks.boxes import read_voc_detection
from raydc.config import ModelConfig, UsageError
from raydc.models.backbone import build_backbone
from raydc.models.detector import RoIPool, faster_rcnn_c4, mask_rcnn_fpn, mask_targets, paste, region_losses

MAKERS = (faster_rcnn_c4, mask_rcnn_fpn)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

pytestmark = pytest.mark.usefixtures("one_thread")


def build(make, num_classes=3, *, small=True, **model):
    """``small``: few proposals, samples and detections an image, for speed."""
    torch.manual_seed(0)
    config = ModelConfig(**{"architecture": "resnet10", "width": 16} | model)
    detector = make(build_backbone(config, 0), num_classes)
    if small:
        detector.rpn._post_nms_top_n = {"training": 100, "testing": 50}
        detector.regions.fg_bg_sampler.batch_size_per_image = 32
        detector.regions.detections_per_img = 20
    return detector


def noise(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def target(boxes, labels, height=128, width=160):
    """Each object's mask is its whole box."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    return {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64), "masks": masks}


TWO = ([[10, 10, 80, 90], [50, 50, 150, 120]], [0, 2])


# --- the protocol's numbers


def check_common_numbers(detector):
    """Protocol 6.1 and 12, section 6."""
    rpn, regions = detector.rpn, detector.regions
    assert (rpn.proposal_matcher.high_threshold, rpn.proposal_matcher.low_threshold) == (0.7, 0.3)
    assert (rpn.fg_bg_sampler.batch_size_per_image, rpn.fg_bg_sampler.positive_fraction) == (256, 0.5)
    assert (rpn.nms_thresh, rpn.box_coder.weights) == (0.7, (1.0, 1.0, 1.0, 1.0))
    assert (regions.proposal_matcher.high_threshold, regions.proposal_matcher.low_threshold) == (0.5, 0.5)
    assert (regions.fg_bg_sampler.batch_size_per_image, regions.fg_bg_sampler.positive_fraction) == (512, 0.25)
    assert [1 / weight for weight in regions.box_coder.weights] == [0.1, 0.1, 0.2, 0.2]
    assert (regions.score_thresh, regions.nms_thresh, regions.detections_per_img) == (0.05, 0.5, 100)
    assert all(parameter.requires_grad for parameter in detector.parameters())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(detector)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in converted.modules())


def proposals_kept(rpn):
    kept = {}
    for name, mode in (("train", True), ("test", False)):
        rpn.train(mode)
        kept[name] = rpn.pre_nms_top_n(), rpn.post_nms_top_n()
    return kept


def test_c4_is_the_protocols_on_a_resnet50():
    detector = build(faster_rcnn_c4, 20, small=False, architecture="resnet50", width=64)
    assert proposals_kept(detector.rpn) == {"train": (12000, 2000), "test": (6000, 1000)}
    conv = detector.rpn.head.conv[0][0]
    assert (conv.in_channels, conv.out_channels, conv.kernel_size) == (1024, 1024, (3, 3))
    assert detector.rpn.head.cls_logits.out_channels == 15
    assert not any(isinstance(module, nn.BatchNorm2d) for module in detector.rpn.modules())
    assert (detector.regions.box_roi_pool.size, detector.regions.box_roi_pool.strides) == (14, (16,))
    head, predictor = detector.regions.box_head, detector.regions.box_predictor
    assert head.norm.num_features == 2048 and len(head.layer4) == 3
    assert (predictor.cls_score.out_features, predictor.bbox_pred.out_features) == (21, 80 + 4)
    with torch.no_grad():
        assert head.layer4(torch.zeros(1, 1024, 14, 14)).shape == (1, 2048, 7, 7)
    check_common_numbers(detector)


def test_fpn_is_the_protocols_on_a_resnet50():
    detector = build(mask_rcnn_fpn, 80, small=False, architecture="resnet50", width=64)
    assert proposals_kept(detector.rpn) == {"train": (2000, 1000), "test": (1000, 1000)}
    assert [block[0].in_channels for block in detector.neck.inner_blocks] == [256, 512, 1024, 2048]
    assert detector.rpn.head.cls_logits.out_channels == 3
    regions = detector.regions
    assert (regions.box_roi_pool.size, regions.mask_roi_pool.size) == (7, 14)
    assert regions.box_roi_pool.strides == regions.mask_roi_pool.strides == (4, 8, 16, 32)
    assert [m.out_features for m in regions.box_head if isinstance(m, nn.Linear)] == [1024]
    assert regions.mask_predictor.mask_fcn_logits.out_channels == 80
    for part, number in ((detector.neck, 8), (regions.box_head, 4), (regions.mask_head, 4)):
        assert sum(isinstance(module, nn.BatchNorm2d) for module in part.modules()) == number
    check_common_numbers(detector)


def test_fpn_has_as_many_weights_as_torchvisions_detector_of_the_same_heads():
    """Theirs has one more RPN convolution, and a mask of the background."""
    theirs = torchvision.models.detection.maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=11)
    count = sum(p.numel() for p in theirs.parameters()) - (256 * 256 * 9 + 256) - (256 + 1)
    ours = build(mask_rcnn_fpn, 10, architecture="resnet50", width=64)
    assert sum(p.numel() for p in ours.parameters()) == count


def test_fresh_weights_are_the_references_and_depend_on_the_global_generator():
    detector = build(mask_rcnn_fpn, 80)
    rpn, predictor = detector.rpn.head, detector.regions.box_predictor
    for layer, std in ((rpn.conv[0][0], 0.01), (predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.02)
        assert not layer.bias.any()
    for block, inputs in ((detector.neck.inner_blocks[3][0], 128), (detector.neck.layer_blocks[0][0], 256 * 9)):
        outputs = 256 * block.kernel_size[0] ** 2
        bound = math.sqrt(6 / (inputs + outputs))  # Xavier-uniform
        assert 0.99 * bound < block.weight.abs().max() <= bound
    logits, deconv = detector.regions.mask_predictor.mask_fcn_logits, detector.regions.mask_predictor.conv5_mask
    assert not logits.bias.any() and not deconv.bias.any()
    assert logits.weight.std().item() == pytest.approx(math.sqrt(2 / 80), rel=0.02)  # Kaiming-normal over fan_out
    assert torch.equal(build(mask_rcnn_fpn, 80).regions.box_head[5].weight, detector.regions.box_head[5].weight)
    torch.manual_seed(1)
    other = mask_rcnn_fpn(build_backbone(ModelConfig(architecture="resnet10", width=16), 0), 80)
    assert not torch.equal(other.regions.box_head[5].weight, detector.regions.box_head[5].weight)


# --- anchors


def anchors_of(detector, height, width):
    canvas = detector._canvas([torch.zeros(3, height, width, dtype=torch.uint8)])
    with torch.no_grad():
        maps = detector._maps(canvas)
    image = torchvision.models.detection.image_list.ImageList(canvas, [(height, width)])
    return detector.rpn.anchor_generator(image, list(maps.values()))[0], [tuple(m.shape[-2:]) for m in maps.values()]


def test_anchors_of_one_cell_of_c4_by_hand():
    anchors, (grid,) = anchors_of(build(faster_rcnn_c4), 128, 160)
    assert grid == (8, 10) and anchors.shape == (8 * 10 * 15, 4)
    cell = anchors.view(8, 10, 15, 4)[1, 2]
    expected = []
    for side in (32, 64, 128, 256, 512):
        for width, height in ((side * 2**0.5, side / 2**0.5), (side, side), (side / 2**0.5, side * 2**0.5)):
            expected.append([32 - width / 2, 16 - height / 2, 32 + width / 2, 16 + height / 2])
    distances = torch.cdist(cell, torch.tensor(expected))
    assert distances.min(0).values.max() < 1e-3 and len(cell) == len(expected)


def test_anchors_of_fpn_have_one_size_and_the_right_stride_a_level():
    """160 pixels are 5 cells of 32 and 3 of 64: the last stride is no quotient of the sides."""
    anchors, grids = anchors_of(build(mask_rcnn_fpn), 160, 96)
    assert grids == [(40, 24), (20, 12), (10, 6), (5, 3), (3, 2)]
    for (height, width), size, stride in zip(grids, (32, 64, 128, 256, 512), (4, 8, 16, 32, 64), strict=True):
        level, anchors = anchors[: height * width * 3], anchors[height * width * 3 :]
        sides = level[:, 2:] - level[:, :2]
        torch.testing.assert_close(sides.prod(1).sqrt(), torch.full((len(level),), float(size)))
        torch.testing.assert_close((sides[:, 1] / sides[:, 0])[:3].sort().values, torch.tensor([0.5, 1.0, 2.0]))
        middle = (level[-1, 2:] + level[-1, :2]) / 2
        torch.testing.assert_close(middle, torch.tensor([(width - 1.0) * stride, (height - 1.0) * stride]))
    assert len(anchors) == 0


def test_other_stems_have_other_strides():
    assert build(faster_rcnn_c4, stem="small", stem_stride=1).regions.box_roi_pool.strides == (4,)
    assert build(mask_rcnn_fpn, stem="small", stem_stride=2).regions.box_roi_pool.strides == (2, 4, 8, 16)
    assert build(mask_rcnn_fpn, stem="small", stem_stride=2).rpn.anchor_generator.strides == (2, 4, 8, 16, 32)


def test_which_anchors_are_objects_by_hand():
    """IoU with the object: 1, .5 (best of the second object), .2 (best of the third), 0; the last one leaves the image."""
    anchors = torch.tensor([[0.0, 0, 20, 20], [40, 0, 60, 20], [80, 0, 100, 20], [0, 60, 20, 80], [90, 60, 110, 80]])
    boxes = torch.tensor([[0.0, 0, 20, 20], [40, 0, 60, 10], [80, 0, 100, 4], [90, 60, 110, 80]])
    image = {"boxes": boxes, "size": (100, 105)}
    (labels,), (matched,) = build(faster_rcnn_c4).rpn.assign_targets_to_anchors([anchors], [image])
    assert labels.tolist() == [1, 1, 0, 0, -1]
    assert torch.equal(matched[:2], boxes[:2])
    (labels,), _ = build(mask_rcnn_fpn).rpn.assign_targets_to_anchors([anchors], [image])
    assert labels.tolist() == [1, 1, 0, 0, 1]  # FPN lets anchors cross the edge ...
    (labels,), _ = build(mask_rcnn_fpn).rpn.assign_targets_to_anchors([anchors], [image | {"size": (60, 90)}])
    assert labels.tolist() == [1, 1, 0, -1, -1]  # ... but not start in what pads the batch (60 x 90 pads itself to 64 x 96)


# --- losses


def test_rpn_losses_by_hand():
    """One object and one background anchor are sampled, the third counts for nothing."""
    rpn = build(faster_rcnn_c4).rpn
    deltas = torch.tensor([[0.5, -1.0, 0.0, 2.0], [7.0, 7, 7, 7], [9.0, 9, 9, 9]])
    goals = torch.tensor([[0.0, 1.0, 0.05, 0.0], [0.0, 0, 0, 0], [0.0, 0, 0, 0]])
    labels = torch.tensor([1.0, 0.0, -1.0])
    entropy, distance = rpn.compute_loss(torch.tensor([[[0.0], [math.log(3)], [50.0]]]), deltas, [labels], [goals])
    assert entropy.item() == pytest.approx((math.log(2) + math.log(4)) / 2)  # -log sigmoid(0), -log(1 - 3/4)
    assert distance.item() == pytest.approx((0.5 + 2 + 0.05 + 2) / 2)


def test_region_losses_by_hand():
    """Two classes and background; the object of class 1 (2 inside) is read from columns 8 to 11."""
    logits = torch.zeros(4, 3)
    deltas = torch.full((4, 12), 100.0)
    deltas[1, 8:] = torch.tensor([0.1, 0.0, -3.0, 1.0])
    goals = torch.tensor([[0.0, 0, 0, 0], [0.0, 0.02, 1.0, 1.0], [0.0, 0, 0, 0], [0.0, 0, 0, 0]])
    entropy, distance = region_losses(logits, deltas, torch.tensor([0, 2, 0, 0]), goals)
    assert entropy.item() == pytest.approx(math.log(3))
    assert distance.item() == pytest.approx((0.1 + 0.02 + 4) / 4)


def test_an_images_labels_reach_their_own_column():
    """Regions are the objects alone, and only the column of class 2 (the fourth) has a chance."""
    detector = build(faster_rcnn_c4)
    nn.init.zeros_(detector.regions.box_predictor.cls_score.weight)
    detector.regions.box_predictor.cls_score.bias.data = torch.tensor([0.0, 0.0, 0.0, 30.0])
    maps, shapes = detector._maps(detector._canvas([noise(128, 160)])), [(128, 160)]
    for label, expected in ((2, 0.0), (1, 30.0)):
        one = target([[10, 10, 80, 90]], [label])
        losses = detector.regions(maps, [one["boxes"]], shapes, detector._inside([one], shapes))[1]
        assert losses["loss_classifier"].item() == pytest.approx(expected, abs=1e-4)


# --- pooling


def test_one_map_is_pooled_as_torchvision_does_and_aligned():
    """Of a ramp each bin is its own middle: pixel x is x / 16 - 1/2 in cells."""
    pool, map = RoIPool(14, (16,)), torch.randn(2, 5, 12, 12)
    boxes = [torch.tensor([[3.0, 5.0, 150.0, 99.0], [20.0, 20.0, 30.0, 180.0]]), torch.tensor([[0.0, 0.0, 192.0, 192.0]])]
    expected = roi_align(map, boxes, 14, 1 / 16, sampling_ratio=-1, aligned=True)
    torch.testing.assert_close(pool({"feature4": map}, boxes, [(192, 192)] * 2), expected)
    ramp = torch.arange(12.0).expand(1, 1, 12, 12)
    pooled = pool({"feature4": ramp}, [torch.tensor([[16.0, 16.0, 144.0, 144.0]])], [(192, 192)])[0, 0, 0]
    middles = torch.tensor([16 + (i + 0.5) * 128 / 14 for i in range(14)])
    torch.testing.assert_close(pooled, middles / 16 - 0.5)


def test_sampling_is_as_dense_as_the_cells():
    """21 cells in 7 bins: every cell counts, as in an average pool of 3."""
    maps = {name: torch.randn(1, 2, 32, 32) for name in ("feature2", "feature3")}
    box = torch.tensor([[0.0, 0.0, 168.0, 168.0]])  # of the second map, or of the only one
    for strides, name in (((8,), "feature2"), ((4, 8), "feature3")):
        pooled = RoIPool(7, strides)(maps, [box], [(256, 256)])
        torch.testing.assert_close(pooled, nn.functional.avg_pool2d(maps[name][:, :, :21, :21], 3))


def test_levels_by_hand():
    """floor(4 + log2(side / 224)), between 2 and 5; a region of 448 x 112 has a side of 224."""
    sides = {10: 2, 111: 2, 112: 3, 223: 3, 224: 4, 447: 4, 448: 5, 1300: 5}
    boxes = torch.tensor([[1.0, 2.0, 1.0 + side, 2.0 + side] for side in sides] + [[0.0, 0.0, 448.0, 112.0]])
    pool = RoIPool(7, (4, 8, 16, 32))
    assert (pool.levels(boxes) + 2).tolist() == [*sides.values(), 4]
    maps = {f"feature{level}": torch.full((2, 1, 2048 >> level, 2048 >> level), float(level)) for level in range(2, 6)}
    maps["pool"] = torch.full((2, 1, 32, 32), 6.0)
    boxes = boxes + 50  # no region at an edge, where 0 is mixed in
    pooled = pool(maps, [boxes[:4], boxes[4:]], [(2048, 2048)] * 2)
    expected = torch.tensor([*sides.values(), 4.0])[:, None, None, None].expand(9, 1, 7, 7)
    torch.testing.assert_close(pooled, expected)


# --- weights, padding, gradients


def test_the_four_stages_arrive_by_value():
    config = ModelConfig(architecture="resnet10", width=16)
    for make in MAKERS:
        expected = {name: tensor.clone() for name, tensor in build_backbone(config, 5).state_dict().items()}
        state = make(build_backbone(config, 5), 3).state_dict()
        moved = make is faster_rcnn_c4
        for name, tensor in expected.items():
            place = f"regions.box_head.{name}" if moved and name.startswith("layer4") else f"backbone.{name}"
            assert torch.equal(state.pop(place), tensor)
        assert not any("layer4" in name or name.startswith("backbone.") for name in state)


@pytest.mark.parametrize("sobel", [False, True])
def test_padding_is_invisible(sobel):
    detector = build(faster_rcnn_c4, sobel=sobel).eval()
    small, large = noise(100, 150), noise(200, 230, seed=1)
    canvas = detector._canvas([small, large])
    assert canvas.shape == (2, 3, 224, 256)
    normal = detector.backbone.norm(canvas)
    assert normal[0, :, 100:].abs().max() < 1e-6 and normal[0, :, :, 150:].abs().max() < 1e-6
    torch.testing.assert_close(normal[0, :, :100, :150], TF.normalize(small / 255, MEAN, STD), rtol=0, atol=1e-5)
    with torch.no_grad():
        together, alone = detector._maps(canvas)["feature4"], detector._maps(detector._canvas([small]))["feature4"]
    assert alone.shape[-2:] == (8, 10)
    # A cell of 16 pixels sees 49 to each side; alone, what is outside begins at 128 x 160.
    torch.testing.assert_close(together[:1, :, :5, :7], alone[:, :, :5, :7], rtol=0, atol=1e-4)


@pytest.mark.parametrize("model", [{}, {"sobel": True}, {"stem": "small", "stem_stride": 4, "architecture": "resnet18"}])
@pytest.mark.parametrize("make", MAKERS)
def test_gradients_reach_every_weight(make, model):
    detector = build(make, **model)
    losses = detector([noise(128, 160), noise(96, 90)], [target(*TWO), target([], [], 96, 90)])
    names = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
    assert set(losses) == names | ({"loss_mask"} if make is mask_rcnn_fpn else set())
    assert all(loss.shape == () and loss > 0 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    gradients = {name: parameter.grad for name, parameter in detector.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert gradients["backbone.conv1.weight"].abs().max() > 0
    assert detector.backbone.conv1.in_channels == (2 if model.get("sobel") else 3)


@pytest.mark.parametrize("make", MAKERS)
def test_a_batch_without_objects_trains_every_weight_without_nan(make):
    """Under DDP a weight without a gradient would keep the other ranks waiting. 20 x 20 pixels hold no anchor of C4."""
    detector = build(make)
    losses = detector([noise(128, 160), noise(20, 20)], [target([], []), target([], [], 20, 20)])
    assert losses["loss_rpn_box_reg"] == losses["loss_box_reg"] == losses.get("loss_mask", 0) == 0
    assert losses["loss_objectness"] > 0 and losses["loss_classifier"] > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())
    assert all(buffer.isfinite().all() for buffer in detector.buffers())
    losses = detector([noise(20, 20)] * 2, [target([[2, 2, 18, 18]], [1], 20, 20)] * 2)
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("make", MAKERS)
def test_bf16(make):
    detector = build(make)
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector([noise(128, 160)], [target(*TWO)])
        assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
        sum(losses.values()).backward()
        with torch.no_grad():
            (found,) = detector.eval()([noise(128, 160)])
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32 and len(found["boxes"]) > 0


# --- detections


def test_detections_are_torchvisions_but_for_the_labels():
    detector = build(faster_rcnn_c4).eval()
    nn.init.normal_(detector.regions.box_predictor.cls_score.weight, std=0.5)
    images = [noise(128, 160), noise(100, 90, seed=1)]
    with torch.no_grad():
        maps, shapes = detector._maps(detector._canvas(images)), [(128, 160), (100, 90)]
        boxes = [torch.tensor([[5.0, 5, 60, 70], [20, 20, 80, 80]]), torch.tensor([[0.0, 0, 90, 100]])]
        ours, _ = detector.regions(maps, boxes, shapes)
        theirs, _ = RoIHeads.forward(detector.regions, maps, boxes, shapes)
        found = detector(images)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one["boxes"], other["boxes"])
        torch.testing.assert_close(one["scores"], other["scores"])
        assert torch.equal(one["labels"], other["labels"] - 1)
    for one, (height, width) in zip(found, shapes, strict=True):
        assert 0 < len(one["boxes"]) <= 20
        assert one["labels"].min() >= 0 and one["labels"].max() <= 2
        assert one["scores"].min() > 0.05 and (one["scores"].diff() <= 0).all()
        assert (one["boxes"] >= 0).all() and (one["boxes"] <= torch.tensor([width, height] * 2)).all()
        for label in range(3):
            of_class = one["boxes"][one["labels"] == label]
            assert (box_iou(of_class, of_class).triu(1) <= 0.5 + 1e-4).all()


@pytest.mark.parametrize("make", MAKERS)
def test_detections_are_in_the_pixels_that_were_asked_for(make):
    detector = build(make).eval()
    with torch.no_grad():
        (plain,), (scaled,) = detector([noise(128, 160)]), detector([noise(128, 160)], sizes=[(64, 480)])
    factors = torch.tensor([3.0, 0.5, 3.0, 0.5])  # 480 / 160, 64 / 128
    torch.testing.assert_close(scaled["boxes"], plain["boxes"] * factors)
    assert torch.equal(scaled["labels"], plain["labels"]) and len(plain["boxes"]) > 0
    assert ("masks" in plain) == (make is mask_rcnn_fpn)
    if make is mask_rcnn_fpn:
        assert plain["masks"].dtype == torch.bool and plain["masks"].shape == (len(plain["boxes"]), 128, 160)
        assert scaled["masks"].shape == (len(plain["boxes"]), 64, 480)


def test_without_proposals_there_is_nothing():
    detector = build(mask_rcnn_fpn).eval()
    with torch.no_grad():
        maps = detector._maps(detector._canvas([noise(64, 64)]))
        ((found,), losses) = detector.regions(maps, [torch.zeros(0, 4)], [(64, 64)])
    assert losses == {} and set(found) == {"boxes", "labels", "scores", "masks"}
    assert all(len(value) == 0 for value in found.values())
    assert paste(found["masks"], found["boxes"], (64, 64)).shape == (0, 64, 64)


# --- masks


def test_mask_targets_by_hand():
    """An object fills the left 14 of a box of 28 pixels, and the whole of another one."""
    masks = torch.zeros(2, 60, 80, dtype=torch.uint8)
    masks[0, 10:38, 20:34] = 1
    masks[1, :, 40:] = 1
    goals = mask_targets(masks, torch.tensor([0, 1]), torch.tensor([[20.0, 10, 48, 38], [45.0, 5, 75, 55]]), 28)
    expected = torch.zeros(28, 28)
    expected[:, :14] = 1
    assert torch.equal(goals[0], expected) and torch.equal(goals[1], torch.ones(28, 28))


def test_pasting_by_hand():
    """A full mask is its box; one that is right of the middle is the right half; what is over the edge is cut."""
    right = torch.zeros(28, 28)
    right[:, 14:] = 1
    masks = torch.stack([torch.ones(28, 28), right, torch.ones(28, 28)])
    pasted = paste(masks, torch.tensor([[3.0, 4, 23, 10], [10.0, 0, 30, 20], [35.0, 15, 40, 20]]), (20, 40))
    expected = torch.zeros(3, 20, 40, dtype=torch.bool)
    expected[0, 4:10, 3:23] = expected[1, :, 20:30] = expected[2, 15:, 35:] = True
    assert torch.equal(pasted, expected)


def test_a_mask_survives_the_way_into_its_box_and_out_of_it():
    y, x = torch.meshgrid(torch.arange(120.0), torch.arange(150.0), indexing="ij")
    disc = ((x - 70) / 50) ** 2 + ((y - 60) / 35) ** 2 < 1
    box = torch.tensor([[18.0, 22.0, 123.0, 97.0]])
    back = paste(mask_targets(disc[None].byte(), torch.tensor([0]), box, 28), box, (120, 150))[0]
    assert (back & disc).sum() / (back | disc).sum() > 0.95


def test_masks_are_of_the_detected_class():
    """Every region is of class 1, whose map is full everywhere; those of the other classes are empty."""
    detector = build(mask_rcnn_fpn).eval()
    nn.init.zeros_(detector.regions.box_predictor.cls_score.weight)
    detector.regions.box_predictor.cls_score.bias.data = torch.tensor([0.0, 0.0, 9.0, 0.0])
    nn.init.zeros_(detector.regions.mask_predictor.mask_fcn_logits.weight)
    detector.regions.mask_predictor.mask_fcn_logits.bias.data = torch.tensor([-9.0, 9.0, -9.0])
    with torch.no_grad():
        (found,) = detector([noise(128, 160)])
    assert len(found["labels"]) > 0 and (found["labels"] == 1).all()
    boxes = found["boxes"]
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    large = areas > 1000
    assert large.any()
    torch.testing.assert_close(found["masks"].sum((1, 2))[large].float(), areas[large], rtol=0.06, atol=0)
    one = target([[10, 10, 80, 90]], [1])  # a mask that is its whole box: nothing is lost on class 1, much on class 2
    detector.train()
    assert detector([noise(128, 160)], [one])["loss_mask"] < 3
    maps, shapes = detector._maps(detector._canvas([noise(128, 160)])), [(128, 160)]
    for label, expected in ((1, 0.0), (2, 9.0)):
        given = detector._inside([one | {"labels": torch.tensor([label])}], shapes)
        loss = detector.regions(maps, [one["boxes"]], shapes, given)[1]["loss_mask"]
        assert loss.item() == pytest.approx(expected, abs=1e-3)


# --- what users can get wrong


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"boxes": torch.tensor([[10.0, 10, 10, 50]])}, "image 1 of a batch has a box without area"),
        ({"boxes": torch.tensor([[10.0, 50, 30, 10]])}, "x1 < x2 and y1 < y2"),
        ({"boxes": torch.tensor([[10.0, 10, math.nan, 50]])}, "without area"),
        ({"boxes": torch.tensor([[10.0, 10, math.inf, 50]])}, "without area"),
        ({"boxes": torch.zeros(0, 4)}, "has 1 labels and boxes of shape"),
        ({"boxes": torch.zeros(0)}, "has 1 labels and boxes of shape"),
        ({"labels": torch.tensor([3])}, "labels 3 to 3, the detector has 3 classes .0 to 2."),
        ({"labels": torch.tensor([-1])}, "labels -1 to -1"),
        ({"masks": torch.zeros(1, 64, 60, dtype=torch.uint8)}, r"are \(1, 64, 60\), not \(1, 64, 64\)"),
        ({"masks": torch.zeros(2, 64, 64, dtype=torch.uint8)}, "give one an object"),
    ],
)
def test_impossible_targets_are_named(wrong, message):
    good = target([[10, 10, 50, 50]], [0], 64, 64)
    with pytest.raises(UsageError, match=message):
        build(mask_rcnn_fpn)([noise(64, 64)] * 2, [good, good | wrong])


def test_missing_targets():
    detector = build(mask_rcnn_fpn)
    one = target([[10, 10, 50, 50]], [0], 64, 64)
    with pytest.raises(ValueError, match="1 images train with as many targets"):
        detector([noise(64, 64)])
    with pytest.raises(ValueError, match="2 images train with as many targets, not 1"):
        detector([noise(64, 64)] * 2, [one])
    del one["masks"]
    with pytest.raises(UsageError, match="masks of image 0 of a batch are missing"):
        detector([noise(64, 64)], [one])


# --- real images


def real_batch(real_data, short=160):
    """The first two images of VOC2007 with one object each, resized."""
    voc = read_voc_detection(real_data / "voc07" / "VOCdevkit", ["VOC2007"], "trainval")
    chosen = [one for one in voc.images if len(one.boxes) == 1][:2]
    images, targets = [], []
    for one in chosen:
        image = TF.pil_to_tensor(Image.open(voc.folder.path(one.path)).convert("RGB"))
        scale = short / min(one.height, one.width)
        images.append(TF.resize(image, [round(one.height * scale), round(one.width * scale)]))
        targets.append({"boxes": torch.from_numpy(one.boxes) * scale, "labels": torch.from_numpy(one.labels)})
    return images, targets


def test_sixty_steps_on_two_real_images_learn_them(real_data):
    images, targets = real_batch(real_data)
    detector = build(faster_rcnn_c4, 20)
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.02, momentum=0.9)
    history = []
    for _ in range(60):
        losses = detector(images, targets)
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert sum(history[-10:]) / 10 < 0.3 * history[0]
