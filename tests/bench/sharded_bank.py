"""The bank over two actors against one, and how clustering and planning grow with the images.

    uv run python tests/bench/sharded_bank.py --json sharded_bank.json [--data CIFAR_SHARDS]
    uv run python tests/bench/sharded_bank.py --growth

Row 11a: relative difference of the objectives after 20 iterations from the same first draws (faiss's own), the worst case.
11a shards: the same between one shard and two, also where clusters were split. 11a split: one bank and two shards where
clusters were split: the halves begin a thousandth apart, and the last bits of a sum decide which image goes where; faiss
sums in float32, shards in float64, so the two part for a few images.
11b: bytes of all messages that two actors exchange in an iteration, over k * d * 8. A message counts as pickled: centroids
(float32) and the pass's token to the second actor, sums (float32) and counts (int32) back; what the first actor says to
itself does not travel. The ratio of seconds beside it is two actors of one thread each against one of two.

--growth: one process for each line. Clustering is 2 iterations and the last assignment, over two shards and the one who
asked in this process; its bytes are all that the process grew by, features (4 d) included. A plan is ``uniform_plan``.
"""

from __future__ import annotations

import json
import pickle
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
from measure import finish, in_turns, parser, row

from raydc import launch
from raydc.clustering.bank import FeatureBank
from raydc.clustering.diagnostics import nmi
from raydc.clustering.sampling import plan_length, uniform_plan
from raydc.clustering.sharded import Shard, ShardedBank, bounds
from raydc.clustering.whitening import fit_whitening, l2, moments
from raydc.config import ClusteringConfig
from raydc.data import decode, shards
from raydc.remote import Remote
from raydc.storage import Folder

NUM, DIM, CLUSTERS = 100_000, 64, 500
THREADS = 2
SIZES, FEW_DIM, MANY_CLUSTERS = (100_000, 1_000_000, 10_000_000), 16, 1000
BLOCK = 65536


