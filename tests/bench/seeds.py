"""A recipe over several seeds: mean and spread of its figures, wall and CPU seconds.

uv run python tests/bench/seeds.py digits --json digits.json
uv run python tests/bench/seeds.py cifar10_resnet18 --data SHARDS --runs runs/seeds --json cifar.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

JOB = Path(__file__).resolve().parents[2] / "jobs" / "pretrain.py"
FIGURES = ("nmi_labels", "nmi_classes", "knn_top1", "linear_top1")


def one(recipe: str, seed: int, run_dir: Path, more: list[str]) -> dict:
    """The result of one seed; a run directory that is finished already is only read, one begun is gone on with."""
    began = time.time()
    command = [sys.executable, str(JOB), recipe, "--seed", str(seed), "--run-dir", str(run_dir), *more]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    result = json.loads((run_dir / "result.json").read_text())
    return result | {"wall_s": round(time.time() - began, 1)}


def row(name: str, values: list[float | None]) -> dict | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    spread = statistics.stdev(known) if len(known) > 1 else 0.0
    return {"row": name, "value": round(statistics.mean(known), 4), "spread": round(spread, 4), "values": known}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, help="where the run directories go; default: a temporary folder")
    parser.add_argument("--json", type=Path)
    arguments, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = arguments.runs or Path(scratch)
        results = [one(arguments.recipe, seed, runs / f"seed{seed}", more) for seed in range(arguments.seeds)]
    rows = [
        row(f"{key}{suffix}", [result["metrics"][key + suffix] for result in results])
        for key in FIGURES
        for suffix in ("", "_random", "_pixels")
    ]
    for phase in ("start_up", "extract", "cluster", "train", "probe"):
        rows.append(row(f"{phase}_s", [result["phase_s"][phase] for result in results]))
    for phase in ("extract", "train"):
        rows.append(row(f"{phase}_cpu_s", [result["cpu_s"][phase] for result in results]))
    rows.append(row("wall_s", [result["wall_s"] for result in results]))
    rows = [one_row for one_row in rows if one_row]
    for one_row in rows:
        print(f"{one_row['row']:<22}{one_row['value']:>9.3f} +- {one_row['spread']:.3f}   {one_row['values']}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
