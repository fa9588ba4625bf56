"""Object detectors around a backbone: Faster R-CNN C4 and Mask R-CNN FPN, as protocol 6 trains them.

The parts are torchvision's; what it does otherwise than the protocol is replaced here: the losses of boxes (L1), the pooling
of regions (aligned, adaptive sampling), which anchors count, masks without a background class. Boxes are x1, y1, x2, y2 in
pixels. Inside the heads class 0 is background; outside of ``Detector`` classes count from 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from raydc.config import UsageError
from raydc.models.backbone import Backbone, check_residual

DIVISOR = 32  # a side of what the backbone sees is a multiple of it
ANCHOR_SIZES = (32, 64, 128, 256, 512)  # square root of an anchor's area
ANCHOR_RATIOS = (0.5, 1.0, 2.0)  # height / width

# Proposals: anchors count as an object from IOU on, as background below; of those between, nearest to an object, from LEAST.
RPN_IOU, RPN_BACKGROUND_IOU, RPN_LEAST_IOU = 0.7, 0.3, 0.3
RPN_SAMPLES, RPN_POSITIVE = 256, 0.5  # anchors of an image in the loss, and the share of objects among them
RPN_NMS = 0.7
C4_BEFORE_NMS, C4_AFTER_NMS = {"training": 12000, "testing": 6000}, {"training": 2000, "testing": 1000}
FPN_BEFORE_NMS, FPN_AFTER_NMS = {"training": 2000, "testing": 1000}, {"training": 1000, "testing": 1000}  # before: a level

# Regions: the same for what the proposals become.
ROI_IOU = 0.5
ROI_SAMPLES, ROI_POSITIVE = 512, 0.25
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # 1 / the deviations .1, .1, .2, .2
SCORE, NMS, DETECTIONS = 0.05, 0.5, 100
C4_ROI, BOX_ROI, MASK_ROI = 14, 7, 14  # side of a pooled region

FPN_CHANNELS, HEAD_CONVS, HEAD_FEATURES = 256, 4, 1024
FPN_LEVELS = ("feature2", "feature3", "feature4", "feature5")
CANONICAL_SIDE, CANONICAL_LEVEL = 224, 4  # a region of this side is pooled from the map that is halved this many times
CLASS_STD, BOX_STD = 0.01, 0.001  # of the last layers' fresh weights
MASK_THRESHOLD = 0.5

Maps = dict[str, torch.Tensor]


def faster_rcnn_c4(backbone: Backbone, num_classes: int) -> Detector:
    """VOC's detector (protocol 6.1). Nothing is frozen. The backbone is taken over: its layer4 becomes the regions' head.

    UsageError for a backbone that is no residual network.
    """
    check_residual(backbone, "detection")
    channels, stride = _channels(backbone, "feature4"), _strides(backbone)["feature4"]
    head = _C4Head(backbone.layer4, _channels(backbone, "feature5"))
    backbone.layer4 = nn.Identity()
    rpn = _Rpn(_Anchors((ANCHOR_SIZES,), (stride,)), channels, C4_BEFORE_NMS, C4_AFTER_NMS, inside_only=True)
    predictor = _predictor(head.norm.num_features, num_classes)
    return Detector(backbone, ("feature4",), nn.Identity(), rpn, _Regions(RoIPool(C4_ROI, (stride,)), head, predictor))


def mask_rcnn_fpn(backbone: Backbone, num_classes: int) -> Detector:
    """COCO's detector with masks (protocol 6.2, 1x). Nothing is frozen.

    UsageError for a backbone that is no residual network.
    """
    check_residual(backbone, "detection")
    strides = tuple(_strides(backbone)[name] for name in FPN_LEVELS)
    anchors = _Anchors(tuple((size,) for size in ANCHOR_SIZES), (*strides, 2 * strides[-1]))
    rpn = _Rpn(anchors, FPN_CHANNELS, FPN_BEFORE_NMS, FPN_AFTER_NMS, inside_only=False)
    regions = _Regions(
        RoIPool(BOX_ROI, strides),
        _box_head(),
        _predictor(HEAD_FEATURES, num_classes),
        mask_roi_pool=RoIPool(MASK_ROI, strides),
        mask_head=MaskRCNNHeads(FPN_CHANNELS, [FPN_CHANNELS] * HEAD_CONVS, dilation=1, norm_layer=nn.BatchNorm2d),
        mask_predictor=_mask_predictor(num_classes),
    )
    return Detector(backbone, FPN_LEVELS, _pyramid([_channels(backbone, name) for name in FPN_LEVELS]), rpn, regions)


class Detector(nn.Module):
    """Images as they come, uint8 (3, h, w) of any sizes -> losses in train mode, detections in eval mode.

    Their sizes are final: neither resizing nor flips happen here; normalisation and Sobel are in the backbone.
    """

    def __init__(
        self, backbone: Backbone, levels: tuple[str, ...], neck: nn.Module, rpn: RegionProposalNetwork, regions: RoIHeads
    ) -> None:
        super().__init__()
        self.backbone, self.levels, self.neck, self.rpn, self.regions = backbone, levels, neck, rpn, regions
        self.num_classes = regions.box_predictor.cls_score.out_features - 1

    def forward(
        self,
        images: list[torch.Tensor],
        targets: list[dict[str, torch.Tensor]] | None = None,
        sizes: list[tuple[int, int]] | None = None,
    ) -> dict[str, torch.Tensor] | list[dict[str, torch.Tensor]]:
        """In train mode the losses, scalars, of ``targets``: boxes float32 (n, 4), labels int64 (n,) and for masks uint8
        (n, h, w), n may be 0. Else for each image boxes, labels, scores (at most 100, best first) and masks, bool (n, H, W),
        in pixels of ``sizes``, (H, W) an image had before it was resized. UsageError for targets that cannot be.
        """
        shapes = [tuple(image.shape[-2:]) for image in images]
        if self.training:
            targets = self._inside(targets, shapes)
        canvas = ImageList(self._canvas(images), shapes)
        maps = self._maps(canvas.tensors)
        proposals, losses = self.rpn(canvas, maps, targets)
        found, more = self.regions(maps, proposals, shapes, targets)
        if self.training:
            return losses | more
        return [_placed(one, shape, size) for one, shape, size in zip(found, shapes, sizes or shapes, strict=True)]

    def limit_regions(self, number: int) -> None:
        """Learn from ``number`` regions of an image (out of four times as many), test twice as many: less work."""
        self.regions.fg_bg_sampler.batch_size_per_image = number
        self.rpn._post_nms_top_n = {"training": 4 * number, "testing": 2 * number}

    def _maps(self, pixels: torch.Tensor) -> Maps:
        """In float32, whatever autocast made of them: boxes need it."""
        taps = self.backbone.taps(pixels)
        return {name: map.float() for name, map in self.neck({name: taps[name] for name in self.levels}).items()}

    def _canvas(self, images: list[torch.Tensor]) -> torch.Tensor:
        """float32 (N, 3, H, W); around an image is the mean colour, which the normalisation makes 0."""
        height, width = (_padded(max(image.shape[side] for image in images)) for side in (-2, -1))
        norm = self.backbone.norm
        canvas = (-norm.bias / norm.scale).repeat(len(images), 1, height, width)
        for one, image in zip(canvas, images, strict=True):
            one[:, : image.shape[-2], : image.shape[-1]] = image
        return canvas

    def _inside(self, targets: list[dict[str, torch.Tensor]] | None, shapes: list[tuple[int, int]]) -> list[dict]:
        """As the heads want them: labels from 1, and the image's size, by which the anchors tell what is outside."""
        if targets is None or len(targets) != len(shapes):
            raise ValueError(f"{len(shapes)} images train with as many targets, not {targets and len(targets)}")
        for number, (target, shape) in enumerate(zip(targets, shapes, strict=True)):
            _check_target(target, shape, self.num_classes, self.regions.has_mask(), number)
        return [one | {"labels": one["labels"] + 1, "size": shape} for one, shape in zip(targets, shapes, strict=True)]


