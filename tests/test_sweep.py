"""The sweep from the command line: a table of all points, one failing, nothing repeated, the best of separate runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raydc.benchmarks import semisup
from raydc.benchmarks.options import Semisup
from raydc.benchmarks.setting import open_backbone

SCRIPT = Path(__file__).resolve().parents[1] / "tuning" / "semisup.py"
pytestmark = pytest.mark.usefixtures("one_thread")


def sweep(place: Path, *more: str) -> subprocess.CompletedProcess:
    arguments = ["--backbone", place / "run", "--data", place / "shards", "--run-dir", "sweep"]
    fields = ["--fraction", "0.2", "--epochs", "6", "--lr", "1e-1", "1e30", "--head-factor", "1", "10"]
    command = [sys.executable, SCRIPT, *arguments, *fields, *more]
    # A relative run directory, for trials work elsewhere.
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=400, env=environment, cwd=place)


@pytest.fixture(scope="module")
def swept(place) -> subprocess.CompletedProcess:
    return sweep(place)


def test_every_point_is_in_the_table_and_a_failure_fails_nobody_else(place, swept):
    assert swept.returncode == 0, swept.stderr
    lines = swept.stdout.splitlines()
    assert lines[-1] == str(place / "sweep" / "scorecard.json")
    table = {
        line.split()[0]: line for line in lines[lines.index(next(x for x in lines if x.startswith("trial "))) :] if line
    }
    assert sum("best" in table[name] for name in ("lr1e-1_head1", "lr1e-1_head10")) == 1
    for name in ("lr1e30_head1", "lr1e30_head10"):
        assert "failed" in table[name] and "not finite" in table[name]


def test_the_best_is_the_best_of_separate_runs(place, swept):
    values = {}
    for factor in (1.0, 10.0):
        alone = Semisup(
            backbone="",
            data=str(place / "shards"),
            run_dir=str(place / f"alone{factor:g}"),
            num_workers=0,
            threads=1,
            fraction=0.2,
            epochs=6,
            lr=0.1,
            head_factor=factor,
        )
        rows = semisup.run(alone, open_backbone(str(place / "run")))
        there = json.loads((place / "sweep" / "trials" / f"lr1e-1_head{factor:g}" / "result.json").read_text())["figures"]
        assert rows[0].value == pytest.approx(there["top1"], abs=0.005)
        values[factor] = rows[0].value
        one, other = (
            open_backbone(str(place / name)) for name in (f"alone{factor:g}", f"sweep/trials/lr1e-1_head{factor:g}")
        )
        assert one.fingerprint == other.fingerprint  # bit for bit
    written = json.loads((place / "sweep" / "scorecard.json").read_text())["rows"]
    assert written[0]["value"] == max(values.values())
    assert any("best of 2 settings" in note for note in written[0]["notes"])


@pytest.mark.slow
def test_a_second_run_repeats_no_finished_trial(place, swept):
    results = sorted((place / "sweep" / "trials").glob("*/result.json"))
    before = [(path.stat().st_mtime_ns, path.read_text()) for path in results]
    again = sweep(place)
    assert again.returncode == 0, again.stderr
    assert "2 trials, " in again.stdout  # those that failed are tried again
    assert [(path.stat().st_mtime_ns, path.read_text()) for path in results] == before
    tables = [
        done.stdout[done.stdout.index("trial  ") : done.stdout.index("semisup_20percent\n\n")] for done in (swept, again)
    ]
    assert tables[0] == tables[1]


def test_another_grid_in_the_same_place_is_refused(place, swept):
    other = sweep(place, "--batch-size", "128")
    assert other.returncode == 2
    assert "batch_size is 256 there and 128 here" in other.stderr


@pytest.mark.slow
def test_a_killed_sweep_ends_in_the_same_table(place, swept, tmp_path):
    import signal
    import time

    killed = tmp_path / "killed"
    arguments = [*swept.args, "--run-dir", str(killed)]  # the last of two counts
    running = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    until = time.monotonic() + 300
    while not list(killed.glob("trials/*/result.json")) and time.monotonic() < until:
        time.sleep(0.1)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    before = {path: path.stat().st_mtime_ns for path in killed.glob("trials/*/result.json")}
    assert before
    again = subprocess.run(arguments, capture_output=True, text=True, timeout=400)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    tables = [
        done.stdout[done.stdout.index("trial  ") : done.stdout.index("semisup_20percent\n\n")] for done in (swept, again)
    ]
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_trials_on_ray_train_and_early_stopping(place, swept, tmp_path):
    """Each trial on a worker of Ray Train, and ASHA, which says where it stopped."""
    more = ["--run-dir", str(tmp_path / "nested"), "--num-workers", "1", "--asha", "--lr", "1e-1", "1e-3"]
    done = subprocess.run([*swept.args, *more], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("lr1e-")]
    ends = {line.split()[0]: line for line in lines}
    assert set(ends) == {"lr1e-1_head1", "lr1e-1_head10", "lr1e-3_head1", "lr1e-3_head10"}
    again = subprocess.run([*swept.args, *more], capture_output=True, text=True, timeout=500)
    assert " trials, " not in again.stdout  # neither finished nor stopped ones are begun again
