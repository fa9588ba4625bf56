"""How the SVM benchmark gains from a second CPU: the same fits as Ray tasks with 1 and with 2 CPUs, in turns.

    uv run python tests/bench/svm.py --json svm.json

20 classes x 19 costs x 3 folds on 9216-d features of 560 trainval and 340 test images. The features are made up: low
rank and noise behind a ReLU, labels that the low rank part decides. Workers are started and warm before the clock runs.
The median of the ratios counts; beside it, that both find the same mAP, and what two plain processes gain over one with
the same fits: the limit of the machine. ``--layers 5`` is the whole benchmark; a single layer is prepared by one CPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from raydc import launch
from raydc.benchmarks.datasets import VOC_CLASSES
from raydc.benchmarks.svm import COSTS, fit_full, normalise, rotate, run_svm

CPUS = (1, 2)


def made_up(num_train: int, num_test: int, dim: int, layers: int = 1, rank: int = 64) -> tuple[dict, np.ndarray, np.ndarray]:
    """Layers of the same float32 features, labels of 20 classes: 7 % present, 2 % difficult."""
    random = np.random.default_rng(0)
    latent = random.standard_normal((num_train + num_test, rank))
    features = latent @ random.standard_normal((rank, dim)) + 8 * random.standard_normal((len(latent), dim))
    features = np.maximum(features, 0).astype(np.float32)
    leaning = latent @ random.standard_normal((rank, len(VOC_CLASSES)))
    labels = (leaning > np.quantile(leaning, 0.93, axis=0)).astype(np.int8)
    labels[random.random(labels.shape) < 0.02] = -1
    named = {f"feature{n + 1}": (features[:num_train], features[num_train:]) for n in range(layers)}
    return named, labels[:num_train], labels[num_train:]


def warm_up(_: int) -> None:
    """Takes long enough that every process gets one; its imports are then done."""
    threadpool_limits(1)
    time.sleep(1)


def fits(column: int, data: tuple) -> None:
    """All fits of one class, as a plain process does them."""
    (train, _), labels, test_labels = data
    fit_full(train, labels[:, column], train[: len(test_labels)], test_labels[:, column])


def plain(num_processes: int, data: tuple) -> float:
    """Seconds of the fits of 20 classes in so many processes, without Ray."""
    layers, labels, test_labels = data
    given = rotate(normalise(layers["feature1"][0])), labels, test_labels
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(warm_up, range(2 * num_processes)))
        began = time.perf_counter()
        list(pool.map(partial(fits, data=given), range(len(VOC_CLASSES))))
        return time.perf_counter() - began


def measure(num_cpus: int, data: tuple, costs: tuple[float, ...], warm: tuple) -> tuple[float, dict]:
    """Seconds and result, on a Ray of its own."""
    launch.attach(num_cpus)
    try:
        run_svm(*warm, VOC_CLASSES, costs=COSTS[:1])
        began = time.perf_counter()
        result = run_svm(*data, VOC_CLASSES, costs=costs)
        return time.perf_counter() - began, result
    finally:
        launch.ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a few seconds' worth, to see that it works")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warm = made_up(200, 120, 256)
    data, costs = (
        (made_up(200, 120, 512), COSTS[:2]) if arguments.small else (made_up(560, 340, 9216, arguments.layers), COSTS)
    )
    seconds: dict[int, list[float]] = {num_cpus: [] for num_cpus in CPUS}
    results = []
    for _ in range(1 if arguments.small else arguments.repeats):
        for num_cpus in CPUS:
            taken, result = measure(num_cpus, data, costs, warm)
            seconds[num_cpus].append(taken)
            results.append(result)
            print(f"{num_cpus} CPUs {taken:8.1f} s   mAP {result['map']:.4f}", flush=True)
    alone = [plain(1, data) / plain(2, data) for _ in range(1 if arguments.small else arguments.repeats)]
    one, two = (seconds[num_cpus] for num_cpus in CPUS)
    rows = {f"svm_{num_cpus}_cpus_s": seconds[num_cpus] for num_cpus in CPUS}
    rows |= {"svm_ratio": [a / b for a, b in zip(one, two, strict=True)]}
    rows |= {"plain_processes": alone}
    rows |= {"svm_map": [result["map"] for result in results]}
    found = [{"row": name, "value": round(statistics.median(values), 4), "values": values} for name, values in rows.items()]
    for row in found:
        print(f"{row['row']:<16}{row['value']:>10.3f}   {[round(value, 3) for value in row['values']]}")
    same = all(result == results[0] for result in results)
    print(f"all results equal: {'yes' if same else 'NO'}")
    if arguments.json:
        arguments.json.write_text(json.dumps([*found, {"row": "svm_equal", "value": same}], indent=2) + "\n")


if __name__ == "__main__":
    main()
