"""The same command on a cluster: a real head on this machine, jobs submitted to it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
TINY = ["--train.batch-size", "128", "--train.plan-length", "1", "--model.width", "4", "--model.stem-stride", "2"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """The address of a head started from this environment; its job agent gets a port that no other Ray here has."""
    port, dashboard, agent = free_port(), free_port(), free_port()
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    env |= {"PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled"}
    options = [f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}", "--num-cpus=4"]
    folder = tmp_path_factory.mktemp("head")
    command = [BIN / "ray", "start", "--head", *options, "--block", "--disable-usage-stats"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=folder)
        yield f"http://127.0.0.1:{dashboard}", env
        process.terminate()
        process.wait(60)


def submit(head, *arguments: str, tries: int = 6) -> subprocess.CompletedProcess:
    """Once the head's agent is up, which is some seconds after the dashboard answers."""
    address, env = head
    command = [BIN / "ray", "job", "submit", "--address", address, "--working-dir", ".", *arguments]
    for _ in range(tries):
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
        if "No available agent" not in done.stderr and "Failed to connect" not in done.stderr:
            return done
        time.sleep(5)
    return done


def test_a_job_trains_and_its_exit_code_and_log_arrive(head, tmp_path):
    done = submit(head, "--", "python", "jobs/pretrain.py", "--run-dir", str(tmp_path), "--train.epochs", "1", *TINY)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert f"{tmp_path}/result.json" in done.stdout
    assert "epoch   0/1  train" in done.stdout
    assert json.loads((tmp_path / "result.json").read_text())["num_workers"] == 1


def test_wrong_usage_in_a_job_fails_with_its_sentence(head, tmp_path):
    done = submit(head, "--", "python", "jobs/pretrain.py", "--train.epochs", "1")
    assert done.returncode != 0
    assert "is relative to a job's temporary folder; give a full path or a URI" in done.stdout


def test_a_stopped_job_goes_on(head, tmp_path):
    address, env = head
    long = [
        "python",
        "jobs/pretrain.py",
        "--run-dir",
        str(tmp_path),
        "--train.epochs",
        "20",
        "--train.schedule-epochs",
        "0",
        *TINY,
    ]
    assert submit(head, "--no-wait", "--submission-id", "to-be-stopped", "--", *long).returncode == 0
    deadline = time.time() + 240
    while not list(tmp_path.glob("checkpoints/*/state.pt")):
        assert time.time() < deadline, "the job never committed an epoch"
        time.sleep(0.5)
    stop, logs = ([BIN / "ray", "job", verb, "--address", address, "to-be-stopped"] for verb in ("stop", "logs"))
    assert subprocess.run(stop, env=env, capture_output=True, timeout=120).returncode == 0
    assert not (tmp_path / "result.json").exists()
    said = subprocess.run(logs, env=env, capture_output=True, text=True, timeout=120).stdout
    assert "joining the cluster at" in said
    assert "stopped by SIGTERM; the same command goes on where it was" in said
    assert "Stack trace" not in said and "SIGTERM received" not in said
    done = submit(head, "--", *long)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "going on in epoch" in done.stdout


def test_sigterm_ends_a_run_and_the_ray_it_started(tmp_path):
    """One sentence on stderr, nothing of the session left, and the same command goes on."""
    command = [sys.executable, ROOT / "jobs/pretrain.py", "--run-dir", tmp_path, "--train.epochs", "20"]
    command += ["--train.schedule-epochs", "0", "--probe.every", "0", *TINY]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **streams) as process:
        assert process.stdout.readline() == "starting Ray on this machine (3 CPUs) ...\n"
        next(line for line in process.stdout if "epoch   1/20  train" in line)
        process.terminate()
        _, said = process.communicate(timeout=200)
    assert process.returncode == 143
    assert said == "stopped by SIGTERM; the same command goes on where it was\n"
    deadline = time.time() + 60
    while left := processes_of_session(process.pid):
        assert time.time() < deadline, left
        time.sleep(0.5)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "going on in epoch" in done.stdout


def processes_of_session(leader: int) -> list[str]:
    found = subprocess.run(["ps", "-o", "stat=,args=", "-s", str(leader)], capture_output=True, text=True).stdout
    return [line for line in found.splitlines() if not line.startswith("Z")]