def _check_target(target: dict, shape: tuple[int, int], num_classes: int, masked: bool, number: int) -> None:
    """What would otherwise train into NaN, or stop a GPU without a word."""
    boxes, labels = target["boxes"], target["labels"]
    if boxes.shape != (len(labels), 4):
        raise UsageError(
            f"image {number} of a batch has {len(labels)} labels and boxes of shape {tuple(boxes.shape)}; give 4 a label"
        )
    if not (boxes[:, 2:] > boxes[:, :2]).all() or not boxes.isfinite().all():
        raise UsageError(f"image {number} of a batch has a box without area; leave it out, or give x1 < x2 and y1 < y2")
    if ((labels < 0) | (labels >= num_classes)).any():
        raise UsageError(
            f"image {number} of a batch has labels {labels.min()} to {labels.max()}, the detector has {num_classes} classes "
            f"(0 to {num_classes - 1}); build it with the set's number of classes"
        )
    if masked and ("masks" not in target or target["masks"].shape != (len(labels), *shape)):
        given = tuple(target["masks"].shape) if "masks" in target else "missing"
        raise UsageError(f"masks of image {number} of a batch are {given}, not {(len(labels), *shape)}; give one an object")


def _padded(side: int) -> int:
    return -(-side // DIVISOR) * DIVISOR


# --- what the backbone is, read off its modules


def _strides(backbone: Backbone) -> dict[str, int]:
    """Pixels between neighbours in each map."""
    pool = backbone.maxpool
    stride, strides = backbone.conv1.stride[0] * (pool.stride if isinstance(pool, nn.MaxPool2d) else 1), {}
    for stage in range(1, 5):
        stride *= getattr(backbone, f"layer{stage}")[0].stride
        strides[f"feature{stage + 1}"] = stride
    return strides


def _channels(backbone: Backbone, tap: str) -> int:
    block = getattr(backbone, f"layer{int(tap[-1]) - 1}")[-1]
    return [module for module in block.modules() if isinstance(module, nn.Conv2d)][-1].out_channels


# --- proposals


class _Anchors(AnchorGenerator):
    """Of one list of sizes a level. torchvision's are rounded to whole pixels, their strides guessed from the maps' sides:
    61 in place of 64 where a map of 25 was halved to 13.
    """

    def __init__(self, sizes: tuple[tuple[int, ...], ...], strides: tuple[int, ...]) -> None:
        super().__init__(sizes, (ANCHOR_RATIOS,) * len(sizes))
        self.strides = strides

    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device=None) -> torch.Tensor:
        """(ratios x scales, 4) around 0, 0."""
        scales, ratios = (torch.tensor(values, dtype=dtype, device=device) for values in (scales, aspect_ratios))
        heights, widths = ((factor[:, None] * scales).flatten() for factor in (ratios.sqrt(), ratios.rsqrt()))
        return torch.stack([-widths, -heights, widths, heights], 1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[torch.Tensor]) -> list[torch.Tensor]:
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        grids = self.grid_anchors([map.shape[-2:] for map in feature_maps], [(stride, stride) for stride in self.strides])
        return [torch.cat(grids)] * len(image_list.image_sizes)


