"""Detection and segmentation from real images to a row: the published numbers, resuming, workers, and bad input."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raydc import checkpoint
from raydc.benchmarks import dense, detection, segmentation
from raydc.benchmarks.dense import Order
from raydc.benchmarks.options import Detection, Segmentation
from raydc.benchmarks.setting import open_backbone
from raydc.config import Config, ImagesConfig, ModelConfig, RunError, UsageError
from raydc.models.backbone import build_backbone
from raydc.storage import Folder

pytestmark = pytest.mark.usefixtures("one_thread")
VOC, COCO = detection.PRESETS["voc0712_faster_rcnn_c4"], detection.PRESETS["coco_mask_rcnn_fpn_1x"]
AUG, CITIES, CAMVID = (segmentation.PRESETS[name] for name in ("voc12aug_fcn_20k", "cityscapes_fcn_40k", "camvid_fcn"))


# --- the numbers of protocols 6 and 7 -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "iterations", "batch_size", "weight_decay", "rates"),
    [
        (VOC.schedule, 24_000, 16, 1e-4, {0: 2e-5, 100: 0.02, 17_999: 0.02, 18_000: 0.002, 22_000: 2e-4, 23_999: 2e-4}),
        (COCO.schedule, 87_960, 16, 1e-4, {0: 2e-5, 500: 0.01001, 1000: 0.02, 58_640: 0.002, 80_630: 2e-4}),
        (AUG.schedule, 20_000, 16, 5e-4, {0: 0.01, 10_000: 1e-4 + 0.0099 * 0.5**0.9, 20_000: 1e-4}),
        (CITIES.schedule, 40_000, 8, 5e-4, {0: 0.01, 30_000: 1e-4 + 0.0099 * 0.25**0.9, 40_000: 1e-4}),
    ],
)
def test_schedules_are_the_published_ones(schedule, iterations, batch_size, weight_decay, rates):
    assert (schedule.iterations, schedule.batch_size, schedule.weight_decay) == (iterations, batch_size, weight_decay)
    assert {iteration: schedule.rate(iteration) for iteration in rates} == pytest.approx(rates)


def test_sizes_and_tests_are_the_published_ones():
    assert VOC.short_sides == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert COCO.short_sides == (640, 672, 704, 736, 768, 800)
    assert {(one.test_side, one.long_side) for one in (VOC, COCO)} == {(800, 1333)}
    assert COCO.epochs == 12 and COCO.masked and not VOC.masked
    assert (AUG.crop, AUG.scale, AUG.window, AUG.align_corners) == (512, (2048, 512), 0, False)
    assert (CITIES.crop, CITIES.scale, CITIES.window, CITIES.stride) == (769, (2049, 1025), 769, 513)
    assert CITIES.align_corners
    assert (VOC.schedule.rounds, AUG.schedule.rounds, CITIES.schedule.rounds) == (12, 10, 10)  # each 2,000, 2,000, 4,000


def test_a_smaller_size_keeps_proportions():
    assert VOC.at(200).short_sides[::5] == (120, 160, 200) and VOC.at(200).long_side == 333
    half = CITIES.at(385)
    assert (half.crop, half.scale, half.window, half.stride) == (385, (1026, 513), 385, 257)


def test_fewer_iterations_keep_the_shape_of_the_schedule(tmp_path):
    short = VOC.schedule.given(options(Detection, tmp_path, preset="voc0712_faster_rcnn_c4", max_iters=240, batch_size=2))
    assert [short.rate(iteration) for iteration in (0, 1, 180, 220)] == pytest.approx([2e-5, 0.02, 0.002, 2e-4])
    assert short.ends == list(range(20, 241, 20))
    assert short.differences(VOC.schedule) == ["240 instead of 24,000 iterations", "2 instead of 16 images a batch"]
    few = VOC.schedule.given(options(Detection, tmp_path, preset="voc0712_faster_rcnn_c4", max_iters=5, rounds=3))
    assert few.ends == [1, 3, 5] and [few.steps(number) for number in range(3)] == [1, 2, 2]


def test_every_image_comes_once_before_any_comes_again():
    order = Order(3, 7)
    ids, draws = order(np.arange(21))
    assert [sorted(ids[start : start + 7].tolist()) for start in (0, 7, 14)] == [list(range(7))] * 3
    assert draws.tolist() == [0] * 7 + [1] * 7 + [2] * 7
    assert ids[:7].tolist() != ids[7:14].tolist()
    np.testing.assert_array_equal(order(np.array([5, 12]))[0], ids[[5, 12]])  # wherever a start begins


# --- real images, a network of seconds ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> str:
    place = tmp_path_factory.mktemp("dense") / "backbone"
    model = ModelConfig(architecture="resnet10", width=8)
    config = Config(model=model, images=ImagesConfig())
    checkpoint.save_backbone(Folder(place), build_backbone(model, 0), config)
    return str(place)


@pytest.fixture(scope="module")
def streets(real_data, tmp_path_factory) -> str:
    """Six training images of CamVid, and two to test on."""
    place = tmp_path_factory.mktemp("streets") / "camvid"
    place.mkdir()
    for name, number in (("train", 6), ("val", 2)):
        lines = (real_data / "camvid" / f"{name}.txt").read_text().splitlines()[:number]
        (place / f"{name}.txt").write_text("\n".join(lines))
        for folder in (name, f"{name}annot"):
            (place / folder).symlink_to(real_data / "camvid" / folder)
    return str(place)


@pytest.fixture(scope="module")
def objects(real_data, tmp_path_factory) -> str:
    """Six images of VOC2007's trainval, and three of its test."""
    place, real = tmp_path_factory.mktemp("objects"), real_data / "voc07" / "VOCdevkit" / "VOC2007"
    lists = place / "VOC2007" / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for folder in ("JPEGImages", "Annotations"):
        (place / "VOC2007" / folder).symlink_to(real / folder)
    for split, number in (("trainval", 6), ("test", 3)):
        names = (real / "ImageSets" / "Main" / f"{split}.txt").read_text().splitlines()[:number]
        (lists / f"{split}.txt").write_text("\n".join(names))
    return str(place)