class Weighed(Shard):
    """Notes the bytes that each iteration brings to it and takes away."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.moved: list[int] = []

    def assign(self, *args):
        result = super().assign(*args)
        self.moved.append(sum(len(pickle.dumps(one, protocol=5)) for one in (args, result)))
        return result

    def bytes_moved(self) -> list[int]:
        return self.moved


# --- two actors against one ----------------------------------------------------------------------------------------------


def pixels(place: str) -> np.ndarray:
    """Whitened pixels of real images, all of one small size."""
    folder = Folder(place)
    images = shards.read_columns(folder, shards.open_manifest(folder), "train", ["image"])["image"].to_pylist()
    rows = np.stack([decode.decode(image).reshape(-1) for image in images]).astype(np.float32) / 255
    return fit_whitening(moments(rows), DIM)(rows)


def noise() -> np.ndarray:
    """Points all over the sphere: no cluster is clear, and each rounding decides about an image somewhere."""
    return l2(np.random.default_rng(0).standard_normal((NUM, DIM)).astype(np.float32))


def blobs() -> np.ndarray:
    """Half as many tight blobs as clusters: starts fall together, and empty clusters are split."""
    rng = np.random.default_rng(1)
    centres = rng.standard_normal((CLUSTERS // 2, DIM))[rng.integers(0, CLUSTERS // 2, NUM)]
    return l2((centres + 0.4 * rng.standard_normal((NUM, DIM))).astype(np.float32))


def open_banks(num: int, config: ClusteringConfig) -> tuple[Remote, ShardedBank, ShardedBank]:
    """One bank, one shard alone, and two shards, all actors; the threads of the machine are shared."""
    one = Remote(FeatureBank, num, config, local=False, num_cpus=0, threads=THREADS)
    alone = [Remote(Shard, num, config, local=False, num_cpus=0, threads=THREADS)]
    halves = [
        Remote(Weighed, int(size), config, local=False, num_cpus=0, spread=True, threads=max(1, THREADS // 2))
        for size in np.diff(bounds(num, 2))
    ]
    return one, ShardedBank(alone, num, config), ShardedBank(halves, num, config)


def fill(bank: Remote | ShardedBank, features: np.ndarray) -> str:
    token = bank.open()
    for start in range(0, len(features), BLOCK):
        rows = np.arange(start, min(len(features), start + BLOCK))
        bank.send("push", token, rows, features[rows])
    bank.flush()
    return token


def compare(features: np.ndarray, config: ClusteringConfig, repeats: int) -> dict:
    """Objectives, labels, bytes and seconds of the same clustering."""
    one, _, two = banks = open_banks(len(features), config)
    tokens = [fill(bank, features) for bank in banks]
    single, shard, both = (bank.cluster(token, 0, 0, "") for bank, token in zip(banks, tokens, strict=True))
    work = [
        lambda bank=bank, token=token: bank.cluster(token, 0, 0, "") for bank, token in ((two, tokens[2]), (one, tokens[0]))
    ]
    pairs = in_turns(*work, repeats)
    limit = config.num_clusters * features.shape[1] * 8
    return {
        "objective_one": single.objective,
        "objective_two": both.objective,
        "difference": abs(both.objective / single.objective - 1),
        "difference_of_one_shard": abs(both.objective / shard.objective - 1),
        "nmi_of_labels": round(float(nmi(single.pseudo_labels, both.pseudo_labels)), 6),
        "num_repaired": [single.num_repaired, both.num_repaired],
        "bytes_over_limit": max(two.shards[1].bytes_moved()) / limit,
        "seconds_ratio": round(statistics.median(first / second for first, second in pairs), 3),
    }


def rows(data: str, repeats: int) -> list[dict]:
    config = ClusteringConfig(num_clusters=CLUSTERS, pca_dim=DIM)
    launch.attach(2)
    cases = {"noise": (noise(), config), "noise_spherical": (noise(), replace(config, method="spherical"))}
    if data:
        cases["pixels"] = pixels(data), config
    found = {name: compare(*case, repeats) for name, case in cases.items()}
    split = compare(blobs(), config, repeats)
    every = [*found.values(), split]
    facts = {"k": CLUSTERS, "d": DIM, "actors": 2, "counted": "pickled messages between the actors, worst iteration"}
    return [
        small("11a", [one["difference"] for one in found.values()], found),
        small("11a shards", [one["difference_of_one_shard"] for one in every], None),
        small("11a split", [split["difference"]], split),
        row("11b", max(one["bytes_over_limit"] for one in every), 1.2, 1.0, facts, least=False),
    ]


def small(name: str, values: list[float], quality: dict | None) -> dict:
    """A row of the worst of some differences, which four decimals would show as 0."""
    return row(name, max(values), 1e-6, 1e-7, quality, least=False) | {"value": float(f"{max(values):.2e}")}


# --- growth --------------------------------------------------------------------------------------------------------------


def clustering_of(num: int) -> float:
    """Seconds of a clustering of synthetic rows that come in blocks."""
    config = ClusteringConfig(num_clusters=MANY_CLUSTERS, pca_dim=FEW_DIM, iterations=2)
    local = [Remote(Shard, int(size), config, local=True, threads=THREADS) for size in np.diff(bounds(num, 2))]
    bank = ShardedBank(local, num, config)
    token, rng = bank.open(), np.random.default_rng(0)
    for start in range(0, num, BLOCK):
        ids = np.arange(start, min(num, start + BLOCK))
        bank.send("push", token, ids, l2(rng.standard_normal((len(ids), FEW_DIM), np.float32)))
    began = time.perf_counter()
    bank.cluster(token, 0, 0, "")
    return time.perf_counter() - began


def planning_of(num: int) -> float:
    """Seconds of a plan for labels that are there."""
    labels = np.random.default_rng(0).integers(0, MANY_CLUSTERS, num, np.int32)
    began = time.perf_counter()
    uniform_plan(labels, MANY_CLUSTERS, plan_length(num, 1.0, 256), 0)
    return time.perf_counter() - began


def measured(what: str, num: int) -> dict:
    """Seconds of the work, and what this process grew by; whatever it needs once was done before."""
    work = {"cluster": clustering_of, "plan": planning_of}[what]
    work(5000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = work(num)
    return {"seconds": seconds, "bytes": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)}


def growth() -> list[dict]:
    """One table; a line for each work and size."""
    table = []
    print(f"d={FEW_DIM}, k={MANY_CLUSTERS}, {THREADS} threads")
    print(f"{'':10}{'images':>12}{'seconds':>10}{'us/image':>10}{'bytes/image':>13}")
    for what in ("cluster", "plan"):
        for num in SIZES:
            done = subprocess.run([sys.executable, __file__, "--measure", what, str(num)], check=True, capture_output=True)
            found = json.loads(done.stdout)
            line = {"what": what, "images": num, "seconds": round(found["seconds"], 3)}
            line |= {"us_per_image": found["seconds"] / num * 1e6, "bytes_per_image": found["bytes"] / num}
            table.append(line)
            print(
                f"{what:10}{num:12,}{line['seconds']:10.2f}{line['us_per_image']:10.2f}{line['bytes_per_image']:13.1f}",
                flush=True,
            )
    return table


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", default="", help="shards of small images of one size (CIFAR-10), for real features")
    options.add_argument("--growth", action="store_true")
    options.add_argument("--measure", nargs=2, metavar=("WHAT", "IMAGES"))
    arguments = options.parse_args()
    if arguments.measure:
        print(json.dumps(measured(arguments.measure[0], int(arguments.measure[1]))))
    elif arguments.growth:
        table = growth()
        if arguments.json:
            arguments.json.write_text(json.dumps(table, indent=2) + "\n")
    else:
        finish(rows(arguments.data, arguments.repeats), arguments.json)


if __name__ == "__main__":
    main()
