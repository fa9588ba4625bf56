"""Object detection: Faster R-CNN C4 on VOC, Mask R-CNN FPN on COCO, fine-tuned as a whole (protocol 6)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from raydc.benchmarks import augment, dense, pictures
from raydc.benchmarks.annotations import AnnotatedImage
from raydc.benchmarks.boxes import DetectionSet, check_images, decode_masks, read_coco, read_voc_detection
from raydc.benchmarks.dense import Problem, Sample, Schedule, read_pixels
from raydc.benchmarks.options import Detection
from raydc.benchmarks.precision import Detections, coco_precision, encode, voc07_precision
from raydc.benchmarks.scorecard import Row
from raydc.benchmarks.setting import Candidate
from raydc.config import UsageError
from raydc.models.backbone import Backbone
from raydc.models.detector import Detector, faster_rcnn_c4, mask_rcnn_fpn
from raydc.training import Compute

COCO_COLUMNS = ("AP", "AP50", "AP75")
MASK_COLUMNS = ("mask AP", "mask AP50", "mask AP75")
VOC_COLUMNS = ("VOC07 AP", "VOC07 AP50", "VOC07 AP75")
LIKELY = 0.5  # score from which a detection is drawn


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A protocol. Sizes in pixels; ``epochs``: the schedule's length where it follows the number of images, else 0."""

    data: str
    splits: tuple[str, str]
    read: Callable[[str, str], DetectionSet]
    detector: Callable[[Backbone, int], Detector]
    schedule: Schedule
    epochs: int
    short_sides: tuple[int, ...]
    columns: tuple[str, ...]
    test_side: int = 800
    long_side: int = 1333

    @property
    def masked(self) -> bool:
        return "mask AP" in self.columns

    def at(self, min_size: int) -> Preset:
        """All sizes in proportion; 0: as it is."""
        factor = min_size / self.test_side if min_size else 1
        sides = tuple(round(side * factor) for side in self.short_sides)
        return replace(
            self, short_sides=sides, test_side=round(self.test_side * factor), long_side=round(self.long_side * factor)
        )


def _read_voc(folder: str, split: str) -> DetectionSet:
    return read_voc_detection(folder, split=split)


