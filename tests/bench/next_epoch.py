"""How fast the next epoch is clustered, from the last labels, to what a cold start of 20 faiss iterations reaches.

    uv run python tests/bench/next_epoch.py --data CIFAR_SHARDS --run RUN --json next_epoch.json

Features of the last two checkpoints of a run of cifar10_resnet18, of all images and their mirror images, whitened each for
itself: 100,000 x 256, k = 1,000. (Without ``--run`` those of fresh weights and of the same after a small change.) The last
labels are of 20 cold faiss iterations on the first; warm is the means of the second under them and 6 iterations of the torch
engine. In turns with the cold start; beside it the objectives over the cold one's, fewer iterations, the recipe's own size
(50,000 x 128, k = 390), and how alike labels are (NMI): of the two cold clusterings, and of the old with the warm one.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
from kmeans import by_faiss, real_features, whitened
from measure import finish, in_turns, median_ratio, parser, row
from sklearn.metrics import normalized_mutual_info_score

from raydc.clustering.kmeans import KMeans, kmeans, means

ITERATIONS = 6


def start_of(matrix: np.ndarray, k: int, seed: int) -> np.ndarray:
    return matrix[np.random.default_rng(seed).choice(len(matrix), k, replace=False)]


def warm(matrix: np.ndarray, labels: np.ndarray, k: int, iterations: int) -> KMeans:
    return kmeans(matrix, k, iterations=iterations, start_kd=means(matrix, labels, k), engine="torch")


def measured(old: np.ndarray, new: np.ndarray, k: int, iterations: int, repeats: int) -> tuple[float, dict]:
    """(seconds of a cold start over those of a warm one, what it found); each repeat has another cold start."""
    pairs, objectives, likeness = [], [], []
    for seed in range(repeats):
        labels, start = kmeans(old, k, start_kd=start_of(old, k, seed)).labels_N, start_of(new, k, 100 + seed)
        found = []
        pairs += in_turns(
            lambda: found.append(by_faiss(new, start)),  # noqa: B023
            lambda: found.append(warm(new, labels, k, iterations)),  # noqa: B023
            repeats=1,
        )
        objectives.append(round(found[1].objective / found[0], 5))
        cold = kmeans(new, k, start_kd=start, engine="torch").labels_N
        likeness.append([round(normalized_mutual_info_score(labels, other), 3) for other in (cold, found[1].labels_N)])
    quality = {"objective": statistics.median(objectives), "each": objectives, "nmi_cold_warm": likeness[0]}
    return median_ratio(pairs), quality


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", required=True, help="CIFAR-10 as shards")
    options.add_argument("--run", type=Path, help="a run of cifar10_resnet18 with two checkpoints")
    options.add_argument("--keep", type=Path, help="folder of the features between two measurements")
    arguments = options.parse_args()
    raw = real_features(arguments.data, arguments.run, arguments.keep)
    pair = [whitened(matrix, 256) for matrix in raw]
    warm(pair[0][:5000], np.arange(5000) % 50, 50, 1)  # both are warm
    ratio, quality = measured(*pair, 1000, ITERATIONS, arguments.repeats)
    small = [whitened(matrix[: len(matrix) // 2], 128) for matrix in raw]
    for name, data, k, iterations in (
        ("1_iteration", pair, 1000, 1),
        ("recipe", small, 390, 1),
        ("recipe_6", small, 390, 6),
    ):
        other, found = measured(*data, k, iterations, 1 if data is pair else arguments.repeats)
        quality[name] = {"ratio": round(other, 2), "objective": found["objective"], "nmi_cold_warm": found["nmi_cold_warm"]}
    rows = [row("3", ratio, 10, 40, quality)]
    rows[0]["ok"] = rows[0]["ok"] and quality["objective"] <= 1
    finish(rows, arguments.json)


if __name__ == "__main__":
    main()
