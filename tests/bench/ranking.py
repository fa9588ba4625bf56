"""Can the benchmarks tell a supervised backbone from a random one? And where are our features between them?

    uv run python tests/bench/ranking.py --network cifar10_resnet18 --ours runs/cifar10 --data SHARDS --runs runs/ranking

Trains a supervised backbone (semisup with all labels, fresh weights), runs ``benchmark.py all`` for it, for random
weights and for ours, with several seeds (fresh weights, labels, heads), and prints mean and spread side by side. What is in
--runs already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

JOB = Path(__file__).resolve().parents[2] / "jobs" / "benchmark.py"


def job(name: str, backbone: str, data: list[str], run_dir: Path, *more: str) -> None:
    fields = ["--backbone", backbone, "--data", *data, "--run-dir", str(run_dir), *more]
    subprocess.run([sys.executable, str(JOB), name, *fields], check=True, stdout=subprocess.DEVNULL)


def values(folder: Path) -> dict[tuple[str, str], float]:
    rows = json.loads((folder / "scorecard.json").read_text())["rows"]
    return {(row["benchmark"], row["column"]): row["value"] for row in rows}


def mean_and_spread(numbers: list[float]) -> tuple[float, float]:
    return statistics.mean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", required=True, help="recipe whose network is trained with labels")
    parser.add_argument("--ours", help="run directory of features learnt without labels")
    parser.add_argument("--data", nargs="+", required=True, help="shards to measure on, and VOC2007 folders")
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--supervised-epochs", default="6")
    parser.add_argument("--epochs", default="3", help="of linear")
    parser.add_argument("--fractions", nargs="+", default=["0.01"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    fresh, supervised = f"random:{arguments.network}", arguments.runs / "supervised"
    training = ["--fraction", "1", "--lr", "0.1", "--batch-size", "128", "--epochs", arguments.supervised_epochs]
    job("semisup", fresh, arguments.data[:1], supervised, *training)
    backbones = {"random": fresh, "ours": arguments.ours, "supervised": str(supervised)}
    found: dict[str, list[dict]] = {}
    for seed in range(arguments.seeds):
        for name, backbone in backbones.items():
            if backbone:
                place = arguments.runs / f"{name}_{seed}"
                options = ["--seed", str(seed), "--epochs", arguments.epochs, "--fractions", *arguments.fractions]
                job("all", backbone, arguments.data, place, *options)
                found.setdefault(name, []).append(values(place))
    rows = []
    print(f"{'benchmark':<20}{'column':<10}" + "".join(f"{name:>18}" for name in found) + "  supervised beats random")
    for benchmark, column in found["random"][0]:
        cells = {name: mean_and_spread([one[benchmark, column] for one in seeds]) for name, seeds in found.items()}
        (low, low_spread), (high, high_spread) = cells["random"], cells["supervised"]
        ok = high - low > low_spread + high_spread
        text = "".join(f"{mean:>10.2f} +- {spread:<4.2f}" for mean, spread in cells.values())
        print(f"{benchmark:<20}{column:<10}{text}  {'yes' if ok else 'NO'}")
        rows.append({"row": f"{benchmark} {column}", "ok": ok} | cells)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