@pytest.fixture(scope="module")
def outlines(real_data, tmp_path_factory) -> str:
    """Four images of COCO's train, and two of its val."""
    place = tmp_path_factory.mktemp("outlines")
    (place / "annotations").mkdir()
    for split, number in (("train", 4), ("val", 2)):
        (place / f"{split}2017").symlink_to(real_data / "coco" / f"{split}2017")
        name = f"annotations/instances_{split}2017.json"
        content = json.loads((real_data / "coco" / name).read_text())
        annotated = {one["image_id"] for one in content["annotations"]}
        content["images"] = [one for one in content["images"] if one["id"] in annotated][:number]
        ids = {one["id"] for one in content["images"]}
        content["annotations"] = [one for one in content["annotations"] if one["image_id"] in ids]
        (place / name).write_text(json.dumps(content))
    return str(place)


def options(cls, run_dir, data="", **more):
    return cls(**{"backbone": "", "data": data, "run_dir": str(run_dir), "num_workers": 0, "threads": 1} | more)


def street_options(run_dir, data, **more):
    few = {"preset": "camvid_fcn", "max_iters": 6, "rounds": 3, "batch_size": 2, "crop_size": 64}
    return options(Segmentation, run_dir, data, **few | more)


@pytest.fixture(scope="module")
def segmented(streets, backbone, tmp_path_factory):
    place = tmp_path_factory.mktemp("segmented") / "run"
    return place, segmentation.run(street_options(place, streets), open_backbone(backbone))


def test_segmentation_writes_a_row_that_says_what_was_smaller(segmented):
    place, (row,) = segmented
    assert (row.benchmark, row.column, row.full) == ("segmentation_camvid", "mIoU", False)
    assert row.data == "CamVid: 6 train, 2 val images"
    assert {"6 instead of 8,000 iterations", "crops of 64 instead of 352 pixels", "resnet10 instead of resnet50"} <= set(
        row.notes
    )
    result = json.loads((place / "trial_0" / "result.json").read_text())
    assert round(result["figures"]["mIoU"], 2) == row.value
    assert 0 <= result["figures"]["road"] <= 100


def detect_options(run_dir, data):
    few = {"max_iters": 3, "rounds": 3, "batch_size": 2, "min_size": 96, "regions": 16}
    return options(Detection, run_dir, data, preset="voc0712_faster_rcnn_c4", **few)


