"""The command line of jobs/pretrain.py, and what a run leaves behind."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from tiny import assignments

from raydc import RECIPES, Config, Folder, UsageError, launch, load_backbone, make_shards, prepare
from raydc import config as configs

JOB = Path(__file__).resolve().parents[1] / "jobs" / "pretrain.py"
TINY = "--num-workers 0 --train.batch-size 128 --train.plan-length 1 --train.threads 1 --model.width 4 --model.stem-stride 2"


def job(*arguments: str) -> int:
    """The exit code of the command line, run in this process."""
    spec = importlib.util.spec_from_file_location("pretrain_job", JOB)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        recipe = [one for one in arguments[:1] if not one.startswith("--")]  # it stands before the fields
        return module.main([*recipe, *TINY.split(), *arguments[len(recipe) :]])
    except SystemExit as stop:  # the parser's own
        return stop.code


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("run") / "digits"
    assert job("--run-dir", str(run_dir), "--train.epochs", "2", "--train.schedule-epochs", "2") == 0
    return run_dir


def test_the_last_line_is_the_result_file_and_the_table_has_three_rows(tmp_path, capsys):
    assert job("--run-dir", str(tmp_path), "--train.epochs", "1", "--train.schedule-epochs", "1") == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-1] == f"{tmp_path}/result.json"
    assert [line[:12].strip() for line in lines[-4:-1]] == ["raw pixels", "random init", "trained"]
    for phase in ("extract", "cluster", "train"):
        assert any(phase in line for line in lines)


def test_result_json_holds_what_it_promises(finished):
    result = json.loads((finished / "result.json").read_text())
    facts = "recipe seed num_images num_clusters epochs data_fingerprint versions num_empty_clusters"
    assert set(facts.split()) | {"metrics", "phase_s", "images_per_s"} <= set(result)
    assert (result["recipe"], result["seed"], result["num_images"], result["num_clusters"]) == ("digits", 0, 1437, 100)
    figures = ["nmi_labels", "nmi_classes", "knn_top1", "linear_top1"]
    for key in [*figures, *(f"{f}_{row}" for f in figures for row in ("random", "pixels"))]:
        assert 0 <= result["metrics"][key] <= 1
    assert set(result["phase_s"]) >= {"extract", "cluster", "train", "start_up"}
    # calibration: 20-NN of raw 8x8 digits .972, probe with ten labels a class .904 (another split: +- .04)
    assert result["metrics"]["knn_top1_pixels"] == pytest.approx(0.972, abs=0.04)
    assert result["metrics"]["linear_top1_pixels"] == pytest.approx(0.904, abs=0.04)


def test_every_file_of_the_run_directory(finished):
    assert set(assignments(finished)) == {"epoch_0000", "epoch_0001", "epoch_0002"}
    table = pq.read_table(finished / "assignments/epoch_0002.parquet")
    assert table.column_names == ["image_id", "cluster", "distance"]
    config = json.loads((finished / "config.json").read_text())
    assert config["chosen"]["images"]["cache"] in ("yes", "no")
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert all({"epoch", "phase"} <= set(line) for line in lines)


def test_the_backbone_loads_anywhere(finished):
    tensors = safetensors.torch.load_file(finished / "backbone.safetensors")
    assert "conv1.weight" in tensors
    assert not any(key.startswith(("norm", "sobel", "head", "backbone")) for key in tensors)
    backbone, metadata = load_backbone(Folder(str(finished)))
    assert json.loads(metadata["model"])["architecture"] == "resnet10"
    assert metadata["input_size"] == "16"
    assert backbone(torch.zeros(2, 3, 16, 16)).shape == (2, backbone.feature_dim)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cifr10"], "there is no recipe 'cifr10'; did you mean cifar10_resnet18?"),
        (["--seed", "1", "digits"], "digits stands after the fields and must stand before them: pretrain.py digits"),
        (["--recipe", "digits"], "--recipe is no field: the recipe is the first word"),
        (["--train.epoch", "3"], "there is no --train.epoch; did you mean --train.epochs?"),
        (["--train.epochs", "many"], "--train.epochs is many; give a whole number"),
        (["--model.stem", "big"], "--model.stem is big; give imagenet, small"),
        (["--train.lr", "0"], "train.lr is 0.0; give a positive number"),
        (["--images.hue", "2"], "images.hue is 2.0; give 0 to 0.5"),
        (["cifar10_resnet18"], "recipe cifar10_resnet18 needs images; make shards with jobs/make_shards.py"),
        (["cifar10_resnet18", "--data", "nowhere"], "holds no manifest.json; make shards"),
        (["cifar10_resnet18", "--data", "s3x://bucket"], "is not a place pyarrow can open"),
        (["--clustering.num-clusters", "1438"], "clustering.num_clusters 1438 is above the number of images 1437; lower it"),
        (["--use-gpu", "yes"], "needs 1 GPUs and 0 are there"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert job(*arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("error: ") and words in line


def flags(config, prefix: str = "--"):
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        name = prefix + spec.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield from flags(value, f"{name}.")
        else:
            yield name


def test_help_shows_two_examples_and_every_field_but_the_recipe(capsys):
    assert job("--help") == 0
    said = capsys.readouterr().out
    head = said[: said.index("--seed INT")]
    assert "  pretrain.py cifar10_resnet18 --data SHARDS --run-dir DIR" in head
    assert len([line for line in head.splitlines() if line.startswith("  pretrain.py")]) == 2
    assert all(recipe in head for recipe in RECIPES)
    shown = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", said))
    assert set(flags(Config())) - {"--recipe"} <= shown
    assert "--recipe" not in shown
    assert "Rounds of extract, cluster, reassign, train. (default: 5)" in said


def test_help_of_a_recipe_shows_its_defaults(capsys):
    assert job("cifar10_resnet18", "--help") == 0
    assert "Rounds of extract, cluster, reassign, train. (default: 8)" in capsys.readouterr().out


@pytest.fixture
def without_ray(monkeypatch):
    """Whoever starts Ray fails."""

    def attach(*_):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(launch, "attach", attach)


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cifar10_resnet18"], "needs images"),
        (["cifar10_resnet18", "--data", "nowhere"], "holds no manifest.json"),
        (["--clustering.num-clusters", "1438"], "above the number of images"),
    ],
)
def test_what_needs_no_ray_is_said_before_it_starts(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert job(*arguments, "--num-workers", "1") == 2
    assert words in capsys.readouterr().err


@pytest.mark.usefixtures("without_ray")
def test_a_finished_run_answers_without_ray(finished, capsys):
    two = ["--train.epochs", "2", "--train.schedule-epochs", "2", "--num-workers", "1"]
    assert job("--run-dir", str(finished), *two) == 0
    said = capsys.readouterr().out
    assert "this run is finished" in said
    assert said.splitlines()[-1] == f"{finished}/result.json"
    assert job("--run-dir", str(finished), *two, "--seed", "1") == 2
    assert "seed is 0 there and 1 here" in capsys.readouterr().err


def test_a_run_directory_of_another_recipe_is_refused_before_anything_is_written(finished, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    shutil.rmtree(run_dir / "shards")
    before = sorted(run_dir.rglob("*"))
    assert job("--run-dir", str(run_dir), "--seed", "7") == 2
    assert "belongs to another config" in capsys.readouterr().err
    assert sorted(run_dir.rglob("*")) == before


def test_a_run_goes_on_with_other_threads_and_says_so(finished, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    (run_dir / "result.json").unlink()
    two = ["--train.epochs", "2", "--train.schedule-epochs", "2"]
    assert job("--run-dir", str(run_dir), *two, "--train.threads", "2") == 0
    assert "1 threads before, 2 now" in capsys.readouterr().out
    assert (run_dir / "result.json").exists()


@pytest.mark.parametrize(
    ("before", "now", "threads"), [(0, 0, 3), (5, 5, 5), (5, 2, 2), (5, 0, len(os.sched_getaffinity(0))), (0, 7, 7)]
)
def test_threads_are_chosen_once_until_others_are_asked_for(tmp_path, before, now, threads):
    """``before`` was asked for by the first start, which was of a machine of three CPUs."""
    config = dataclasses.replace(RECIPES["digits"](), num_workers=0, use_gpu="no")
    first, later = (
        dataclasses.replace(config, train=dataclasses.replace(config.train, threads=asked)) for asked in (before, now)
    )
    precise = dataclasses.replace(first.train, threads=before or 3, precision="fp32", channels_last="no")
    chosen = dataclasses.replace(first, train=precise)
    written = {"config": configs.to_dict(first), "chosen": configs.to_dict(chosen)}
    found = prepare.settle(later, written, Folder(str(tmp_path)), None, None)
    assert found.train == dataclasses.replace(precise, threads=threads)


def test_a_busy_machine_is_named_with_the_remedy(monkeypatch, tmp_path):
    loadavg = tmp_path / "loadavg"
    every, cpus = os.sched_getaffinity(0), os.cpu_count()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)))
    told = {f"{cpus}.00 1.0 1.0 2/99 1": True, f"{cpus}.00 1.0 1.0 1/99 1": False, "0.10 1.0 1.0 2/99 1": False, "?": False}
    for line, busy in told.items():
        loadavg.write_text(line)
        assert prepare.others_are_busy(loadavg) == busy
    assert not prepare.others_are_busy(tmp_path / "none")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: every - {min(every)})
    loadavg.write_text(f"{cpus}.00 1.0 1.0 2/99 1")
    assert not prepare.others_are_busy(loadavg)
    config = dataclasses.replace(RECIPES["digits"](), use_gpu="no")
    for threads, cached, busy in ((2, True, True), (1, True, False), (2, None, False)):
        one = dataclasses.replace(config, train=dataclasses.replace(config.train, threads=threads))
        streams = SimpleNamespace(sizes={"train": 1437}, cached=cached)
        assert ("--train.threads 1" in prepare.headline(one, streams, Folder(str(tmp_path)), busy=True)) == busy


@pytest.mark.parametrize(("flag", "run_dir", "data"), [("--run-dir", "/runs", "/data"), ("--data", "mock:///runs", "/data")])
def test_a_path_of_one_node_is_refused_on_several(monkeypatch, flag, run_dir, data):
    monkeypatch.setattr(launch, "nodes", lambda: [{}, {}])
    monkeypatch.setattr(launch.ray, "cluster_resources", lambda: {"CPU": 64})
    monkeypatch.delenv("RAYDC_SHARED_RUN_DIR", raising=False)
    with pytest.raises(UsageError, match=f"2 nodes and {flag} "):
        launch.check_resources(2, Folder(run_dir), Folder(data))
    monkeypatch.setenv("RAYDC_SHARED_RUN_DIR", "1")
    launch.check_resources(2, Folder(run_dir), Folder(data))


def test_a_start_removes_what_a_kill_left_half_written(tmp_path):
    left = ("metrics.jsonl", "config.json", "checkpoints/epoch_0000/state.pt", "assignments/epoch_0000.parquet")
    kept = ("notes.part", "film.0123abcd.part", "checkpoints/epoch_0000/readme.0123abcd.part")
    for name in [*(f"{name}.0123abcd.part" for name in left), "shards/manifest.json.0123abcd.part", *kept]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("half")
    assert job("--run-dir", str(tmp_path), "--train.epochs", "1", "--train.schedule-epochs", "1") == 0
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.part")} == set(kept)


def test_sigterm_is_one_sentence_and_the_same_command_goes_on(tmp_path):
    command = [sys.executable, str(JOB), *TINY.split(), "--run-dir", str(tmp_path), "--train.schedule-epochs", "0"]
    command += ["--train.epochs", "12", "--probe.every", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        next(line for line in process.stdout if "epoch   1/12  train" in line)
        process.terminate()
        rest, said = process.communicate(timeout=120)
    assert process.returncode == 143
    assert said == "stopped by SIGTERM; the same command goes on where it was\n"
    assert "12/12" not in rest
    assert not (tmp_path / "result.json").exists()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"going on in epoch ([1-9]|1[01]): ", done.stdout)


def test_a_run_directory_of_another_config_is_refused(finished, capsys):
    assert job("--run-dir", str(finished), "--train.epochs", "2", "--train.schedule-epochs", "3") == 2
    assert "train.schedule_epochs is 2 there and 3 here. Give another --run-dir" in capsys.readouterr().err


def test_shards_that_changed_under_a_running_name_are_refused(tmp_path, capsys):
    shards = tmp_path / "shards"
    make_shards("digits", str(shards), use_ray=False, progress=False)
    arguments = [
        "--data",
        str(shards),
        "--run-dir",
        str(tmp_path / "run"),
        "--train.epochs",
        "1",
        "--train.schedule-epochs",
        "1",
    ]
    assert job(*arguments) == 0
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(shards)
    make_shards("digits", str(shards), seed=1, use_ray=False, progress=False)
    assert job(*arguments) == 2
    assert "are not those" in capsys.readouterr().err


def test_images_without_labels_or_val_train_all_the_same(tmp_path, real_data, capsys):
    """A flat folder of CIFAR images, no val split: figures that need labels are null."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in sorted((real_data / "cifar10/test").rglob("*.jpg"))[:150]:
        shutil.copy(file, flat / f"{file.parent.name}_{file.name}")
    make_shards(str(flat), str(tmp_path / "shards"), val_fraction=0, use_ray=False, progress=False)
    more = ["--clustering.num-clusters", "20", "--train.epochs", "1", "--train.schedule-epochs", "1"]
    assert job("cifar10_resnet18", "--data", str(tmp_path / "shards"), "--run-dir", str(tmp_path / "run"), *more) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["metrics"]["linear_top1"] is None
    assert result["metrics"]["nmi_labels"] is None
    assert result["metrics"]["loss"] > 0
