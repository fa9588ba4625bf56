"""The real thing: Ray Train workers, the bank as an actor, streams; on one machine."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
import torch.distributed as dist
from tiny import assert_same_assignments, assignments, tiny

from raydc import checkpoint, deepcluster, family, launch, prepare
from raydc.benchmarks import dense, segmentation, semisup
from raydc.benchmarks.dense import loop as dense_loop
from raydc.benchmarks.learner import Learner
from raydc.benchmarks.options import Segmentation, Semisup
from raydc.benchmarks.setting import open_backbone
from raydc.checkpoint import weights_hash
from raydc.clustering.assignment import Assignment
from raydc.clustering.bank import CoverageError
from raydc.clustering.diagnostics import nmi
from raydc.clustering.whitening import l2
from raydc.config import BankConfig, UsageError
from raydc.data import stream
from raydc.launch import Job
from raydc.remote import Board, Remote, Shared
from raydc.run import Run, collect
from raydc.storage import Folder
from raydc.training import Clock

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory, local_ray) -> Path:
    run_dir = tmp_path_factory.mktemp("two")
    family.pretrain(tiny(run_dir, num_workers=2))
    return run_dir


def fit(loop, config, **extras):
    """``loop`` on the workers of ``config``, with everything a pretraining loop is given."""
    run_dir, local = Folder(config.run_dir), config.num_workers == 0
    data, manifest = prepare.open_data(config, run_dir)
    config = prepare.settle(config, None, run_dir, data, manifest)
    streams = stream.open_streams(config, data, manifest, cached=config.images.cache == "yes", local=local)
    labels = Shared(prepare.read_labels(data, manifest), local=local)
    board, bank = Remote(Board, local=local, num_cpus=0), family.make_bank(config, streams.sizes["train"], local)
    job = Job(config, run_dir, board, streams, bank, {"labels": labels} | extras, 0.0)
    return launch.fit(loop, job, num_workers=config.num_workers, use_gpu=False, max_failures=0)


def gather(value):
    """Every rank's value, on every rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def test_one_worker_through_ray_is_the_local_loop(tmp_path):
    """Same threads, same images, same order: the labels are equal bit for bit."""
    family.pretrain(tiny(tmp_path / "ray", num_workers=1, epochs=2))
    family.pretrain(tiny(tmp_path / "local", num_workers=0, epochs=2))
    assert_same_assignments(tmp_path / "ray", tmp_path / "local")


def test_two_runs_with_two_workers_are_equal(two_workers, tmp_path):
    family.pretrain(tiny(tmp_path, num_workers=2))
    assert_same_assignments(two_workers, tmp_path)


def test_every_image_is_clustered_once_when_rows_do_not_divide(two_workers):
    """1,437 images over 2 workers in batches of 128: tiny.assignments checks the ids of each epoch."""
    for clusters, _ in assignments(two_workers).values():
        assert len(clusters) == 1437
        assert clusters.min() >= 0


def test_nothing_of_ray_is_left_in_the_run_directory(two_workers):
    kept = {"assignments", "backbone.safetensors", "checkpoints", "config.json", "metrics.jsonl", "result.json", "shards"}
    assert {path.name for path in two_workers.iterdir()} == kept


def state_loop(job: Job):
    """One epoch; each rank's weights, and the features it extracts with them, by image_id."""
    run = Run(job)
    before = collect(run, run.model.backbone, run.images.extract("train"), Clock(0.0))
    assignment = deepcluster.extract_and_cluster(run, 0)
    deepcluster.reassign(run, assignment)
    deepcluster.train(run, assignment)
    whole = {key: value.double().sum().item() for key, value in run.model.state_dict().items()}
    gathered = gather((weights_hash(run.model), whole, before))
    if job.extras.get("weights"):
        run.model.load_state_dict(torch.load(job.extras["weights"], weights_only=True))
        after = gather(collect(run, run.model.backbone, run.images.extract("train"), Clock(0.0)))
        return gathered, after
    if run.worker.is_first:
        torch.save(run.model.state_dict(), Path(job.config.run_dir, "weights.pt"))
    return gathered, gather(collect(run, run.model.backbone, run.images.extract("train"), Clock(0.0)))