class _RpnHead(RPNHead):
    """In float32 also under autocast, whose 8 bits would make ties of thousands of scores.

    N(0, .01) and 0 are torchvision's own fresh weights.
    """

    def forward(self, x: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        with torch.autocast(x[0].device.type, enabled=False):
            return super().forward(x)


class _RpnMatcher(Matcher):
    """An object whose best anchors fall short of RPN_IOU takes them all the same, from RPN_LEAST_IOU on."""

    def set_low_quality_matches_(self, matches, all_matches, match_quality_matrix) -> None:
        best = match_quality_matrix.amax(1, keepdim=True)
        taken, anchors = torch.where((match_quality_matrix == best) & (best >= RPN_LEAST_IOU))
        matches.scatter_reduce_(0, anchors, taken, "amax", include_self=False)  # of two objects the later one takes it


class _Rpn(RegionProposalNetwork):
    """``inside_only``: anchors over the edge of their image are in no loss; else those with a middle beyond its padding."""

    def __init__(self, anchors: _Anchors, channels: int, before: dict, after: dict, *, inside_only: bool) -> None:
        head = _RpnHead(channels, anchors.num_anchors_per_location()[0])
        super().__init__(
            anchors, head, RPN_IOU, RPN_BACKGROUND_IOU, RPN_SAMPLES, RPN_POSITIVE, before, after, nms_thresh=RPN_NMS
        )
        self.proposal_matcher = _RpnMatcher(RPN_IOU, RPN_BACKGROUND_IOU, allow_low_quality_matches=True)
        self.inside_only = inside_only

    def assign_targets_to_anchors(self, anchors, targets) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Of each image: labels (1 object, 0 background, -1 in no loss) and the box that each anchor belongs to."""
        assigned = [self._assign(*one) for one in zip(anchors, targets, strict=True)]
        return [labels for labels, _ in assigned], [boxes for _, boxes in assigned]

    def _assign(self, anchors: torch.Tensor, target: dict) -> tuple[torch.Tensor, torch.Tensor]:
        labels, boxes = torch.full_like(anchors[:, 0], -1), torch.zeros_like(anchors)
        counted = torch.where(self._counted(anchors, target["size"]))[0]
        if len(counted):  # an image smaller than every anchor has none
            (labels[counted],), (boxes[counted],) = super().assign_targets_to_anchors([anchors[counted]], [target])
        return labels, boxes

    def _counted(self, anchors: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        low, high, (height, width) = anchors[:, :2], anchors[:, 2:], size
        if self.inside_only:
            return (low >= 0).all(1) & (high < high.new_tensor([width, height])).all(1)
        return ((low + high) / 2 < high.new_tensor([_padded(width), _padded(height)])).all(1)

    def compute_loss(self, objectness, pred_bbox_deltas, labels, regression_targets) -> tuple[torch.Tensor, torch.Tensor]:
        """Both are means over the sampled anchors of all images."""
        objects, background = (torch.where(torch.cat(part))[0] for part in self.fg_bg_sampler(labels))
        sampled, goals = torch.cat([objects, background]), torch.cat(regression_targets)
        number = max(len(sampled), 1)
        scores = objectness.flatten()[sampled]
        entropy = F.binary_cross_entropy_with_logits(scores, torch.cat(labels)[sampled], reduction="sum")
        return entropy / number, F.l1_loss(pred_bbox_deltas[objects], goals[objects], reduction="sum") / number


# --- regions


class RoIPool(nn.Module):
    """Regions of the maps -> (K, C, size, size): RoIAlign, aligned, with as many samples as a region has cells.

    With several maps each region is read from the one that fits its size (Lin et al. 2017, equation 1).
    """

    def __init__(self, size: int, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.size, self.strides = size, strides

    def forward(self, maps: Maps, boxes: list[torch.Tensor], image_shapes: list[tuple[int, int]]) -> torch.Tensor:
        """``boxes`` are (k, 4) of each image, in pixels; maps beyond those that have a stride are not read."""
        index = torch.cat([torch.full_like(one[:, :1], number) for number, one in enumerate(boxes)])
        regions, maps = torch.cat([index, torch.cat(boxes)], 1), list(maps.values())
        if len(self.strides) == 1:
            return self._pool(maps[0], regions, self.strides[0])
        levels = self.levels(regions[:, 1:])
        pooled = maps[0].new_zeros(len(regions), maps[0].shape[1], self.size, self.size)
        for level, stride in enumerate(self.strides):
            chosen = torch.where(levels == level)[0]
            pooled[chosen] = self._pool(maps[level], regions[chosen], stride)
        return pooled

    def _pool(self, map: torch.Tensor, regions: torch.Tensor, stride: int) -> torch.Tensor:
        return roi_align(map, regions, self.size, spatial_scale=1 / stride, sampling_ratio=0, aligned=True)

    def levels(self, boxes: torch.Tensor) -> torch.Tensor:
        """Number of the map of each box, from 0; of several the first is the one that is halved twice (feature2)."""
        sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        halved = (CANONICAL_LEVEL + torch.log2(sides / CANONICAL_SIDE)).floor()
        return (halved - 2).clamp(0, len(self.strides) - 1).long()


class _Regions(RoIHeads):
    """Head of the regions, with masks where it is given their layers.

    The reference's Mask R-CNN also lets an object's best region count below ROI_IOU. Objects are themselves among the
    proposals, so that could only pick a region of the same overlap; it is left out.
    """

    def __init__(self, pool: RoIPool, head: nn.Module, predictor: FastRCNNPredictor, **masks: nn.Module) -> None:
        super().__init__(
            pool, head, predictor, ROI_IOU, ROI_IOU, ROI_SAMPLES, ROI_POSITIVE, BOX_WEIGHTS, SCORE, NMS, DETECTIONS, **masks
        )

    def forward(self, features: Maps, proposals, image_shapes, targets=None) -> tuple[list[dict], dict[str, torch.Tensor]]:
        """Detections of each image and no losses, or the other way round."""
        if self.training:
            return [], self._losses(features, proposals, image_shapes, targets)
        logits, deltas = self._classify(features, proposals, image_shapes)
        boxes, scores, labels = self.postprocess_detections(logits, deltas, proposals, image_shapes)
        found = [
            {"boxes": box, "labels": label - 1, "scores": score}
            for box, label, score in zip(boxes, labels, scores, strict=True)
        ]
        return self._with_masks(features, found, image_shapes) if self.has_mask() else found, {}

    def _classify(self, maps: Maps, boxes, shapes) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = self.box_head(self.box_roi_pool(maps, boxes, shapes))
        with torch.autocast(pooled.device.type, enabled=False):  # scores in float32, for the same reason as the RPN's
            return self.box_predictor(pooled.float())

    def _losses(self, maps: Maps, proposals, shapes, targets) -> dict[str, torch.Tensor]:
        boxes, matched, labels, goals = self.select_training_samples(proposals, targets)
        logits, deltas = self._classify(maps, boxes, shapes)
        entropy, distance = region_losses(logits, deltas, torch.cat(labels), torch.cat(goals))
        losses = {"loss_classifier": entropy, "loss_box_reg": distance}
        if self.has_mask():
            masks = [target["masks"] for target in targets]
            losses["loss_mask"] = self._mask_loss(maps, boxes, matched, labels, masks, shapes)
        return losses

    def _mask_loss(self, maps: Maps, boxes, matched, labels, masks, shapes) -> torch.Tensor:
        """Of the regions that are objects. Where there are none the layers still run, on one region an image: under DDP the
        other ranks wait for this one's gradients and statistics.
        """
        chosen = [torch.where(one > 0)[0] for one in labels]
        empty = not any(len(one) for one in chosen)
        regions = [box[:1] if empty else box[one] for box, one in zip(boxes, chosen, strict=True)]
        logits = self._mask_logits(maps, regions, shapes)
        if empty:
            return logits.sum() * 0
        of_image = zip(masks, matched, regions, chosen, strict=True)
        goals = torch.cat(
            [mask_targets(mask, of[one], box, logits.shape[-1]) for mask, of, box, one in of_image if len(one)]
        )
        classes = torch.cat([label[one] for label, one in zip(labels, chosen, strict=True)]) - 1
        return F.binary_cross_entropy_with_logits(_of_class(logits, classes), goals)

    def _mask_logits(self, maps: Maps, boxes, shapes) -> torch.Tensor:
        """(K, classes, 28, 28)."""
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(maps, boxes, shapes))).float()

    def _with_masks(self, maps: Maps, found: list[dict], shapes) -> list[dict]:
        """Adds float (n, 28, 28), each the probabilities inside its box."""
        logits = self._mask_logits(maps, [one["boxes"] for one in found], shapes)
        masks = _of_class(logits, torch.cat([one["labels"] for one in found])).sigmoid()
        parts = masks.split([len(one["labels"]) for one in found])
        return [one | {"masks": part} for one, part in zip(found, parts, strict=True)]


def _of_class(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    return logits[torch.arange(len(classes), device=classes.device), classes]


def region_losses(logits, deltas, labels, goals) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of logits (K, 1 + classes), and L1 of deltas (K, 4 (1 + classes)) at each object's own class; both are
    sums divided by K, which counts background too.
    """
    number, objects = max(len(labels), 1), torch.where(labels > 0)[0]
    own = deltas.reshape(len(labels), -1, 4)[objects, labels[objects]]
    entropy = F.cross_entropy(logits, labels, reduction="sum")
    return entropy / number, F.l1_loss(own, goals[objects], reduction="sum") / number


def mask_targets(masks: torch.Tensor, objects: torch.Tensor, boxes: torch.Tensor, side: int) -> torch.Tensor:
    """What uint8 (n, h, w) ``masks`` of ``objects`` (k,) show inside ``boxes`` (k, 4): float (k, side, side) of 0 and 1."""
    regions = torch.cat([objects[:, None].to(boxes), boxes], 1)
    parts = roi_align(masks[:, None].to(boxes), regions, side, sampling_ratio=0, aligned=True)
    return (parts[:, 0] >= MASK_THRESHOLD).to(boxes)


# --- detections in the pixels that were asked for


def _placed(found: dict, shape: tuple[int, int], size: tuple[int, int]) -> dict:
    down, right = size[0] / shape[0], size[1] / shape[1]
    boxes = found["boxes"] * found["boxes"].new_tensor([right, down, right, down])
    if "masks" in found:
        return found | {"boxes": boxes, "masks": paste(found["masks"], boxes, size)}
    return found | {"boxes": boxes}


def paste(masks: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Probabilities (n, side, side) inside boxes -> bool (n, H, W)."""
    pasted = torch.zeros(len(masks), *size, dtype=torch.bool, device=masks.device)
    for whole, mask, box, corners in zip(pasted, masks, boxes, boxes.tolist(), strict=True):
        left, top = (max(int(corner), 0) for corner in corners[:2])
        part = whole[top : int(corners[3]) + 1, left : int(corners[2]) + 1]
        y, x = (
            (torch.arange(length, device=box.device) + first + 0.5 - box[axis]) / (box[axis + 2] - box[axis]) * 2 - 1
            for length, first, axis in ((part.shape[0], top, 1), (part.shape[1], left, 0))
        )
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
        part[:] = F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0] >= MASK_THRESHOLD
    return pasted


# --- layers, with the fresh weights of the reference


class _C4Head(nn.Module):
    """(K, C, 14, 14) -> (K, features): the backbone's last stage, one more BatchNorm, the average."""

    def __init__(self, layer4: nn.Module, features: int) -> None:
        super().__init__()
        self.layer4, self.norm = layer4, nn.BatchNorm2d(features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layer4(x)).mean((2, 3))


def _pyramid(channels: list[int]) -> FeaturePyramidNetwork:
    pyramid = FeaturePyramidNetwork(channels, FPN_CHANNELS, LastLevelMaxPool(), norm_layer=nn.BatchNorm2d)
    for module in pyramid.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
    return pyramid


def _box_head() -> FastRCNNConvFCHead:
    inputs, convs = (FPN_CHANNELS, BOX_ROI, BOX_ROI), [FPN_CHANNELS] * HEAD_CONVS
    head = FastRCNNConvFCHead(inputs, convs, [HEAD_FEATURES], norm_layer=nn.BatchNorm2d)
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return head


def _predictor(features: int, num_classes: int) -> FastRCNNPredictor:
    predictor = FastRCNNPredictor(features, num_classes + 1)
    for layer, std in ((predictor.cls_score, CLASS_STD), (predictor.bbox_pred, BOX_STD)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    return predictor


def _mask_predictor(num_classes: int) -> MaskRCNNPredictor:
    """One map a class, none for background; its weights are Kaiming-normal over fan_out from torchvision."""
    predictor = MaskRCNNPredictor(FPN_CHANNELS, FPN_CHANNELS, num_classes)
    for layer in (predictor.conv5_mask, predictor.mask_fcn_logits):
        nn.init.zeros_(layer.bias)
    return predictor
