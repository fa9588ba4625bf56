"""Every member of the family on digits: it runs, goes on where it was killed, and trains on the labels it clustered."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from test_resume import Killed, die_at, journal
from tiny import assert_same_assignments, assignments, tiny

from raydc import checkpoint, deepcluster, deepcluster_v2, family, odc, training
from raydc.clustering.bank import FeatureBank
from raydc.clustering.matching import match
from raydc.clustering.sampling import cluster_weights
from raydc.config import RunError, UsageError
from raydc.models.norm import batchnorms
from raydc.recipes import RAW, SPHERICAL
from raydc.storage import Folder

CROPS = {"num_crops": (2, 1), "crop_sizes": (16, 12), "min_scales": (0.5, 0.3), "max_scales": (1.0, 0.6)}
V2 = {
    "algorithm": "deepcluster_v2",
    "clustering": SPHERICAL,
    "train": {"head": "centroids", "temperature": 0.1, "balance": "none"},
    "v2": CROPS | {"hidden_dim": 32, "projection_dim": 16, "num_heads": 2},
}
ODC = {
    "algorithm": "odc",
    "clustering": RAW | {"features": "remembered"},
    "train": {"head": "matched", "balance": "reweight"},
    "odc": {"hidden_dim": 32, "projection_dim": 16, "min_cluster": 4},
}
VARIANTS = {
    "reweighted": {"train": {"balance": "reweight"}},
    "matched head, momentum": {"train": {"head": "matched", "head_momentum": 0.9}},
    "head of centroids": {"train": {"head": "centroids"}},
    "warm k-means": {"clustering": {"start": "warm"}},
    "remembered features": {"clustering": {"features": "remembered"}},
    "PIC": {"clustering": {"method": "pic"}},
    "PIC, matched head": {"clustering": {"method": "pic"}, "train": {"head": "matched"}},
    "AlexNet": {"model": {"architecture": "alexnet", "width": 4, "sobel": True}},
    "VGG-16": {"model": {"architecture": "vgg16", "width": 4}},
    "DeepCluster-v2": V2,
    "ODC": ODC,
}
STEPS = 11  # of an epoch: 1,437 images in batches of 128
EPOCHS = 2


def config(run_dir: Path, name: str, **more):
    sections = {key: dict(value) if isinstance(value, dict) else value for key, value in VARIANTS[name].items()}
    return tiny(run_dir, epochs=EPOCHS, **sections | {"probe": {"baselines": False}} | more)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A finished run of each variant that is asked for."""
    finished: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in finished:
            finished[name] = tmp_path_factory.mktemp("whole")
            family.pretrain(config(finished[name], name))
        return finished[name]

    return of


def assert_goes_on(unbroken, tmp_path, monkeypatch, name: str, owner, function: str, call: int, after: bool = False) -> None:
    whole = unbroken(name)
    with monkeypatch.context() as patch:
        die_at(patch, owner, function, call, after=after)
        with pytest.raises(Killed):
            family.pretrain(config(tmp_path, name))
    family.pretrain(config(tmp_path, name))
    assert_same_assignments(whole, tmp_path)
    ours, theirs = (checkpoint.read_tensors(Folder(place))[0] for place in (tmp_path, whole))
    assert checkpoint.tensors_hash(ours) == checkpoint.tensors_hash(theirs)


# Those that carry something over a clustering; the others among the slow tests.
CARRIED = ["matched head, momentum", "remembered features", "PIC, matched head", "DeepCluster-v2", "ODC"]


@pytest.mark.parametrize("name", CARRIED)
def test_a_run_killed_in_training_goes_on_with_the_same_labels(unbroken, tmp_path, monkeypatch, name):
    assert_goes_on(unbroken, tmp_path, monkeypatch, name, training, "_one_step", STEPS + 6)


