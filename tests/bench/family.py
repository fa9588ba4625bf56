"""The family on CIFAR-10 at equal compute: what each option and each algorithm learns for the same CPU seconds.

uv run python tests/bench/family.py --data SHARDS --runs runs/family --seeds 1
uv run python tests/bench/family.py --table

A row is the recipe cifar10_resnet18 with one thing changed. Its number of epochs and the length of its plans are chosen from
what each phase costs on a quiet machine (COST), so that all rows do the same work whatever else the machine does; what they
really spent stands beside. Finished runs are kept in family.json, and the same command goes on with what is missing; the
random initialisation and raw pixels are measured once a seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KEPT = Path(__file__).with_name("family.json")
RECIPE = "cifar10_resnet18"
# Name, recipe, options.
ROWS: dict[str, tuple[str, list[str]]] = {
    "original": (RECIPE, []),
    "+ reweighting": (RECIPE, ["--train.balance", "reweight"]),
    "+ matched head": (RECIPE, ["--train.head", "matched"]),
    "+ warm k-means": (RECIPE, ["--clustering.start", "warm"]),
    "remembered features": (RECIPE, ["--clustering.features", "remembered"]),
    "PIC": (RECIPE, ["--clustering.method", "pic"]),
    "ODC": (f"{RECIPE}_odc", []),
    "DeepCluster-v2": (f"{RECIPE}_dcv2", []),
    "matched, k = 50": (RECIPE, ["--train.head", "matched", "--clustering.num-clusters", "50"]),
}
PHASES = ("extract", "cluster", "train")
FIGURES = {"nmi_labels": "NMI labels", "nmi_previous": "NMI previous", "knn_top1": "20-NN", "linear_top1": "linear"}
# CPU seconds of each phase over 50,000 images on a quiet machine, the least of many epochs: EPYC with AVX-512 BF16, 2 cores.
COST = {"extract": 24.0, "cluster": 3.0, "train": 113.0}
OTHERS = {
    "PIC": {"cluster": 15.0},
    "ODC": {"train": 119.0, "cluster": 0.0},
    "DeepCluster-v2": {"train": 127.0, "cluster": 5.0},
}
REMEMBERED = ("remembered features", "ODC", "DeepCluster-v2")  # one extraction, before the first epoch
COMMON = ["--num-workers", "0", "--images.cache", "yes", "--probe.every", "0", "--bank.threads", "2"]


def pretrain(name: str, run_dir: Path, data: str, options: list[str]) -> dict:
    """The result of a run; one begun is gone on with."""
    recipe, own = ROWS[name]
    job = [sys.executable, str(ROOT / "jobs" / "pretrain.py"), recipe, "--data", data, "--run-dir", str(run_dir)]
    subprocess.run([*job, *COMMON, *own, *options], check=True, stdout=subprocess.DEVNULL)
    result = json.loads((run_dir / "result.json").read_text())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return result | {"lines": lines}


def spent(lines: list[dict], phase: str, epochs: int) -> float:
    """CPU seconds of a phase; what measures the final features belongs to no epoch."""
    return sum(line["cpu_s"] for line in lines if line["phase"] == phase and line["epoch"] < epochs)


def schedule(name: str, budget: float) -> tuple[int, float]:
    """Epochs and plan length that spend the budget: whole epochs of about one pass each."""
    cost = COST | OTHERS.get(name, {})
    once, each = (cost["extract"], cost["cluster"]) if name in REMEMBERED else (0.0, cost["extract"] + cost["cluster"])
    epochs = max(1, round((budget - once) / (each + cost["train"])))
    return epochs, max(0.05, ((budget - once) / epochs - each) / cost["train"])


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name.lower())


def run(name: str, seed: int, arguments) -> dict:
    epochs, length = schedule(name, arguments.budget)
    options = ["--seed", str(seed), "--train.epochs", str(epochs), "--train.plan-length", f"{length:.3f}"]
    # The paper's constant rate: a cosine to zero within three epochs leaves the fresh heads too little to learn with.
    options += ["--train.schedule", "constant", "--probe.num-images", "50000"]
    if name != "original":
        options.append("--probe.no-baselines")
    result = pretrain(name, arguments.runs / slug(name) / f"seed{seed}", arguments.data, options)
    cpu = {phase: round(spent(result["lines"], phase, epochs), 1) for phase in PHASES}
    wall = sum(line["seconds"] for line in result["lines"] if line["phase"] in PHASES and line["epoch"] < epochs)
    keys = [key for key in result["metrics"] if result["metrics"][key] is not None]
    facts = {"epochs": epochs, "plan_length": round(length, 3), "cpu_s": cpu, "epoch_s": round(wall / epochs, 1)}
    return facts | {"metrics": {key: result["metrics"][key] for key in keys}}


def keep(kept: dict) -> None:
    beside = KEPT.with_suffix(".tmp")
    beside.write_text(json.dumps(kept, indent=1) + "\n")
    beside.replace(KEPT)


def figure(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def table(kept: dict) -> str:
    """Markdown: mean and spread over the seeds there are; of CPU seconds and seconds an epoch the least."""
    head = ["", "seeds", "epochs x passes", *FIGURES.values(), "CPU s", "s / epoch"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    original = list(kept["rows"].get("original", {}).values())
    for title, suffix in (("raw pixels", "_pixels"), ("random initialisation", "_random")):
        cells = [figure([one["metrics"][k + suffix] for one in original if k + suffix in one["metrics"]]) for k in FIGURES]
        lines.append(f"| {title} | {len(original)} | - | " + " | ".join(cells) + " | - | - |")
    for name in (name for name in ROWS if kept["rows"].get(name)):
        runs = list(kept["rows"][name].values())
        cells = [figure([one["metrics"][key] for one in runs if key in one["metrics"]]) for key in FIGURES]
        cpu = min(sum(one["cpu_s"].values()) for one in runs)  # what else the machine does only adds to it
        shape = f"{runs[0]['epochs']} x {runs[0]['plan_length']:.2f}"
        wall = min(one["epoch_s"] for one in runs)
        lines.append(f"| {name} | {len(runs)} | {shape} | " + " | ".join(cells) + f" | {cpu:.0f} | {wall:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="shards of CIFAR-10, 50,000 and a val split")
    parser.add_argument("--runs", type=Path, default=Path("runs/family"), help="where the run directories go")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--budget", type=float, default=480, help="CPU seconds of a run (4 minutes of 2 cores)")
    parser.add_argument("--table", action="store_true", help="only print what is kept")
    arguments = parser.parse_args()
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {"budget_cpu_s": arguments.budget, "rows": {}}
    if arguments.table:
        print(table(kept))
        return
    if not arguments.data or kept["budget_cpu_s"] != arguments.budget:
        parser.error("--data is missing" if not arguments.data else f"{KEPT} is of another budget; move it away")
    for seed in range(arguments.seeds):
        for name in (name for name in arguments.rows if str(seed) not in kept["rows"].get(name, {})):
            try:
                one = run(name, seed, arguments)
            except subprocess.CalledProcessError as error:  # the next start tries again; the other rows go on
                print(f"seed {seed}  {name:<22}ended with exit code {error.returncode}", flush=True)
                continue
            kept["rows"].setdefault(name, {})[str(seed)] = one
            keep(kept)
            print(f"seed {seed}  {name:<22}{one['metrics']}  {one['cpu_s']}", flush=True)
    print(table(kept))


if __name__ == "__main__":
    main()
