"""Pools and grids of the protocol; an extraction that covers every image once and is done once."""

import io
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
import torchvision.transforms.v2 as TV
from PIL import Image

from raydc.benchmarks import features
from raydc.benchmarks.features import extract, image_files, pool, shard_split, variants
from raydc.benchmarks.options import Knn
from raydc.benchmarks.setting import open_backbone
from raydc.config import ModelConfig, RunError
from raydc.data import shards
from raydc.models.backbone import Backbone
from raydc.storage import Folder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def setting(tmp_path, digits_shards):
    return Knn(backbone="", data=digits_shards, run_dir=str(tmp_path / "knn"), num_workers=0, threads=1)


@pytest.fixture(scope="module")
def val(digits_shards):
    folder = Folder(digits_shards)
    return shard_split(folder, shards.open_manifest(folder), "val")


def test_resnet50_at_224_gives_the_protocols_dimensions():
    with torch.no_grad():
        maps = Backbone(ModelConfig(architecture="resnet50")).eval().taps(torch.zeros(1, 3, 224, 224))
    assert [p.flatten(1).shape[1] for p in pool(maps).values()] == [9216, 9216, 8192, 9216, 8192]


def test_padding_counts_in_the_average_of_feature1():
    sides = dict(zip(features.LAYERS, (112, 56, 28, 14, 7), strict=True))
    pooled = pool({name: torch.ones(1, 1, side, side) for name, side in sides.items()})
    first = pooled["feature1"][0, 0]
    assert first[0, 0] == pytest.approx(36 / 100)  # 4 of 10 rows and columns of the corner are padding
    assert first[5, 5] == 1
    assert all((pooled[name] == 1).all() for name in features.LAYERS[1:])


@pytest.mark.parametrize("side", [16, 32, 96])
def test_other_sizes_come_to_the_same_grids(side):
    with torch.no_grad():
        maps = (
            Backbone(ModelConfig(architecture="resnet10", width=8, stem="small")).eval().taps(torch.zeros(1, 3, side, side))
        )
    assert [tuple(p.shape[2:]) for p in pool(maps).values()] == [(12, 12), (6, 6), (4, 4), (3, 3), (2, 2)]


def test_features_are_those_of_the_network_on_each_image(setting, val, run_dir):
    candidate = open_backbone(run_dir)
    found = extract(setting, candidate, val, "avgpool").load("avgpool")
    rows = shards.read_columns(val.folder, shards.open_manifest(val.folder), "val", ["image_id", "image"]).slice(0, 20)
    backbone = candidate.build()
    for image_id, data in zip(rows["image_id"].to_pylist(), rows["image"].to_pylist(), strict=True):
        image = Image.open(io.BytesIO(data)).convert("RGB").resize((16, 16), Image.Resampling.BILINEAR)
        with torch.no_grad():
            alone = backbone(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float())[0].numpy()
        assert np.linalg.norm(found[image_id] - alone) < 0.05 * np.linalg.norm(alone)  # bf16, and PIL's rounding


@pytest.mark.parametrize("squash", [False, True])
def test_an_image_is_shown_as_torchvision_would(tmp_path, squash):
    """Resize(256) and CenterCrop(224), or Resize(256) and Resize((224, 224)), of a photo-like image that is no square."""
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 256, (30, 45, 3), np.uint8))
    small.resize((450, 300), Image.Resampling.BICUBIC).save(tmp_path / "wide.png")
    last = TV.Resize((224, 224)) if squash else TV.CenterCrop(224)
    expected = TV.Compose([TV.PILToTensor(), TV.Resize(256), last])(Image.open(tmp_path / "wide.png"))
    reader = features.Reader(Folder(tmp_path), features.View(size=224, resize=256, squash=squash), 1)
    found = reader(pa.table({"image_id": [0], "path": ["wide.png"]}))[0]
    error = (found.float() - expected.float()).abs()
    assert error.mean() < (0.01 if squash else 2)  # one resize of the crop's box instead of a resize and a crop
    assert error.max() < (1.5 if squash else 25)


