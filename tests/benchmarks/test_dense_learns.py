"""Detection and segmentation can learn: trained and tested on the same eight real images, they find what is there."""

import json
import shutil

import numpy as np
import pytest

from raydc import checkpoint
from raydc.benchmarks import detection, segmentation
from raydc.benchmarks.boxes import AnnotatedImage, read_coco, read_voc_detection
from raydc.benchmarks.options import Detection, Segmentation
from raydc.benchmarks.setting import open_backbone
from raydc.config import Config, ImagesConfig, ModelConfig
from raydc.models.backbone import build_backbone
from raydc.storage import Folder

pytestmark = pytest.mark.slow
NUM_IMAGES = 8
SIDE = 160  # short side of the images, in pixels
LEAST = 32  # pixels: every object is larger at that size


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """ResNet-18 of a quarter's width, with fresh weights."""
    place = tmp_path_factory.mktemp("learns") / "backbone"
    model = ModelConfig(architecture="resnet18", width=16)
    checkpoint.save_backbone(Folder(place), build_backbone(model, 0), Config(model=model, images=ImagesConfig()))
    return open_backbone(str(place))


def is_large(image: AnnotatedImage) -> bool:
    """Whether it has objects, and none that is small, difficult or a crowd."""
    sides = (image.boxes[:, 2:] - image.boxes[:, :2]) * SIDE / min(image.height, image.width)
    return len(sides) > 0 and bool(sides.min() > LEAST) and not (image.difficult | image.crowd).any()


def options(cls, run_dir, data, **more):
    return cls(backbone="", data=str(data), run_dir=str(run_dir), num_workers=0, **more)


def test_boxes_of_voc(real_data, backbone, tmp_path):
    real = read_voc_detection(real_data / "voc07" / "VOCdevkit")
    names = [image.path.rpartition("/")[2][:-4] for image in real.images if is_large(image)][:NUM_IMAGES]
    devkit, lists = real_data / "voc07" / "VOCdevkit" / "VOC2007", tmp_path / "VOC2007" / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for folder in ("JPEGImages", "Annotations"):
        (tmp_path / "VOC2007" / folder).symlink_to(devkit / folder)
    for split in ("trainval", "test"):
        (lists / f"{split}.txt").write_text("\n".join(names))
    few = {"max_iters": 400, "batch_size": 4, "min_size": SIDE, "regions": 64}
    asked = options(Detection, tmp_path / "run", tmp_path, preset="voc0712_faster_rcnn_c4", **few)
    figures = {row.column: row.value for row in detection.run(asked, backbone)}
    print(figures)
    assert figures["VOC07 AP50"] >= 90 and figures["AP50"] >= 90


def test_boxes_and_masks_of_coco(real_data, backbone, tmp_path):
    real = read_coco(real_data / "coco", "train")
    large = [number for number, image in enumerate(real.images) if is_large(image)][:NUM_IMAGES]
    content = json.loads((real_data / "coco" / "annotations" / "instances_train2017.json").read_text())
    content["images"] = [content["images"][number] for number in large]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] in ids]
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"{split}2017").symlink_to(real_data / "coco" / "train2017")
        (tmp_path / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    few = {"max_iters": 600, "batch_size": 2, "min_size": SIDE, "regions": 32}
    asked = options(Detection, tmp_path / "run", tmp_path, preset="coco_mask_rcnn_fpn_1x", **few)
    figures = {row.column: row.value for row in detection.run(asked, backbone)}
    print(figures)
    assert figures["AP50"] >= 90 and figures["mask AP50"] >= 70


def test_masks_of_voc(real_data, tmp_path):
    from PIL import Image

    devkit = next(place for place in (real_data / "voc12seg").rglob("VOC2012") if (place / "JPEGImages").exists())

    def smallest(name: str) -> float:
        """Share of the image that its smallest class covers."""
        ids = np.array(Image.open(devkit / "SegmentationClass" / f"{name}.png"))
        return min((ids == one).mean() for one in np.unique(ids) if one not in (0, 255))

    names = (devkit / "ImageSets" / "Segmentation" / "train.txt").read_text().split()
    names = sorted(names, key=smallest, reverse=True)[:NUM_IMAGES]
    lists = tmp_path / "VOC2012" / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for folder in ("JPEGImages", "SegmentationClass"):
        (tmp_path / "VOC2012" / folder).mkdir()
        for name in names:
            (file,) = (devkit / folder).glob(f"{name}.*")
            shutil.copy(file, tmp_path / "VOC2012" / folder)
    for split in ("train", "val"):
        (lists / f"{split}.txt").write_text("\n".join(names))
    model = ModelConfig(architecture="resnet18", width=32)
    checkpoint.save_backbone(Folder(tmp_path / "net"), build_backbone(model, 0), Config(model=model, images=ImagesConfig()))
    few = {"max_iters": 1200, "batch_size": 8, "crop_size": 128}
    asked = options(Segmentation, tmp_path / "run", tmp_path / "VOC2012", preset="voc12aug_fcn_20k", **few)
    (row,) = segmentation.run(asked, open_backbone(str(tmp_path / "net")))
    print(row.value)
    assert row.value >= 90
