"""Linear evaluation: the protocol's numbers, heads that do not disturb each other, a backbone that stays as it was."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from raydc.benchmarks import knn, linear, scorecard
from raydc.benchmarks.learner import open_shards, scaled, top_hits
from raydc.benchmarks.linear import PRESETS, Heads, Probe, build_optimizer, figures, set_rates, with_jitter
from raydc.benchmarks.options import AVGPOOL, LAYERS, Knn, Linear
from raydc.benchmarks.published import OFFICIAL
from raydc.benchmarks.setting import open_backbone
from raydc.config import ImagesConfig, ModelConfig, UsageError
from raydc.models.backbone import Backbone
from raydc.storage import Folder

pytestmark = pytest.mark.usefixtures("one_thread")


def options(run_dir, data, **more) -> Linear:
    return Linear(**{"backbone": "", "data": data, "run_dir": str(run_dir), "num_workers": 0, "threads": 1} | more)


# --- the protocol (protocols 3 and 4) -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "epochs", "milestones", "avgpool_epochs", "avgpool_milestones", "rows"),
    [
        ("imagenet", 90, (30, 60, 90), 100, (60, 80), {"train": 1_281_167, "val": 50_000}),
        ("places205", 28, (7, 14, 21), 28, (7, 14, 21), {"train": 2_448_873, "val": 20_500}),
        ("inat18", 84, (24, 48, 72), 84, (24, 48, 72), {"train": 437_513, "val": 24_426}),
    ],
)
def test_presets_follow_the_protocol(name, epochs, milestones, avgpool_epochs, avgpool_milestones, rows):
    layers, avgpool = PRESETS[name].layers, PRESETS[name].avgpool
    assert (layers.epochs, layers.milestones, avgpool.epochs, avgpool.milestones) == (
        epochs,
        milestones,
        avgpool_epochs,
        avgpool_milestones,
    )
    assert (layers.lr, layers.weight_decay, layers.momentum, layers.nesterov, layers.batch_size) == (
        0.01,
        1e-4,
        0.9,
        True,
        256,
    )
    assert (avgpool.lr, avgpool.weight_decay, avgpool.momentum, avgpool.nesterov) == (30, 0, 0.9, False)
    assert OFFICIAL[name] == rows
    assert bool(PRESETS[name].note) == (name != "imagenet")
    assert PRESETS[name].crop == ("square" if name == "places205" else "resized")
    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "lighting": 0.1}
    assert PRESETS[name].jitter == (jitter if name == "imagenet" else {})


def test_both_groups_follow_their_own_schedule():
    heads = Heads(dict.fromkeys((*LAYERS, AVGPOOL), 4), (*LAYERS, AVGPOOL), 10, 0)
    optimizer = build_optimizer(heads, PRESETS["imagenet"])
    rates = {}
    for epoch in (0, 29.9, 30, 60, 85, 90, 95, 99.9):
        set_rates(optimizer, PRESETS["imagenet"], epoch)
        rates[epoch] = [group["lr"] for group in optimizer.param_groups]
    assert rates[0] == rates[29.9] == pytest.approx([0.01, 30])
    assert rates[30] == pytest.approx([0.001, 30])
    assert rates[60] == pytest.approx([0.0001, 3])
    assert rates[85] == pytest.approx([0.0001, 0.3])
    assert rates[90] == rates[95] == rates[99.9] == pytest.approx([0, 0.3])  # the layers' 90 epochs are over
    decays = [(group["weight_decay"], group["nesterov"], len(group["params"])) for group in optimizer.param_groups]
    assert decays == [(1e-4, True, 10), (0, False, 2)]


def test_a_shorter_schedule_keeps_its_proportions():
    short = scaled(PRESETS["imagenet"].layers, 9)
    assert (short.epochs, short.milestones) == (9, (3, 6, 9))
    assert scaled(PRESETS["imagenet"].avgpool, 10).milestones == (6, 8)
    assert scaled(PRESETS["inat18"].layers, 0) is PRESETS["inat18"].layers


def test_heads_have_the_protocols_inputs():
    channels = linear.channels(Backbone(ModelConfig(architecture="resnet50")).eval())
    heads = Heads(channels, (*LAYERS, AVGPOOL), 1000, 0)
    assert [c.in_features for c in heads.classifiers.values()] == [9216, 9216, 8192, 9216, 8192, 2048]
    assert all(not norm.affine and norm.momentum == 0.1 for norm in heads.norms.values())
    weights = torch.cat([c.weight.flatten() for c in heads.classifiers.values()])
    assert float(weights.detach().std()) == pytest.approx(0.01, rel=1e-2)
    assert all((c.bias == 0).all() for c in heads.classifiers.values())


# --- the network --------------------------------------------------------------------------------------------------------


def test_avgpool_sees_plain_pixels_and_the_layers_jittered_ones():
    backbone = Backbone(ModelConfig(architecture="resnet10", width=4, stem="small")).eval()
    probe = Probe(backbone, Heads(linear.channels(backbone), (*LAYERS, AVGPOOL), 3, 0)).train()
    plain, jittered = torch.rand(4, 3, 16, 16) * 255, torch.rand(4, 3, 16, 16) * 255
    both, a, b = (probe.features(x) for x in (torch.cat([plain, jittered], 1), plain, jittered))
    torch.testing.assert_close(both[AVGPOOL], a[AVGPOOL])
    torch.testing.assert_close(both["feature3"], b["feature3"])
    with torch.no_grad():
        torch.testing.assert_close(a[AVGPOOL], backbone(plain), rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in probe.backbone.parameters())
    assert not probe.backbone.training and probe.heads.training


def test_jitter_leaves_the_crop_where_it_is():
    config = replace(ImagesConfig(size=8, resize=8), **PRESETS["imagenet"].jitter)
    gray = torch.full((5, 3, 8, 8), 100.0)
    gray[:, :, :4] = 20.0
    ids = np.arange(5)
    ((seen, pixels),) = with_jitter([(ids, gray)], config=config, seed=3)
    np.testing.assert_array_equal(seen, ids)
    assert torch.equal(pixels[:, :3], gray)
    jittered = pixels[:, 3:]
    assert (jittered[:, :, :4].std((2, 3)) < 1e-3).all()  # each half of a flat image stays flat
    assert len({round(float(image[0, 0, 0]), 3) for image in jittered}) == 5  # and each image has colours of its own
    ((_, again),) = with_jitter([(ids, gray)], config=config, seed=3)
    assert torch.equal(again, pixels)


def test_top_hits_by_hand():
    scores = torch.tensor([[9.0, 1, 2, 3, 4, 5], [0, 9, 8, 7, 6, 5], [1, 2, 3, 4, 5, 6]])
    assert top_hits(scores, torch.tensor([0, 5, 0])).tolist() == [1, 2]
    assert top_hits(scores[:, :2], torch.tensor([1, 0, 1])).tolist() == [1, 3]


def test_a_layers_last_epoch_counts_and_avgpools_best():
    preset = replace(
        PRESETS["imagenet"], layers=scaled(PRESETS["imagenet"].layers, 2), avgpool=scaled(PRESETS["imagenet"].avgpool, 3)
    )
    lines = [
        {"epoch": 0, "phase": "evaluate", "feature1 top1": 50.0, "AvgPool top1": 70.0},
        {"epoch": 1, "phase": "evaluate", "feature1 top1": 40.0, "AvgPool top1": 60.0},
        {"epoch": 2, "phase": "evaluate", "feature1 top1": 45.0, "AvgPool top1": 65.0},
    ]
    assert figures(SimpleNamespace(lines=lines), ("feature1", AVGPOOL), preset) == {"feature1": 40.0, AVGPOOL: 70.0}


# --- a run --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory, digits_shards, run_dir):
    place = tmp_path_factory.mktemp("linear") / "run"
    rows = linear.run(options(place, digits_shards, epochs=4, eval_every=2), open_backbone(run_dir))
    return place, rows


def test_a_run_learns_and_says_what_it_measured(measured):
    place, rows = measured
    assert [row.column for row in rows] == [*LAYERS, AVGPOOL]
    assert {row.column: row.value for row in rows}["feature1"] > 50  # chance is 10
    assert all(not row.full and "1,437 train, 360 val images, 10 classes" in row.data for row in rows)
    assert any("4 epochs instead of 90" in note for note in rows[0].notes)
    written = json.loads((place / "scorecard.json").read_text())["rows"]
    assert written[3]["column"] == "feature4" and written[3]["value"] == rows[3].value
    assert {one["method"]: one["value"] for one in written[3]["published"]}["DeepCluster (Sobel)"] == 57.71


def test_a_head_learns_the_same_alone(measured, tmp_path, digits_shards, run_dir):
    _, rows = measured
    alone = linear.run(
        options(tmp_path / "alone", digits_shards, epochs=4, eval_every=2, heads=("feature5",)), open_backbone(run_dir)
    )
    assert alone[0].value == {row.column: row.value for row in rows}["feature5"]


def test_avgpool_goes_on_alone_when_the_layers_are_done(tmp_path, digits_shards, run_dir, monkeypatch):
    """As on ImageNet, 90 and 100 epochs: nobody's figure changes by it."""
    published = linear.PRESETS["imagenet"]
    short = replace(published, layers=replace(published.layers, epochs=2), avgpool=replace(published.avgpool, epochs=4))
    monkeypatch.setitem(linear.PRESETS, "imagenet", short)
    found = {}
    for name, heads in (("both", ("feature2", AVGPOOL)), ("layer", ("feature2",)), ("avgpool", (AVGPOOL,))):
        rows = linear.run(options(tmp_path / name, digits_shards, heads=heads), open_backbone(run_dir))
        found[name] = {row.column: row.value for row in rows}
    assert found["both"] == found["layer"] | found["avgpool"]
    lines = [json.loads(line) for line in (tmp_path / "both" / "metrics.jsonl").read_text().splitlines()]
    looks = [line for line in lines if line["phase"] == "evaluate"]
    assert ["feature2 top1" in look for look in looks] == [True, True, False, False]