def test_a_second_extraction_does_not_touch_the_backbone(setting, val, run_dir, monkeypatch, capsys):
    candidate = open_backbone(run_dir)
    once = extract(setting, candidate, val, "layers")

    def never(*_):
        raise AssertionError("the backbone ran again")

    monkeypatch.setattr(features, "Extractor", never)
    again = extract(setting, open_backbone(run_dir), val, "layers")
    assert again.from_cache and "has them" in capsys.readouterr().out
    np.testing.assert_array_equal(once.load("feature3"), again.load("feature3"))
    with pytest.raises(AssertionError, match="ran again"):
        extract(setting, open_backbone(f"random:{run_dir}"), val, "layers")
    with pytest.raises(AssertionError, match="ran again"):
        extract(setting, candidate, val, "layers", squash=True)


def test_a_kill_leaves_nothing_that_looks_whole(setting, val, run_dir, monkeypatch):
    candidate = open_backbone(run_dir)
    monkeypatch.setattr(features, "BLOCK", 100)
    monkeypatch.setattr(features.Extractor, "__call__", _only_once(features.Extractor.__call__))
    with pytest.raises(KeyboardInterrupt):
        extract(setting, candidate, val, "avgpool")
    monkeypatch.undo()
    found = extract(setting, candidate, val, "avgpool")
    assert not found.from_cache
    assert np.isfinite(found.load("avgpool")).all() and len(found.load("avgpool")) == 360


def _only_once(call):
    seen = []

    def killed(self, table):
        if seen:
            raise KeyboardInterrupt
        seen.append(1)
        return call(self, table)

    return killed


def test_an_image_that_was_not_extracted_is_an_error(val):
    with pytest.raises(RunError, match="1 of 360 val images were not extracted"):
        features._coverage(iter([("a", np.arange(359))]), val)


def test_a_repeated_block_counts_once(val):
    half, rest, again = ("a", np.arange(200)), ("b", np.arange(150, 360)), ("c", np.arange(200))
    assert features._coverage(iter([half, rest, again]), val) == ["b", "c"]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_file_is_named(setting, tmp_path, run_dir, num_workers, local_ray):
    setting = replace(setting, num_workers=num_workers)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 30), (9, 9, 9)).save(tmp_path / "images" / "good.png")
    (tmp_path / "images" / "bad.jpg").write_bytes(b"no image")
    images = image_files(Folder(tmp_path / "images"), "few", ["good.png", "bad.jpg"])
    with pytest.raises(RunError, match="bad.jpg cannot be read"):
        extract(setting, open_backbone(run_dir), images, "avgpool")
    with pytest.raises(RunError, match="bad.jpg cannot be read"):
        variants(setting, open_backbone(f"random:{run_dir}"), images)


def test_fresh_weights_come_in_two_variants_that_differ_in_statistics_alone(setting, val, run_dir):
    untouched, adapted = variants(setting, open_backbone(f"random:{run_dir}"), val)
    assert (untouched.statistics, adapted.statistics) == ("untouched", "adapted")
    differing = {key for key, value in untouched.tensors.items() if not torch.equal(value, adapted.tensors[key])}
    assert differing and all("running_" in key or "num_batches" in key for key in differing)
    assert variants(setting, open_backbone(run_dir), val)[0].statistics == ""


def test_ray_extracts_what_one_process_does(setting, val, run_dir, local_ray):
    candidate = open_backbone(run_dir)
    here = extract(setting, candidate, val, "avgpool").load("avgpool")
    elsewhere = replace(setting, num_workers=2, run_dir=setting.run_dir.replace("knn", "ray/knn"))
    there = extract(elsewhere, candidate, val, "avgpool")
    assert not there.from_cache
    np.testing.assert_allclose(there.load("avgpool"), here, atol=2e-2 * np.abs(here).max())