@pytest.mark.parametrize(
    ("run", "ask", "data"),
    [(segmentation.run, street_options, "streets"), (detection.run, detect_options, "objects")],
    ids=["segmentation", "detection"],
)
def test_a_killed_training_goes_on_to_the_same_weights(run, ask, data, backbone, tmp_path, monkeypatch, request):
    commit = dense.DenseSession.commit

    def killed(session, number, metrics):
        if number == 1:
            raise KeyboardInterrupt
        commit(session, number, metrics)

    place = request.getfixturevalue(data)
    monkeypatch.setattr(dense.DenseSession, "commit", killed)
    with pytest.raises(KeyboardInterrupt):
        run(ask(tmp_path / "killed", place), open_backbone(backbone))
    assert not (tmp_path / "killed" / "scorecard.json").exists()
    monkeypatch.undo()
    rows = [run(ask(tmp_path / name, place), open_backbone(backbone)) for name in ("killed", "whole")]
    assert rows[0] == rows[1]
    one, other = (
        torch.load(tmp_path / name / "trial_0" / "checkpoints" / "epoch_0002" / "state.pt", weights_only=True)["model"]
        for name in ("killed", "whole")
    )
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_trials_have_seeds_of_their_own_and_a_spread(streets, backbone, tmp_path):
    asked = street_options(tmp_path / "run", streets, trials=2, max_iters=3, rounds=1)
    (row,) = segmentation.run(asked, open_backbone(backbone))
    values = [json.loads((tmp_path / "run" / f"trial_{n}" / "result.json").read_text())["figures"]["mIoU"] for n in (0, 1)]
    assert values[0] != values[1]
    assert (row.seeds, row.value) == (2, round(sum(values) / 2, 2))
    assert row.spread == round(abs(values[0] - values[1]) / 2**0.5, 2)


def test_gradient_accumulation_gives_the_gradient_of_the_whole_batch(streets, backbone):
    """The reference's loss divides by all pixels, and crops are of one size: so the mean of parts is that of the whole."""
    candidate = open_backbone(backbone)
    problem = problem_of(CAMVID.at(64).read(streets), candidate)
    torch.manual_seed(0)
    model = problem.network(candidate.build()).eval()
    model.training = True  # two outputs, while BatchNorm and dropout, which see a batch and not an image, stay in eval mode
    samples = [problem.training_sample(image_id, 5) for image_id in range(4)]
    compute = dense.Compute(torch.device("cpu"), "fp32", False)

    def gradients(*parts: slice) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for part in parts:
            (problem.loss(model, samples[part], compute) / len(parts)).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    whole, summed = gradients(slice(0, 4)), gradients(slice(0, 2), slice(2, 4))
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, summed[name], rtol=1e-4, atol=1e-6, msg=name)


def problem_of(sets, candidate):
    return segmentation.SegmentationProblem(
        schedule=CAMVID.schedule,
        num_train=len(sets["train"].images),
        num_test=len(sets["val"].images),
        train=sets["train"],
        test=sets["val"],
        preset=CAMVID.at(64),
        fill=(124, 116, 104),
    )


def test_the_backbones_weights_arrive(streets, backbone):
    candidate = open_backbone(backbone)
    model = problem_of(CAMVID.read(streets), candidate).network(candidate.build())
    arrived = model.state_dict()
    assert all(torch.equal(arrived[f"backbone.{key}"], value) for key, value in candidate.tensors.items())