def test_a_killed_run_ends_in_the_same_figures(measured, tmp_path, digits_shards, run_dir, monkeypatch):
    _, rows = measured
    asked = options(tmp_path / "killed", digits_shards, epochs=4, eval_every=2)
    commit = linear.Learner.commit

    def killed(learner, epoch, metrics):
        if epoch == 2:
            raise KeyboardInterrupt
        commit(learner, epoch, metrics)

    monkeypatch.setattr(linear.Learner, "commit", killed)
    with pytest.raises(KeyboardInterrupt):
        linear.run(asked, open_backbone(run_dir))
    assert not Path(tmp_path / "killed" / "scorecard.json").exists()
    monkeypatch.undo()
    assert [row.value for row in linear.run(asked, open_backbone(run_dir))] == [row.value for row in rows]


def test_fresh_weights_are_measured_twice_and_the_better_counts(tmp_path, digits_shards, run_dir):
    asked = options(tmp_path / "fresh", digits_shards, epochs=1, heads=("feature5",))
    (row,) = linear.run(asked, open_backbone(f"random:{run_dir}"))
    looks = {}
    for statistics in ("untouched", "adapted"):
        lines = (tmp_path / "fresh" / statistics / "metrics.jsonl").read_text().splitlines()
        looks[statistics] = [json.loads(line) for line in lines][-1]["feature5 top1"]
    assert row.value == pytest.approx(max(looks.values()), abs=0.01)
    assert max(looks, key=looks.get) in " ".join(row.notes)