PRESETS = {
    "voc0712_faster_rcnn_c4": Preset(
        data="voc0712",
        splits=("trainval", "test"),
        read=_read_voc,
        detector=faster_rcnn_c4,
        schedule=Schedule(
            iterations=24_000,
            batch_size=16,
            rounds=12,
            lr=0.02,
            weight_decay=1e-4,
            warmup=100,
            milestones=(18_000, 22_000),
        ),
        epochs=0,
        short_sides=tuple(range(480, 801, 32)),
        columns=(*VOC_COLUMNS, *COCO_COLUMNS),
    ),
    "coco_mask_rcnn_fpn_1x": Preset(
        data="coco",
        splits=("train", "val"),
        read=read_coco,
        detector=mask_rcnn_fpn,
        # 12 epochs of the 117,266 images with an object, steps after 8 and 11.
        schedule=Schedule(
            iterations=12 * 7_330,
            batch_size=16,
            rounds=12,
            lr=0.02,
            weight_decay=1e-4,
            warmup=1000,
            milestones=(8 * 7_330, 11 * 7_330),
        ),
        epochs=12,
        short_sides=tuple(range(640, 801, 32)),
        columns=(*COCO_COLUMNS, *MASK_COLUMNS),
    ),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class DetectionProblem(Problem):
    """``wanted``: the training images with an object to learn from; crowds and difficult ones are none."""

    train: DetectionSet
    test: DetectionSet
    wanted: np.ndarray
    preset: Preset
    regions: int = 0
    fixed_shapes: ClassVar[bool] = False

    @property
    def columns(self) -> tuple[str, ...]:
        return self.preset.columns

    def training_sample(self, image_id: int, seed: int) -> Sample:
        image = self.train.images[self.wanted[image_id]]
        kept = learnable(image)
        pixels = _read(self.train, image)
        boxes, labels = torch.from_numpy(image.boxes[kept]), torch.from_numpy(image.labels[kept])
        masks = torch.from_numpy(decode_masks(image)[kept]) if self.preset.masked else None
        sizes = {"short_sides": self.preset.short_sides, "long_side": self.preset.long_side}
        pixels, boxes, labels, masks = augment.detection_train(pixels, boxes, labels, masks, **sizes, seed=seed)
        sample = {"pixels": pixels, "boxes": boxes, "labels": labels}
        return sample if masks is None else sample | {"packed": torch.from_numpy(np.packbits(masks.numpy(), axis=2))}

    def test_sample(self, image_id: int) -> Sample:
        pixels = _read(self.test, self.test.images[image_id])
        size = torch.tensor(pixels.shape[-2:])
        pixels = augment.detection_test(pixels, short_side=self.preset.test_side, long_side=self.preset.long_side)
        return {"pixels": pixels, "size": size}

    def network(self, backbone: Backbone) -> nn.Module:
        detector = self.preset.detector(backbone, len(self.train.classes))
        if self.regions:
            detector.limit_regions(self.regions)
        return detector

    def loss(self, model: nn.Module, samples: list[Sample], compute: Compute) -> torch.Tensor:
        """The sum of the detector's losses, each with weight 1."""
        targets = [_target(sample, compute.device) for sample in samples]
        losses = model([sample["pixels"].to(compute.device) for sample in samples], targets)
        return sum(losses.values())

    def find(self, model: nn.Module, sample: Sample, compute: Compute) -> Detections:
        found = self._detect(model, sample, compute)
        arrays = {key: found[key].numpy() for key in ("boxes", "scores", "labels")}
        return Detections(**arrays, masks=encode(found["masks"].numpy()) if self.preset.masked else None)

    def _detect(self, model: nn.Module, sample: Sample, compute: Compute) -> Sample:
        (found,) = model([sample["pixels"].to(compute.device)], sizes=[tuple(sample["size"].tolist())])
        return {key: value.cpu() for key, value in found.items()}

    def picture(self, model: nn.Module, image_id: int, compute: Compute) -> torch.Tensor:
        """Without detections that are unlikely."""
        image = self.test.images[image_id]
        pixels, found = _read(self.test, image), self._detect(model, self.test_sample(image_id), compute)
        kept = found["scores"] >= LIKELY
        masks = (torch.from_numpy(decode_masks(image)).bool(), found["masks"][kept]) if self.preset.masked else (None, None)
        names = self.test.classes
        truth = pictures.with_boxes(pixels, torch.tensor(image.boxes), image.labels.tolist(), names, masks[0])
        answer = pictures.with_boxes(pixels, found["boxes"][kept], found["labels"][kept].tolist(), names, masks[1])
        return pictures.pair(truth, answer)

    def figures(self, found: list[Detections]) -> dict[str, float]:
        figures = coco_precision(found, self.test.images, masks=self.preset.masked)
        if self.columns[0] in VOC_COLUMNS:
            figures |= voc07_precision(found, self.test.images, len(self.test.classes))
        return figures


def learnable(image: AnnotatedImage) -> np.ndarray:
    """bool (n,): the objects that are asked for."""
    return ~(image.crowd | image.difficult)


def _read(dataset: DetectionSet, image: AnnotatedImage) -> torch.Tensor:
    return read_pixels(dataset.folder, image.path)


def _target(sample: Sample, device: torch.device) -> Sample:
    target = {key: sample[key].to(device) for key in ("boxes", "labels")}
    if "packed" in sample:
        bits = sample["packed"].to(device)[..., None] >> torch.arange(7, -1, -1, device=device, dtype=torch.uint8) & 1
        target["masks"] = bits.flatten(-2)[..., : sample["pixels"].shape[-1]]
    return target


def run(options: Detection, candidate: Candidate) -> list[Row]:
    """The rows of the scorecard."""
    candidate.check_residual("detection")
    published = PRESETS[options.preset]
    preset = published.at(options.min_size)
    sets = {split: preset.read(options.data, split) for split in preset.splits}
    train, test = sets.values()
    if train.classes != test.classes:
        raise UsageError(
            f"{train.folder.uri}: {train.split} and {test.split} list other classes, or in another order; give annotations "
            "of one set"
        )
    wanted, _ = map(_wanted, (train, test))
    schedule = preset.schedule.given(options)
    if preset.epochs and not options.max_iters:
        steps = preset.epochs * -(-len(wanted) // schedule.batch_size)
        schedule = preset.schedule.given(replace(options, max_iters=steps))
    problem = DetectionProblem(
        schedule=schedule,
        num_train=len(wanted),
        num_test=len(test.images),
        train=train,
        test=test,
        wanted=wanted,
        preset=preset,
        regions=options.regions,
    )
    changed = schedule.differences(published.schedule)
    changed += [f"short side {preset.test_side} instead of {published.test_side} pixels"] if options.min_size else []
    changed += [f"{options.regions} instead of 512 regions an image"] if options.regions else []
    left_out = len(train.images) - len(wanted)
    changed += ["anchors of 32 to 512 pixels all the same"] if options.min_size else []
    more = [f"{left_out:,} training images without an object to learn from are left out"] if left_out else []
    more += [f"{split}: {note}" for split, one in sets.items() for note in one.notes]
    return dense.score(
        options, candidate, problem, sets, _fingerprint, "detection", published.data, changed=changed, more=more
    )


def _wanted(dataset: DetectionSet) -> np.ndarray:
    """The images with an object that is asked for. UsageError where there is none, or an image cannot be read."""
    wanted = np.flatnonzero([learnable(image).any() for image in dataset.images])
    if not len(wanted):
        raise UsageError(
            f"no image of {dataset.folder.uri}, {dataset.split}, has an object that is asked for (crowds and difficult "
            "ones are not); give annotations with objects"
        )
    check_images(dataset)
    return wanted


def _fingerprint(dataset: DetectionSet) -> str:
    """Of names and objects."""
    digest = hashlib.blake2b(digest_size=16)
    for image in dataset.images:
        digest.update(f"{image.path} {image.height} {image.width}".encode())
        for values in (image.boxes, image.labels, image.crowd, image.difficult):
            digest.update(values.tobytes())
        for mask in image.masks or ():
            for part in mask if isinstance(mask, tuple) else (mask,):
                digest.update(part.tobytes())
    return digest.hexdigest()
