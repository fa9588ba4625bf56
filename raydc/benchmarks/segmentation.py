"""Semantic segmentation: FCN on a dilated backbone, fine-tuned as a whole; mIoU (protocol 7)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from raydc.benchmarks import augment, dense, masks, pictures
from raydc.benchmarks.dense import Problem, Sample, Schedule, read_pixels
from raydc.benchmarks.features import image_files
from raydc.benchmarks.masks import SegmentationSet, check_labels, read_labels
from raydc.benchmarks.options import Segmentation
from raydc.benchmarks.precision import confusion, mean_iou, per_class
from raydc.benchmarks.scorecard import Row
from raydc.benchmarks.setting import Candidate
from raydc.models.backbone import Backbone
from raydc.models.fcn import FCN, predict, segmentation_loss
from raydc.training import Compute


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A protocol. Sizes in pixels; ``scale`` is (long, short); ``window`` 0 tests images as a whole."""

    data: str
    read: Callable[[str], dict[str, SegmentationSet]]
    schedule: Schedule
    crop: int
    scale: tuple[int, int]
    window: int = 0
    stride: int = 0
    align_corners: bool = False

    def at(self, crop: int) -> Preset:
        """All sizes in proportion; 0: as it is."""
        factor = crop / self.crop if crop else 1
        long, short = (max(1, round(side * factor)) for side in self.scale)
        sizes = {"window": round(self.window * factor), "stride": round(self.stride * factor)}
        return replace(self, crop=round(self.crop * factor), scale=(long, short), **sizes)


def _poly(iterations: int, batch_size: int) -> Schedule:
    return Schedule(
        iterations=iterations, batch_size=batch_size, rounds=10, lr=0.01, weight_decay=5e-4, power=0.9, least=1e-4
    )


PRESETS = {
    "voc12aug_fcn_20k": Preset(
        data="voc12aug",
        read=masks.read_voc12_aug,
        schedule=_poly(20_000, 16),
        crop=512,
        scale=(2048, 512),
    ),
    "cityscapes_fcn_40k": Preset(
        data="cityscapes",
        read=masks.read_cityscapes,
        schedule=_poly(40_000, 8),
        crop=769,
        scale=(2049, 1025),
        window=769,
        stride=513,
        align_corners=True,
    ),
    # No published protocol: our choice, for images of 480 x 360.
    "camvid_fcn": Preset(data="camvid", read=masks.read_camvid, schedule=_poly(8_000, 8), crop=352, scale=(480, 360)),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class SegmentationProblem(Problem):
    """K classes; ``fill``: the backbone's mean colour."""

    train: SegmentationSet
    test: SegmentationSet
    preset: Preset
    fill: tuple[int, int, int]
    fixed_shapes: ClassVar[bool] = True

    @property
    def columns(self) -> tuple[str, ...]:
        return ("mIoU",)

    def training_sample(self, image_id: int, seed: int) -> Sample:
        pixels, labels = _read(self.train, image_id)
        size = {"scale": self.preset.scale, "crop": self.preset.crop, "fill": self.fill}
        pixels, labels = augment.segmentation_train(pixels, labels, **size, seed=seed)
        return {"pixels": pixels, "labels": labels}

    def test_sample(self, image_id: int) -> Sample:
        pixels, labels = _read(self.test, image_id)
        return {"pixels": augment.segmentation_test(pixels, scale=self.preset.scale), "labels": labels}

    def network(self, backbone: Backbone) -> nn.Module:
        return FCN(backbone, len(self.train.classes), align_corners=self.preset.align_corners)

    def loss(self, model: nn.Module, samples: list[Sample], compute: Compute) -> torch.Tensor:
        pixels, labels = (torch.stack([sample[key] for sample in samples]) for key in ("pixels", "labels"))
        return segmentation_loss(model(compute.place(pixels)), labels.to(compute.device))

    def find(self, model: nn.Module, sample: Sample, compute: Compute) -> np.ndarray:
        """Pixels by true and predicted class."""
        predicted = self._predict(model, sample, compute)
        return confusion(predicted.numpy(), sample["labels"].numpy(), len(self.test.classes))

    def _predict(self, model: nn.Module, sample: Sample, compute: Compute) -> torch.Tensor:
        """uint8 of the labels' size."""
        window = {"window": self.preset.window, "stride": self.preset.stride}
        return predict(model, sample["pixels"].to(compute.device), tuple(sample["labels"].shape), **window).cpu()

    def picture(self, model: nn.Module, image_id: int, compute: Compute) -> torch.Tensor:
        pixels, sample = _read(self.test, image_id)[0], self.test_sample(image_id)
        both = (sample["labels"], self._predict(model, sample, compute))
        return pictures.pair(*(pictures.with_classes(pixels, labels, len(self.test.classes)) for labels in both))

    def figures(self, found: list[np.ndarray]) -> dict[str, float]:
        """mIoU, and the IoU of each class that the images show."""
        matrix = np.sum(found, axis=0)
        ious = zip(self.test.classes, per_class(matrix), strict=True)
        return {"mIoU": mean_iou(matrix)} | {name: float(iou) for name, iou in ious if np.isfinite(iou)}


def _read(dataset: SegmentationSet, image_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = read_pixels(dataset.folder, dataset.images[image_id])
    return pixels, torch.from_numpy(read_labels(dataset, image_id, size=tuple(pixels.shape[-2:])))


def run(options: Segmentation, candidate: Candidate) -> list[Row]:
    """The rows of the scorecard."""
    candidate.check_residual("segmentation")
    published = PRESETS[options.preset]
    preset = published.at(options.crop_size)
    sets = preset.read(options.data)
    for dataset in sets.values():
        check_labels(dataset)
    problem = SegmentationProblem(
        schedule=preset.schedule.given(options),
        num_train=len(sets["train"].images),
        num_test=len(sets["val"].images),
        train=sets["train"],
        test=sets["val"],
        preset=preset,
        fill=tuple(round(255 * mean) for mean in candidate.model.mean),
    )
    changed = problem.schedule.differences(published.schedule)
    changed += [f"crops of {preset.crop} instead of {published.crop} pixels"] if preset.crop != published.crop else []
    more = [note for dataset in sets.values() for note in dataset.notes]
    return dense.score(
        options, candidate, problem, sets, _fingerprint, "segmentation", published.data, changed=changed, more=more
    )


def _fingerprint(dataset: SegmentationSet) -> str:
    return image_files(dataset.folder, dataset.split, [*dataset.images, *dataset.labels]).fingerprint