# --- bad input ----------------------------------------------------------------------------------------------------------


def test_shards_without_what_a_benchmark_needs(tmp_path, digits_shards):
    with pytest.raises(UsageError, match="holds no manifest.json"):
        open_shards(str(tmp_path))
    manifest = json.loads(Path(digits_shards, "manifest.json").read_text())
    for name, change, message in (
        ("val", lambda m: m["splits"].pop("val"), "has no val images"),
        ("classes", lambda m: m.update(classes=["0", "1"]), "has label 9 and only 2 classes"),
    ):
        place = tmp_path / name
        place.mkdir()
        for split in ("train", "val"):
            (place / split).symlink_to(Path(digits_shards, split))
        changed = json.loads(json.dumps(manifest))
        change(changed)
        (place / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(UsageError, match=message):
            open_shards(str(place))


def test_nothing_is_written_for_weights_that_are_not_finite(tmp_path, digits_shards, run_dir):
    candidate = open_backbone(run_dir)
    candidate.tensors["layer4.0.bn2.weight"][:] = float("nan")
    with pytest.raises(Exception, match="not finite"):
        linear.run(options(tmp_path / "nan", digits_shards, epochs=1), candidate)
    assert scorecard.read(Folder(tmp_path / "nan")) == []


def test_without_augmentation_it_reads_the_features_of_knn(tmp_path, digits_shards, run_dir, capsys):
    knn.run(Knn(backbone="", data=digits_shards, run_dir=str(tmp_path / "knn"), num_workers=0), open_backbone(run_dir))
    capsys.readouterr()
    (row,) = linear.run(options(tmp_path / "cached", digits_shards, augment=False), open_backbone(run_dir))
    assert capsys.readouterr().out.count("has them") == 2
    assert (row.benchmark, row.column) == ("linear_cached", AVGPOOL)
    assert row.value > 50


@pytest.mark.slow
def test_two_workers_train_one_set_of_heads(tmp_path, digits_shards, run_dir, local_ray):
    asked = options(tmp_path / "two", digits_shards, epochs=3, eval_every=3, num_workers=2, heads=("feature1", AVGPOOL))
    rows = linear.run(asked, open_backbone(run_dir))
    assert rows[0].value > 30  # chance is 10
    assert "BatchNorm of each of 2 CPU workers, not SyncBN" in rows[0].notes
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [line["num_images"] for line in lines if line["phase"] == "evaluate"] == [360]  # both halves of val
