"""Stop anywhere and go on: what comes out is what an uninterrupted run gives, bit for bit (CPU, cached)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tiny import assert_same_assignments, tiny

from raydc import checkpoint, deepcluster, family, training
from raydc.clustering.bank import CoverageError, FeatureBank

ROOT = Path(__file__).resolve().parents[1]


class Killed(BaseException):
    """Stands for a kill: nothing in the package may catch it."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole")
    family.pretrain(tiny(run_dir))
    return run_dir


def die_at(monkeypatch, owner, name: str, call: int, *, after: bool = False) -> None:
    """The ``call``-th call of a function ends the run, before it or just after it."""
    real, calls = getattr(owner, name), []

    def deadly(*args, **kwargs):
        calls.append(None)
        if len(calls) == call and not after:
            raise Killed
        result = real(*args, **kwargs)
        if len(calls) == call and after:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, deadly)


def journal(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


STEPS = 11  # of an epoch of the tiny run: 1,437 images in batches of 128
PLACES = {
    "extract of the first epoch": (FeatureBank, "push", 1, False),
    "extract of epoch 1": (FeatureBank, "add_moments", 2, False),
    "k-means of epoch 1": (FeatureBank, "cluster", 2, True),
    "commit of the first labels": (checkpoint, "save_assignment", 1, True),
    "commit of the labels of epoch 1": (checkpoint, "save_assignment", 2, True),
    "first step of epoch 1": (training, "_one_step", STEPS + 1, False),
    "middle of training of epoch 1": (training, "_one_step", STEPS + 6, True),
    "before the checkpoint of epoch 1": (checkpoint, "save_state", 2, False),
    "after the checkpoint of epoch 1": (checkpoint, "save_state", 2, True),
    "final clustering": (FeatureBank, "cluster", 4, False),
    "after the last commit": (checkpoint, "save_assignment", 4, True),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_run_goes_on_with_the_same_labels(uninterrupted, tmp_path, monkeypatch, place):
    owner, name, call, after = PLACES[place]
    with monkeypatch.context() as patch:
        die_at(patch, owner, name, call, after=after)
        with pytest.raises(Killed):
            family.pretrain(tiny(tmp_path))
    family.pretrain(tiny(tmp_path))
    assert_same_assignments(uninterrupted, tmp_path)
    ours, theirs = (json.loads((p / "result.json").read_text()) for p in (tmp_path, uninterrupted))
    assert ours["metrics"] == theirs["metrics"]


def test_training_goes_on_without_extracting_again(tmp_path, monkeypatch):
    """Killed in training: the committed labels are used, the phase before it is not repeated."""
    with monkeypatch.context() as patch:
        die_at(patch, training, "_one_step", STEPS + 6)
        with pytest.raises(Killed):
            family.pretrain(tiny(tmp_path, epochs=2))
    with monkeypatch.context() as patch:
        die_at(patch, FeatureBank, "open", 1)  # the next extraction
        with pytest.raises(Killed):
            family.pretrain(tiny(tmp_path, epochs=2))
    phases = [(line["epoch"], line["phase"]) for line in journal(tmp_path)]
    assert phases.count((1, "extract")) == 1
    assert phases.count((1, "train")) == 1


def test_labels_of_other_weights_are_not_used(tmp_path, monkeypatch):
    """A committed assignment whose stamp is not today's weights is made again."""
    with monkeypatch.context() as patch:
        die_at(patch, checkpoint, "save_assignment", 2, after=True)
        with pytest.raises(Killed):
            family.pretrain(tiny(tmp_path, epochs=2))
    (tmp_path / "checkpoints/epoch_0000/state.pt").unlink()  # so that the weights are those of epoch 0 again
    family.pretrain(tiny(tmp_path, epochs=2))
    phases = [line["phase"] for line in journal(tmp_path)]
    assert phases.count("cluster") == 3


def test_a_finished_run_is_not_trained_again(uninterrupted, monkeypatch, capsys):
    die_at(monkeypatch, FeatureBank, "open", 1)
    result = family.pretrain(tiny(uninterrupted))
    assert result == json.loads((uninterrupted / "result.json").read_text())
    assert "finished" in capsys.readouterr().out


def test_metrics_hold_each_phase_once(uninterrupted):
    paper = ["extract", "cluster", "train"]
    for epoch in range(3):
        phases = [line["phase"] for line in journal(uninterrupted) if line["epoch"] == epoch]
        assert [phase for phase in phases if phase in paper] == paper


def test_a_bank_that_lost_its_features_is_filled_again(uninterrupted, tmp_path, monkeypatch):
    real, calls = FeatureBank.cluster, []

    def forgetful(self, token, *args):
        calls.append(None)
        if len(calls) == 2:
            self.open()  # what a restarted actor looks like to its callers: another pass, nothing in it
        return real(self, token, *args)

    monkeypatch.setattr(FeatureBank, "cluster", forgetful)
    family.pretrain(tiny(tmp_path))
    assert_same_assignments(uninterrupted, tmp_path)


def test_a_bank_that_never_works_ends_the_run(tmp_path, monkeypatch):
    def broken(self, *_):
        raise CoverageError("lost")

    monkeypatch.setattr(FeatureBank, "cluster", broken)
    with pytest.raises(deepcluster.RunError, match="could not be clustered in 3 tries"):
        family.pretrain(tiny(tmp_path))


def test_sigkill_of_the_process(uninterrupted, tmp_path):
    """The real signal, from inside the second epoch's training."""
    script = textwrap.dedent(f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from tiny import tiny
        from raydc import family, training
        real, calls = training._one_step, []
        def deadly(*args):
            calls.append(None)
            if len(calls) == {STEPS + 4}:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)
        training._one_step = deadly
        family.pretrain(tiny(Path({str(tmp_path)!r})))
    """)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, env=env)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    family.pretrain(tiny(tmp_path))
    assert_same_assignments(uninterrupted, tmp_path)