PLACES = {
    "epoch 1, in training": (training, "_one_step", STEPS + 6, False),
    "first epoch, in training": (training, "_one_step", 4, False),
    "first labels committed": (checkpoint, "save_assignment", 1, True),
    "labels of epoch 1 committed": (checkpoint, "save_assignment", 2, True),
    "before the state of epoch 0": (checkpoint, "save_state", 1, False),
    "after the state of epoch 0": (checkpoint, "save_state", 1, True),
    "last labels committed": (checkpoint, "save_assignment", 3, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_killed_anywhere_goes_on_with_the_same_labels(unbroken, tmp_path, monkeypatch, name, place):
    assert_goes_on(unbroken, tmp_path, monkeypatch, name, *PLACES[place])


@pytest.mark.parametrize("name", ["matched head, momentum", "remembered features", "DeepCluster-v2"])
def test_training_sees_the_labels_of_its_epoch(tmp_path, monkeypatch, name):
    """Two reference code bases go on training on the first clustering (protocol 1b.6b)."""
    seen, real_pass, real_loss = [], training.run_batches, training.cross_entropy

    def watched_pass(model, batches, loss_of, *args, epoch, **how):
        def watched_loss(image_ids, images):
            seen.append((epoch, image_ids, []))
            return loss_of(image_ids, images)

        return real_pass(model, batches, watched_loss, *args, epoch=epoch, **how)

    def watched_entropy(scores, labels, *more):
        seen[-1][2].append(labels.numpy().copy())
        return real_loss(scores, labels, *more)

    monkeypatch.setattr(training, "run_batches", watched_pass)
    monkeypatch.setattr(training, "cross_entropy", watched_entropy)
    family.pretrain(config(tmp_path, name))
    committed = assignments(tmp_path)
    first, second = (committed[f"epoch_{epoch:04d}"][0] for epoch in range(EPOCHS))
    assert (first != second).mean() > 0.3, "the labels did change"
    for epoch, image_ids, labels in seen:
        crops = len(labels[0]) // len(image_ids)
        for head, of_head in enumerate(labels):
            expected = committed[stem(epoch, head)][0][image_ids]
            np.testing.assert_array_equal(of_head, np.tile(expected, crops))


def stem(epoch: int, head: int) -> str:
    return f"epoch_{epoch:04d}" + (f"_{head}" if head else "")


def test_heads_of_v2_are_the_centroids_of_their_own_crop(tmp_path, monkeypatch):
    heads, views, real_reassign, real_cluster = [], [], deepcluster_v2.reassign, FeatureBank.cluster_memory

    def reassign(run, assignments):
        real_reassign(run, assignments)
        heads.append(run.model.centroids.numpy().copy())

    def cluster_memory(bank, view, *args):
        views.append(view)
        return real_cluster(bank, view, *args)

    monkeypatch.setattr(deepcluster_v2, "reassign", reassign)
    monkeypatch.setattr(FeatureBank, "cluster_memory", cluster_memory)
    family.pretrain(config(tmp_path, "DeepCluster-v2"))
    assert views == [1, 0] * (EPOCHS + 1), "the last head first, head h of crop h"
    for epoch, centroids in enumerate(heads):
        files = [checkpoint.load_assignment(Folder(str(tmp_path)), epoch, part=head) for head in (0, 1)]
        assert not np.array_equal(files[0].centroids, files[1].centroids)
        for head, file in enumerate(files):
            np.testing.assert_array_equal(centroids[head], file.centroids)


def test_a_matched_head_goes_on_with_the_weights_and_momentum_of_its_cluster(tmp_path, monkeypatch):
    real, checked = deepcluster.reassign, []

    def held(run) -> list[np.ndarray]:
        weight = run.model.head.weight
        return [weight.detach().numpy().copy(), run.state.optimizer.state[weight]["momentum_buffer"].numpy().copy()]

    def reassign(run, assignment):
        if assignment.epoch == 0:
            return real(run, assignment)
        before, previous = held(run), run.previous(assignment.epoch)
        real(run, assignment)
        k = assignment.num_clusters
        source = match(previous.pseudo_labels, assignment.pseudo_labels, k, k)
        assert (source != np.arange(k)).any() and (source >= 0).sum() > k / 2
        for old, new in zip(before, held(run), strict=True):
            np.testing.assert_array_equal(new[source >= 0], old[source[source >= 0]])
        assert (held(run)[1][source < 0] == 0).all() and np.abs(before[1]).max() > 0
        checked.append(assignment.epoch)

    monkeypatch.setattr(deepcluster, "reassign", reassign)
    family.pretrain(config(tmp_path, "matched head, momentum"))
    assert checked == list(range(1, EPOCHS))


def test_each_step_of_odc_trains_on_what_the_step_before_left(tmp_path, monkeypatch):
    """Labels, and weights by the clusters' sizes, against a replay of what the bank answered."""
    labels, checked, ids_of_step = np.empty(0), [], []
    real = {name: getattr(FeatureBank, name) for name in ("open_online", "update_online")}
    real_entropy, real_pass = training.cross_entropy, training.run_batches

    def open_online(bank, *args):
        nonlocal labels
        labels = real["open_online"](bank, *args).copy()
        return labels.copy()

    def update_online(bank, *args):
        ids, new = real["update_online"](bank, *args)
        labels[ids] = new
        checked.append(len(ids))
        return ids, new

    def watched_pass(model, batches, loss_of, *args, **how):
        def watched_loss(image_ids, images):
            ids_of_step.append(image_ids)
            return loss_of(image_ids, images)

        return real_pass(model, batches, watched_loss, *args, **how)

    def entropy(scores, targets, weights):
        np.testing.assert_array_equal(targets.numpy(), labels[ids_of_step[-1]])
        sizes = np.bincount(labels, minlength=scores.shape[1])
        np.testing.assert_allclose(weights.numpy(), cluster_weights(sizes, 0.5), rtol=1e-6)
        return real_entropy(scores, targets, weights)

    monkeypatch.setattr(FeatureBank, "open_online", open_online)
    monkeypatch.setattr(FeatureBank, "update_online", update_online)
    monkeypatch.setattr(training, "run_batches", watched_pass)
    monkeypatch.setattr(training, "cross_entropy", entropy)
    family.pretrain(config(tmp_path, "ODC"))
    assert len(checked) == EPOCHS * STEPS and sum(checked) > 100, "labels did change"


def test_the_first_memory_of_odc_is_of_the_datas_statistics(tmp_path, monkeypatch):
    real, means = odc.fill, []

    def fill(run, epoch):
        means.append(max(float(norm.running_mean.abs().max()) for norm in batchnorms(run.model)))
        real(run, epoch)

    monkeypatch.setattr(odc, "fill", fill)
    family.pretrain(config(tmp_path, "ODC"))
    assert means[0] > 0.01, "untouched means are 0"


def test_odc_without_its_memory_is_one_sentence_and_harms_nothing(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        die_at(patch, training, "_one_step", STEPS + 6)
        with pytest.raises(Killed):
            family.pretrain(config(tmp_path, "ODC"))
    (tmp_path / checkpoint.memory_file(0)).unlink()
    before = (tmp_path / "backbone.safetensors").read_bytes()
    with pytest.raises(
        RunError, match=r"memory\.safetensors is missing, and the labels of odc with it; give another --run-dir"
    ):
        family.pretrain(config(tmp_path, "ODC"))
    assert (tmp_path / "backbone.safetensors").read_bytes() == before


def test_odc_changes_labels_while_it_trains_and_keeps_no_small_cluster(unbroken):
    committed = assignments(unbroken("ODC"))
    labels = [committed[f"epoch_{epoch:04d}"][0] for epoch in range(EPOCHS + 1)]
    for before, after in itertools.pairwise(labels):
        assert 0.01 < (before != after).mean() < 1
        sizes = np.bincount(after, minlength=100)
        assert sizes[sizes > 0].min() >= ODC["odc"]["min_cluster"]
    assert [line["phase"] for line in journal(unbroken("ODC"))].count("extract") == 1


def test_odc_says_the_same_after_a_kill(unbroken, tmp_path, monkeypatch):
    """Labels alone could hide counts that are wrong and phases that are written twice."""
    with monkeypatch.context() as patch:
        die_at(patch, checkpoint, "save_assignment", 2, after=True)
        with pytest.raises(Killed):
            family.pretrain(config(tmp_path, "ODC"))
    family.pretrain(config(tmp_path, "ODC"))
    told = [
        [(line["epoch"], line["phase"], line.get("num_repaired"), line.get("loss")) for line in journal(place)]
        for place in (unbroken("ODC"), tmp_path)
    ]
    starts = [[line for line in lines if line[1] == "start"] for lines in told]
    assert [len(one) for one in starts] == [1, 2]
    assert [line for line in told[0] if line[1] != "start"] == [line for line in told[1] if line[1] != "start"]


def test_odc_starts_again_where_the_bank_lost_its_labels(unbroken, tmp_path, monkeypatch, capsys):
    real, calls = FeatureBank.update_online, []

    def lossy(bank, image_ids, features):
        calls.append(None)
        if len(calls) == STEPS + 4:
            bank.open_memory()
        return real(bank, image_ids, features)

    monkeypatch.setattr(FeatureBank, "update_online", lossy)
    family.pretrain(config(tmp_path, "ODC"))
    assert "starting again from the last commit point" in capsys.readouterr().out
    assert_same_assignments(unbroken("ODC"), tmp_path)


def test_odc_with_clusters_smaller_than_it_keeps_is_refused(tmp_path):
    with pytest.raises(
        UsageError,
        match=r"100 clusters smaller than odc\.min_cluster 20; lower clustering\.num_clusters to 71 or lower odc\.min",
    ):
        family.pretrain(config(tmp_path, "ODC", odc={"min_cluster": 20}))


def test_remembered_features_spare_the_extraction_and_count_what_was_not_drawn(unbroken):
    lines = journal(unbroken("remembered features"))
    assert [line["phase"] for line in lines].count("extract") == 1
    drawn = [line["num_images_drawn"] for line in lines if line["phase"] == "train"]
    older = [line["num_images_not_drawn"] for line in lines if line["phase"] == "remember"]
    assert [d + o for d, o in zip(drawn, older, strict=True)] == [1437] * EPOCHS
    assert min(older) > 0, "uniform draws leave some images out"


def test_a_memory_that_misses_images_is_filled_by_an_extraction(tmp_path, monkeypatch, capsys):
    """The features of the first pass reach the bank but for one image: noticed, said, and extracted again."""
    real, calls = FeatureBank.remember, []

    def forgetful(bank, view, image_ids, steps, features):
        calls.append(None)
        rows = slice(1, None) if len(calls) == 1 else slice(None)
        return real(bank, view, image_ids[rows], steps[rows], features[rows])

    monkeypatch.setattr(FeatureBank, "remember", forgetful)
    family.pretrain(config(tmp_path, "remembered features"))
    assert "1 of 1437 images are not remembered" in capsys.readouterr().out
    assert all((clusters >= 0).all() for clusters, _ in assignments(tmp_path).values())


def test_pic_reports_clusters_of_its_own_number(unbroken):
    found = [line["num_clusters"] for line in journal(unbroken("PIC")) if line["phase"] == "cluster"]
    assert len(set(found)) > 1, "each graph has its own number of clusters"
    last = torch.load(unbroken("PIC") / f"checkpoints/epoch_{EPOCHS - 1:04d}/state.pt", weights_only=True)
    assert len(last["model"]["head.weight"]) == found[EPOCHS - 1], "and the head follows"


@pytest.mark.parametrize("sigma", [0.001, 100.0])
def test_pic_that_finds_no_clusters_is_one_sentence(tmp_path, sigma):
    with pytest.raises(RunError, match=r"PIC.*(raise|lower) clustering\.sigma"):
        family.pretrain(config(tmp_path, "PIC", clustering={"method": "pic", "sigma": sigma, "neighbours": 1000}))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["remembered features", "PIC, matched head", "DeepCluster-v2", "ODC"])
def test_two_workers(local_ray, tmp_path, name):
    """The same objects as actors, gradients and labels shared: every image has a label, in every epoch."""
    result = family.pretrain(config(tmp_path, name, num_workers=2))
    assert result["num_workers"] == 2
    assert all((clusters >= 0).all() for clusters, _ in assignments(tmp_path).values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["remembered features", "DeepCluster-v2", "ODC"])
def test_streamed_images(local_ray, tmp_path, name):
    result = family.pretrain(config(tmp_path, name, num_workers=1, images={"cache": "no"}))
    assert result["metrics"]["linear_top1"] > 0.2
    assert all((clusters >= 0).all() for clusters, _ in assignments(tmp_path).values())