@pytest.mark.parametrize(
    ("preset", "data", "columns"),
    [
        (
            "voc0712_faster_rcnn_c4",
            "objects",
            ["VOC07 AP", "VOC07 AP50", "VOC07 AP75", "AP", "AP50", "AP75"],
        ),
        ("coco_mask_rcnn_fpn_1x", "outlines", ["AP", "AP50", "AP75", "mask AP", "mask AP50", "mask AP75"]),
    ],
)
def test_detection_from_images_to_rows(preset, data, columns, backbone, tmp_path, request):
    place = request.getfixturevalue(data)
    few = {"max_iters": 2, "rounds": 2, "batch_size": 2, "micro_batch": 1, "min_size": 96, "regions": 16}
    asked = options(Detection, tmp_path / "run", place, preset=preset, **few)
    rows = detection.run(asked, open_backbone(backbone))
    assert [row.column for row in rows] == columns
    assert all(not row.full and "short side 96 instead of 800 pixels" in row.notes for row in rows)
    lines = [json.loads(line) for line in (tmp_path / "run" / "trial_0" / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["train", "train", "evaluate"]
    assert detection.run(asked, open_backbone(backbone)) == rows  # a finished one is only read


def test_coco_is_trained_for_twelve_epochs(outlines, backbone, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(dense, "rows", lambda options, candidate, problem, *_, **__: seen.append(problem) or [])
    asked = options(Detection, tmp_path / "run", outlines, preset="coco_mask_rcnn_fpn_1x", batch_size=2, min_size=96)
    detection.run(asked, open_backbone(backbone))
    schedule = seen[0].schedule
    assert (schedule.iterations, schedule.milestones) == (24, (16, 22))  # of 4 images, steps after 8 and 11 epochs


@pytest.mark.slow
def test_two_workers_share_training_and_test(streets, backbone, tmp_path, local_ray):
    asked = street_options(tmp_path / "run", streets, num_workers=2, max_iters=2, rounds=1, batch_size=4)
    (row,) = segmentation.run(asked, open_backbone(backbone))
    assert 0 <= row.value <= 100 and "BatchNorm of each of 2 CPU workers, not SyncBN" in row.notes
    lines = [json.loads(line) for line in (tmp_path / "run" / "trial_0" / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("num_images") for line in lines] == [None, 2]


@pytest.mark.slow
def test_a_detector_trains_on_two_workers_also_where_one_has_no_object(outlines, backbone, tmp_path, local_ray):
    """One worker's image has no region to learn a mask from: the other must not wait for its gradients."""
    place = tmp_path / "coco"
    shutil.copytree(outlines, place)
    file = place / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    first = content["images"][0]["id"]
    content["annotations"] = [  # all but the first image keep an object of a pixel: no proposal overlaps it
        one if one["image_id"] == first else one | {"bbox": [0, 0, 1, 1], "segmentation": [[0, 0, 1, 0, 1, 1, 0, 1]]}
        for one in content["annotations"]
    ]
    file.write_text(json.dumps(content))
    few = {"max_iters": 4, "rounds": 2, "batch_size": 2, "min_size": 96, "regions": 8, "num_workers": 2}
    asked = options(Detection, tmp_path / "run", str(place), preset="coco_mask_rcnn_fpn_1x", **few)
    rows = detection.run(asked, open_backbone(backbone))
    assert "BatchNorm of each of 2 CPU workers, not SyncBN" in rows[0].notes


def test_cityscapes_slides_its_window_over_real_frames(real_data, backbone, tmp_path):
    few = {"preset": "cityscapes_fcn_40k", "max_iters": 1, "rounds": 1, "batch_size": 2, "crop_size": 64}
    (row,) = segmentation.run(
        options(Segmentation, tmp_path / "run", str(real_data / "cityscapes"), **few), open_backbone(backbone)
    )
    assert row.benchmark == "segmentation_cityscapes" and row.data == "Cityscapes: 2 train, 1 val images"


# --- bad input ----------------------------------------------------------------------------------------------------------


def test_a_mask_of_another_size_is_refused_before_anything_is_written(streets, backbone, tmp_path):
    place = tmp_path / "camvid"
    shutil.copytree(streets, place)
    first = (place / "train.txt").read_text().split()
    (place / "val.txt").write_text(f"{first[0]} {first[1]}\n{first[2]} small.png\n")
    Image.open(place / first[3]).crop((0, 0, 20, 30)).save(place / "small.png")
    with pytest.raises(UsageError, match=r"small\.png is 30 x 20 .*its image 360 x 480"):
        segmentation.run(street_options(tmp_path / "run", str(place)), open_backbone(backbone))
    assert not (tmp_path / "run").exists()


def test_an_image_that_ends_early_is_named_before_anything_is_written(objects, backbone, tmp_path):
    place = tmp_path / "broken"
    shutil.copytree(objects, place)
    name = (place / "VOC2007" / "ImageSets" / "Main" / "test.txt").read_text().split()[0]
    image = place / "VOC2007" / "JPEGImages" / f"{name}.jpg"
    image.write_bytes(image.read_bytes()[:3000])
    with pytest.raises(UsageError, match=rf"{name}\.jpg cannot be read"):
        detection.run(detect_options(tmp_path / "run", str(place)), open_backbone(backbone))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_image_that_is_lost_while_it_trains_is_named(objects, backbone, tmp_path, local_ray, monkeypatch):
    place = tmp_path / "lost"
    shutil.copytree(objects, place)

    def lose(dataset):
        if dataset.split == "trainval":
            (place / "VOC2007" / "JPEGImages" / f"{dataset.images[0].path[-10:-4]}.jpg").unlink()

    monkeypatch.setattr(detection, "check_images", lose)
    asked = replace(detect_options(tmp_path / "run", str(place)), num_workers=1)
    with pytest.raises(RunError, match=r"\.jpg cannot be read"):
        detection.run(asked, open_backbone(backbone))
    assert not (tmp_path / "run" / "scorecard.json").exists()


@pytest.mark.parametrize("split", ["trainval", "test"])
def test_a_set_without_objects_is_refused(objects, backbone, tmp_path, split):
    place = tmp_path / "empty"
    shutil.copytree(objects, place)
    for name in (place / "VOC2007" / "ImageSets" / "Main" / f"{split}.txt").read_text().split():
        annotation = place / "VOC2007" / "Annotations" / f"{name}.xml"
        annotation.write_text(re.sub(r"<object>.*?</object>", "", annotation.read_text(), flags=re.S))
    with pytest.raises(UsageError, match=f"no image of .*, {split}, has an object that is asked for"):
        detection.run(detect_options(tmp_path / "run", str(place)), open_backbone(backbone))


def test_splits_with_other_classes_are_refused(outlines, backbone, tmp_path):
    """Labels are places in the list of classes: another order would score other classes than it trained."""
    place = tmp_path / "coco"
    shutil.copytree(outlines, place)
    file = place / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    content["categories"].reverse()
    file.write_text(json.dumps(content))
    asked = options(Detection, tmp_path / "run", str(place), preset="coco_mask_rcnn_fpn_1x", min_size=96)
    with pytest.raises(UsageError, match="train and val list other classes, or in another order"):
        detection.run(asked, open_backbone(backbone))


def test_masks_without_a_class_are_refused(streets, backbone, tmp_path):
    place = tmp_path / "camvid"
    shutil.copytree(streets, place)
    image, mask = (place / "val.txt").read_text().split()[:2]
    void = np.full_like(np.array(Image.open(place / mask)), 11)
    Image.fromarray(void).save(place / "void.png")
    (place / "val.txt").write_text(f"{image} void.png\n")
    with pytest.raises(UsageError, match=r"no pixel of .*, val, has a class"):
        segmentation.run(street_options(tmp_path / "run", str(place)), open_backbone(backbone))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_workers": 3}, "batches of 16 images are not a multiple of num_workers 3"),
        ({"size": 96}, "size 96 means nothing"),
        ({"deterministic": True}, "give --use-gpu no with it"),
        ({"min_size": 40}, "min_size is 40; give 64 or more"),
        ({"regions": 600}, "regions is 600; give 4 to 511"),
        ({"trials": 0}, "trials is 0; give 1 or more"),
        ({"max_iters": -1}, "max_iters is -1; give 0 or more"),
    ],
)
def test_options_that_cannot_be(given, message, objects, backbone, tmp_path):
    with pytest.raises(UsageError, match=message):
        detection.run(
            options(Detection, tmp_path / "run", objects, preset="voc0712_faster_rcnn_c4", **given), open_backbone(backbone)
        )


def test_weights_that_diverge_leave_no_scorecard(streets, backbone, tmp_path):
    candidate = open_backbone(backbone)
    broken = {key: value.clone() for key, value in candidate.tensors.items()}
    broken["layer4.0.bn2.weight"][:] = float("nan")
    with pytest.raises(RunError, match="not finite"):
        segmentation.run(street_options(tmp_path / "run", streets), replace(candidate, tensors=broken))
    assert not Path(tmp_path / "run" / "scorecard.json").exists()