def by_id(pieces) -> np.ndarray:
    ids, features = (np.concatenate(column) for column in zip(*pieces, strict=True))
    assert sorted(ids.tolist()) == list(range(len(ids)))
    return features[np.argsort(ids)]


def test_ranks_end_an_epoch_with_equal_weights_and_extract_what_one_worker_would(tmp_path):
    config = tiny(tmp_path / "two", num_workers=2)
    gathered, after_two = fit(state_loop, config)
    hashes = {digest for digest, _, _ in gathered}
    assert len(hashes) == 1, "parameters or BatchNorm buffers differ between ranks"
    weights = str(tmp_path / "two" / "weights.pt")
    alone, after_one = fit(state_loop, tiny(tmp_path / "one", num_workers=1), weights=weights)
    np.testing.assert_allclose(by_id([before for _, _, before in gathered]), by_id([alone[0][2]]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(by_id(after_two), by_id(after_one), rtol=1e-4, atol=1e-4)


def deadly_loop(job: Job):
    """The loop of the package, but rank 1 is killed once, in the middle of training epoch 1."""
    from raydc import training

    real, calls, marker = training._one_step, [], Path(job.extras["marker"])

    def deadly(*args):
        calls.append(None)
        if len(calls) == 16 and dist.get_rank() == 1 and not marker.exists():
            marker.write_text("killed")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    training._one_step = deadly
    return deepcluster.loop(job)


def test_a_killed_worker_changes_nothing(two_workers, tmp_path, capsys):
    config = tiny(tmp_path, num_workers=2)
    run_dir = Folder(config.run_dir)
    data, manifest = prepare.open_data(config, run_dir)
    config = prepare.settle(config, None, run_dir, data, manifest)
    streams = stream.open_streams(config, data, manifest, cached=True, local=False)
    extras = {"labels": Shared(prepare.read_labels(data, manifest), local=False), "marker": str(tmp_path / "marker")}
    board, bank = Remote(Board, local=False, num_cpus=0), family.make_bank(config, 1437, False)
    job = Job(config, run_dir, board, streams, bank, extras, 0.0)
    result = launch.fit(deadly_loop, job, num_workers=2, use_gpu=False, max_failures=1)
    assert (tmp_path / "marker").exists()
    assert_same_assignments(two_workers, tmp_path)
    assert result["metrics"] == json.loads((two_workers / "result.json").read_text())["metrics"]
    assert "a worker died" in capsys.readouterr().out


@pytest.mark.slow
def test_going_on_with_another_number_of_workers(two_workers, tmp_path):
    """The committed labels of the epoch at hand stay; later epochs may differ (smaller batches in BatchNorm)."""
    family.pretrain(tiny(tmp_path, num_workers=2))
    (tmp_path / "result.json").unlink()
    for path in (tmp_path / "checkpoints").glob("epoch_0002"):
        (path / "state.pt").unlink()
    family.pretrain(tiny(tmp_path, num_workers=1))
    for epoch in ("epoch_0000", "epoch_0001", "epoch_0002"):
        np.testing.assert_array_equal(assignments(tmp_path)[epoch][0], assignments(two_workers)[epoch][0])


def test_a_restarted_bank_actor_is_noticed_and_filled_again(tmp_path):
    config = tiny(tmp_path, num_workers=1, epochs=1)
    fit(bank_killing_loop, config)
    assert assignments(tmp_path).keys() == {"epoch_0000", "epoch_0001"}


def test_two_actors_hold_one_bank_and_one_that_died_is_noticed(tmp_path):
    features = l2(np.random.default_rng(0).standard_normal((500, 8)).astype(np.float32))
    config = tiny(tmp_path, clustering={"num_clusters": 10})
    one, two = (family.make_bank(replace(config, bank=BankConfig(num_actors=num)), 500, num == 1) for num in (1, 2))
    found = []
    for bank in (one, two, two):
        token = bank.open()
        bank.send("push", token, np.arange(500), features)
        bank.flush()
        found.append(bank.cluster(token, 0, 0, ""))
    for other in found[1:]:
        np.testing.assert_array_equal(other.pseudo_labels, found[0].pseudo_labels)
        np.testing.assert_allclose(other.centroids, found[0].centroids, atol=1e-5)
    ray.kill(two.shards[1]._actor, no_restart=False)
    with pytest.raises(CoverageError):
        two.cluster(token, 0, 0, "")
    assert two.open() != token  # it is there again, and empty
    with pytest.raises(CoverageError, match="500 of 500 images"):
        two.cluster(two.open(), 0, 0, "")


@pytest.mark.slow
def test_two_actors_find_the_clusters_of_one_also_when_one_of_them_died(tmp_path):
    family.pretrain(tiny(tmp_path / "one", num_workers=0, epochs=1))
    fit(bank_killing_loop, tiny(tmp_path / "two", num_workers=1, epochs=1, bank={"num_actors": 2}), shard=1)
    one, two = assignments(tmp_path / "one"), assignments(tmp_path / "two")
    assert one.keys() == two.keys() == {"epoch_0000", "epoch_0001"}
    # The sums are rounded elsewhere: an image between two clusters may go to the other, and training then differs a little.
    assert (one["epoch_0000"][0] == two["epoch_0000"][0]).mean() > 0.99
    assert nmi(one["epoch_0001"][0], two["epoch_0001"][0]) > 0.9


def bank_killing_loop(job: Job):
    """The process of the bank, or of one of its shards, dies once, between extraction and clustering."""
    real, calls = deepcluster.cluster, []

    def deadly(run, epoch, token):
        calls.append(None)
        if len(calls) == 1:
            victim = run.bank.shards[job.extras["shard"]] if "shard" in job.extras else run.bank
            ray.kill(victim._actor, no_restart=False)
        return real(run, epoch, token)

    deepcluster.cluster = deadly
    try:
        return deepcluster.loop(job)
    finally:
        deepcluster.cluster = real


# --- streams ------------------------------------------------------------------------------------------------------------


def draws_loop(job: Job):
    """Two epochs of a lopsided assignment: what each rank is given, and the extraction views twice."""
    run = Run(job)
    passes = [
        gather(np.concatenate([ids for ids, _ in run.images.extract(split)] or [np.empty(0, int)]))
        for split in ("train", "val", "train")
    ]
    epochs = []
    for epoch in range(2):
        labels = lopsided(run.sizes["train"])
        assignment = Assignment(epoch, labels, np.zeros(len(labels), np.float32), np.zeros((40, 2), np.float32), 0.0, "")
        plan = deepcluster.make_plan(run.config, assignment)
        batches = [[(i, d) for i, d, _ in batch] for batch in run.images.draws(plan, epoch, run.config.train.batch_size)]
        epochs.append((plan.draws(), gather(batches)))
    return passes, epochs


def lopsided(num: int) -> np.ndarray:
    """40 clusters: ten of one image each, the others of the rest."""
    labels = 10 + np.arange(num) % 30
    labels[:10] = np.arange(10)
    return labels.astype(np.int32)


@pytest.mark.parametrize("decode", ["worker", pytest.param("tasks", marks=pytest.mark.slow)])
def test_a_stream_gives_every_draw_of_the_plan_once(tmp_path, decode):
    images = {"cache": "no", "decode": decode, "shuffle_buffer": 64}
    passes, epochs = fit(draws_loop, tiny(tmp_path, num_workers=2, images=images))
    for ids, rows in zip(passes, (1437, 360, 1437), strict=True):
        assert sorted(np.concatenate(ids).tolist()) == list(range(rows))
    for (image_ids, draws), ranks in epochs:
        planned = Counter(zip(image_ids.tolist(), draws.tolist(), strict=True))
        assert max(planned.values()) == 1
        streamed = Counter(pair for batches in ranks for batch in batches for pair in batch)
        assert streamed == planned
        assert len({len(batches) for batches in ranks}) == 1, "ranks have different numbers of steps"
        assert {len(batch) for batches in ranks for batch in batches} == {64}


def test_a_streamed_run_learns_and_covers_every_image(tmp_path):
    config = tiny(tmp_path, num_workers=1, epochs=1, images={"cache": "no", "decode": "worker"}, probe={"num_images": 300})
    result = family.pretrain(config)
    assert result["metrics"]["linear_top1"] > 0.3  # ten classes: chance is 0.1
    for clusters, _ in assignments(tmp_path).values():
        assert len(clusters) == 1437
        assert clusters.min() >= 0


def test_missing_resources_are_said_at_once(tmp_path):
    with pytest.raises(UsageError, match="64 workers need 66 CPUs .* lower --num-workers"):
        family.pretrain(tiny(tmp_path, num_workers=64))
    with pytest.raises(UsageError, match="needs 1 GPUs and 0 are there"):
        family.pretrain(tiny(tmp_path, num_workers=1, use_gpu="yes"))


def test_a_nan_loss_ends_the_run_and_keeps_the_last_checkpoint(tmp_path):
    config = tiny(tmp_path, num_workers=1, train={"lr": 1e30})
    with pytest.raises(deepcluster.RunError, match=r"the loss is not finite in epoch 0.*lower train\.lr"):
        family.pretrain(config)
    assert not (tmp_path / "result.json").exists()
    assert checkpoint.load_assignment(Folder(str(tmp_path)), 0) is not None


def fine_tuning_killed_once(job: Job):
    """The loop of semisup, but its worker is killed at the end of epoch 2."""
    marker, commit = Path(job.run_dir.root, "killed"), Learner.commit

    def killed(learner, epoch, metrics):
        if epoch == 2 and not marker.exists():
            marker.write_text("killed")
            os.kill(os.getpid(), signal.SIGKILL)
        commit(learner, epoch, metrics)

    Learner.commit = killed
    return semisup.loop(job)


@pytest.mark.slow
def test_a_killed_worker_changes_no_figure_of_a_benchmark(two_workers, tmp_path, monkeypatch, capsys):
    candidate, given = open_backbone(str(two_workers)), {"fraction": 0.1, "epochs": 6, "threads": 1, "num_workers": 1}
    given |= {"backbone": "", "data": str(two_workers / "shards")}
    whole = semisup.run(Semisup(run_dir=str(tmp_path / "whole"), **given), candidate)
    capsys.readouterr()
    monkeypatch.setattr(semisup, "loop", fine_tuning_killed_once)
    rows = semisup.run(Semisup(run_dir=str(tmp_path / "killed"), **given), candidate)
    assert "a worker died" in capsys.readouterr().out
    assert rows == whole
    one, other = (open_backbone(str(tmp_path / name)).fingerprint for name in ("whole", "killed"))
    assert one == other


def segmentation_killed_once(job: Job):
    """The loop of detection and segmentation, but its worker is killed at the end of round 1."""
    marker, commit = Path(job.run_dir.root, "killed"), dense.DenseSession.commit

    def killed(session, number, metrics):
        if number == 1 and not marker.exists():
            marker.write_text("killed")
            os.kill(os.getpid(), signal.SIGKILL)
        commit(session, number, metrics)

    dense.DenseSession.commit = killed
    return dense_loop(job)


@pytest.mark.slow
def test_a_killed_worker_changes_no_figure_of_segmentation(two_workers, tmp_path, real_data, monkeypatch, capsys):
    candidate = open_backbone(str(two_workers))
    few = {"preset": "camvid_fcn", "max_iters": 6, "rounds": 3, "batch_size": 4, "crop_size": 64, "threads": 1}
    given = {"backbone": "", "data": str(real_data / "camvid"), "num_workers": 1} | few
    whole = segmentation.run(Segmentation(run_dir=str(tmp_path / "whole"), **given), candidate)
    monkeypatch.setattr(dense, "loop", segmentation_killed_once)
    rows = segmentation.run(Segmentation(run_dir=str(tmp_path / "killed"), **given), candidate)
    assert (tmp_path / "killed" / "trial_0" / "killed").exists() and "a worker died" in capsys.readouterr().out
    assert rows == whole
