"""Fine-tuning with a part of the labels, and the sweep over its settings."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from raydc.benchmarks import semisup
from raydc.benchmarks.learner import LabelledShards, open_shards
from raydc.benchmarks.options import Semisup
from raydc.benchmarks.semisup import SCHEDULE, listed_ids, schedule, stratified_ids, trial_name
from raydc.benchmarks.setting import Candidate, open_backbone
from raydc.config import ModelConfig, UsageError
from raydc.data import stream
from raydc.models.backbone import Backbone
from raydc.models.head import Classifier
from raydc.optim import learning_rate, set_learning_rate

pytestmark = pytest.mark.usefixtures("one_thread")


def options(run_dir="r", data="d", **more) -> Semisup:
    given = {"backbone": "", "data": data, "run_dir": str(run_dir), "num_workers": 0, "threads": 1, "fraction": 0.1}
    return Semisup(**given | more)


# --- the protocol -------------------------------------------------------------------------------------------------------


def test_schedule_follows_the_protocol():
    assert (SCHEDULE.epochs, SCHEDULE.milestones, SCHEDULE.gamma, SCHEDULE.momentum, SCHEDULE.batch_size) == (
        20,
        (12, 16),
        0.2,
        0.9,
        256,
    )
    config = schedule(options(lr=0.1), 0.01)
    assert [learning_rate(config, epoch) for epoch in (0, 11.9, 12, 16, 19.9)] == pytest.approx(
        [0.1, 0.1, 0.02, 0.004, 0.004]
    )
    assert [schedule(options(), share).weight_decay for share in (0.01, 0.1, 1.0)] == [5e-4, 1e-4, 1e-4]
    assert schedule(options(weight_decay=0.0), 0.01).weight_decay == 0


def test_the_head_learns_faster_by_its_factor_all_along():
    model = Classifier(Backbone(ModelConfig(architecture="resnet10", width=4, stem="small")), 3)
    config = schedule(options(lr=0.01, head_factor=10.0), 0.1)
    optimizer = semisup.build_optimizer(model, config, 10.0)
    for epoch in (0, 12, 16):
        set_learning_rate(optimizer, learning_rate(config, epoch))
        backbone, head = (group["lr"] for group in optimizer.param_groups)
        assert head == pytest.approx(10 * backbone)
    assert all(group["weight_decay"] == 1e-4 and group["momentum"] == 0.9 for group in optimizer.param_groups)


def test_near_rates_have_names_of_their_own():
    assert trial_name(0.012, 1.5) == "lr1.2e-2_head1.5"
    assert trial_name(3.0, 10) == "lr3e0_head10"


def test_only_an_official_list_under_the_protocol_is_official(digits_shards):
    imagenet = LabelledShards(None, None, {"train": np.zeros(1_281_167, np.int8)}, 1000)
    imagenet.__dict__["has"] = lambda expected: expected == {"train": 1_281_167, "val": 50_000}
    imagenet.__dict__["describe"] = lambda num: f"imagenet, {num}"
    candidate = Candidate(label="b", model=ModelConfig(), size=224, resize=256, tensors={})
    result = {"figures": {"top1": 1.0, "top5": 2.0, "note": ""}}

    def is_full(num, **more) -> bool:
        return semisup.to_rows(options(**more), candidate, imagenet, np.arange(num), result)[0].full

    assert is_full(12_811, list="1percent.txt") and is_full(128_116, list="10percent.txt")
    assert not is_full(5_000, list="mine.txt") and not is_full(12_811, fraction=0.01)
    assert not is_full(12_811, list="1percent.txt", epochs=1)
    assert not is_full(12_811, list="1percent.txt", batch_size=64)
    assert semisup.benchmark_name(options(list="x"), imagenet, np.arange(12_811)) == "semisup_1percent"
    assert semisup.benchmark_name(options(list="x"), imagenet, np.arange(128_116)) == "semisup_10percent"
    assert semisup.benchmark_name(options(fraction=0.001), imagenet, np.arange(1281)) == "semisup_0.1percent"


def test_trials_are_named_as_the_page_names_them():
    names = [trial_name(lr, factor) for lr in (1e-1, 1e-2, 1e-3) for factor in (1, 10, 100)]
    assert names[0] == "lr1e-1_head1" and names[4] == "lr1e-2_head10" and names[8] == "lr1e-3_head100"


# --- which labels -------------------------------------------------------------------------------------------------------


def test_each_class_gives_its_share_and_at_least_one():
    labels = np.repeat([0, 1, 2, 3], [100, 50, 10, 3])
    labels = np.append(np.random.default_rng(0).permutation(labels), [-1, -1])
    ids = stratified_ids(labels, 0.1, seed=0)
    assert np.bincount(labels[ids]).tolist() == [10, 5, 1, 1]
    assert (np.diff(ids) > 0).all()
    assert not np.array_equal(ids, stratified_ids(labels, 0.1, seed=1))
    np.testing.assert_array_equal(stratified_ids(labels, 1.0, 0), np.flatnonzero(labels >= 0))


def test_a_larger_fraction_keeps_the_images_of_a_smaller_one():
    labels = np.random.default_rng(1).integers(0, 5, 1000)
    assert set(stratified_ids(labels, 0.01, 0)) <= set(stratified_ids(labels, 0.1, 0))


@pytest.mark.parametrize(
    ("name", "count", "least", "most"), [("1percent", 12_811, 12, 13), ("10percent", 128_116, 128, 129)]
)
def test_the_official_lists_are_found_by_file_name(name, count, least, most, official_lists):
    path = official_lists / "imagenet_meta" / "imagenet_subsets" / f"{name}.txt"
    listed = path.read_text().split()
    classes = sorted({one.split("_")[0] for one in listed})
    others = [f"{wnid}_other_{i}.JPEG" for wnid in classes for i in range(3)]
    names = np.array(sorted(f"{one.split('_')[0]}/{one}" for one in listed + others), object)
    labels = np.array([classes.index(one.split("/")[0]) for one in names]) if count < 20_000 else np.zeros(len(names), int)
    ids = listed_ids(str(path), names, labels)
    assert len(ids) == count and not any("other" in names[i] for i in ids)
    if count < 20_000:
        sizes = np.bincount(labels[ids])
        assert (len(sizes), sizes.min(), sizes.max(), (sizes == least).sum()) == (1000, least, most, 189)


def test_lists_that_do_not_fit(tmp_path):
    names, labels = np.array(["a/1.png", "a/2.png", "b/1.png"], object), np.array([0, -1, 1])
    (tmp_path / "two.txt").write_text("a/2.png 0\nc/7.png\nc/8.png\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bare.txt").write_text("2.png\n")
    (tmp_path / "same.txt").write_text("1.png\n")
    for file, message in (
        ("two.txt", r"2 of 3 names of .*two.txt are not in the train split \(c/7.png, c/8.png\)"),
        ("empty.txt", "is empty"),
        ("none.txt", "is no file"),
        ("same.txt", "several images of the train split are named 1.png"),
    ):
        with pytest.raises(UsageError, match=message):
            listed_ids(str(tmp_path / file), names, labels)
    (tmp_path / "whole.txt").write_text("b/1.png 0\n")
    assert listed_ids(str(tmp_path / "whole.txt"), names, labels).tolist() == [2]  # its folder tells it apart
    (tmp_path / "spaces.txt").write_text("my photo 2.png 7\nyour photo.png\n")
    assert listed_ids(
        str(tmp_path / "spaces.txt"), np.array(["x/your photo.png", "x/my photo 2.png"]), np.zeros(2)
    ).tolist() == [0, 1]
    with pytest.raises(UsageError, match="1 images of .*bare.txt have no label"):
        listed_ids(str(tmp_path / "bare.txt"), names[:2], labels[:2])


# --- a run --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, digits_shards, run_dir):
    place = tmp_path_factory.mktemp("semisup") / "run"
    rows = semisup.run(options(place, digits_shards, epochs=12, lr=0.1), open_backbone(run_dir))
    return place, rows


def test_a_run_learns_from_a_tenth_of_the_labels(tuned):
    place, rows = tuned
    assert [row.column for row in rows] == ["Top-1", "Top-5"]
    assert rows[0].benchmark == "semisup_10percent"
    assert 20 < rows[0].value < rows[1].value <= 100  # chance is 10; the backbone is that of a single epoch
    assert "142 of 1,437 train" in rows[0].data and "lr1e-1_head1" in rows[0].notes
    assert any("BatchNorm" in note for note in rows[0].notes)
    assert json.loads((place / "result.json").read_text())["figures"]["top1"] == pytest.approx(rows[0].value, abs=0.01)


def test_what_comes_out_is_a_run_like_any_other(tuned, run_dir):
    before, after = open_backbone(run_dir), open_backbone(str(tuned[0]))
    assert after.model == before.model and (after.size, after.resize) == (before.size, before.resize)
    assert not after.notes  # finished
    moved = [key for key in before.tensors if not torch.equal(before.tensors[key], after.tensors[key])]
    assert "conv1.weight" in moved and "bn1.running_mean" in moved  # nothing is frozen, BatchNorm goes on learning


def test_a_finished_run_is_only_read(tuned, digits_shards, run_dir, monkeypatch):
    monkeypatch.setattr(semisup, "train", None)
    again = semisup.run(options(tuned[0], digits_shards, epochs=12, lr=0.1), open_backbone(run_dir))
    assert [row.value for row in again] == [row.value for row in tuned[1]]


def test_a_killed_run_ends_in_the_same_weights(tuned, tmp_path, digits_shards, run_dir, monkeypatch):
    asked = options(tmp_path / "killed", digits_shards, epochs=12, lr=0.1)
    commit = semisup.Learner.commit

    def killed(learner, epoch, metrics):
        commit(learner, epoch, metrics)
        if epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(semisup.Learner, "commit", killed)
    with pytest.raises(KeyboardInterrupt):
        semisup.run(asked, open_backbone(run_dir))
    assert not Path(tmp_path / "killed" / "result.json").exists()
    monkeypatch.undo()
    semisup.run(asked, open_backbone(run_dir))
    assert open_backbone(str(tmp_path / "killed")).fingerprint == open_backbone(str(tuned[0])).fingerprint


def test_only_the_chosen_images_are_trained_on(digits_shards, run_dir, tmp_path):
    data = open_shards(digits_shards)
    ids = semisup.choose_ids(options(data=digits_shards), data)
    job = semisup.prepare(options(tmp_path / "r", digits_shards), open_backbone(run_dir), data, ids)
    learner = semisup.Learner(job, semisup.Worker(job.board))
    counts = learner.plan(0).counts
    assert set(np.flatnonzero(counts)) == set(ids)
    assert counts.sum() == 256  # one batch, which is not full: some images twice
    assert counts.max() == 2


@pytest.mark.slow
def test_two_workers_leave_one_backbone(tmp_path, digits_shards, run_dir, local_ray):
    rows = semisup.run(options(tmp_path / "two", digits_shards, epochs=12, lr=0.1, num_workers=2), open_backbone(run_dir))
    assert rows[0].value > 20  # chance is 10
    assert "BatchNorm of each of 2 CPU workers, not SyncBN" in rows[0].notes
    assert all(value.isfinite().all() for value in open_backbone(str(tmp_path / "two")).tensors.values())


@pytest.mark.slow
def test_labelled_images_in_memory_and_val_as_a_stream(tuned, tmp_path, digits_shards, run_dir, local_ray, monkeypatch):
    """As for 1 % of ImageNet, whose val split alone may not fit; a stream of val counts the same hits."""
    monkeypatch.setattr(stream, "choose_cache", lambda config, folder, manifest, shares: set(shares) == {"train"})
    asked = options(tmp_path / "partly", digits_shards, epochs=12, lr=0.1, num_workers=1)
    rows = semisup.run(asked, open_backbone(run_dir))
    assert [row.value for row in rows] == [row.value for row in tuned[1]]
