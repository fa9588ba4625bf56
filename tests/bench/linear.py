"""What five heads cost over one, and what a second kNN costs over the first.

    uv run python tests/bench/linear.py --backbone RUN --data SHARDS --json linear.json

The probe's training epochs with one head (feature5) and with five run in turns (A B A B ...) in this process; the median
of the ratios counts. Then kNN twice: the second run reads the features of the first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from raydc.benchmarks import knn, linear
from raydc.benchmarks.learner import Learner, open_job, open_shards
from raydc.benchmarks.options import LAYERS, Knn, Linear
from raydc.benchmarks.setting import open_backbone
from raydc.config import ImagesConfig
from raydc.launch import Worker


def probe(options: Linear, data, candidate, heads: tuple[str, ...]):
    """A learner whose ``train(epoch)`` is an epoch of these heads."""
    preset = linear.PRESETS["imagenet"]
    job = open_job(
        options,
        data,
        options.folder.child("_".join(heads)),
        model=candidate.model,
        images=ImagesConfig(size=candidate.size, resize=candidate.resize),
        train=preset.layers,
        extras={},
    )
    learner = Learner(job, Worker(job.board))
    backbone = candidate.build()
    network = linear.Heads(linear.channels(backbone), heads, data.num_classes, 0)
    learner.hold(linear.Probe(backbone, network), network, lambda: linear.build_optimizer(network, preset))
    jitter = replace(job.config.images, **preset.jitter)

    def epoch(number: int) -> float:
        began = time.perf_counter()
        learner.train(
            number,
            change=partial(linear.with_jitter, config=jitter),
            criterion=linear.summed_cross_entropy,
            set_rate=lambda optimizer, now: linear.set_rates(optimizer, preset, now),
        )
        return time.perf_counter() - began

    return epoch


def second_knn(folder: Path, data: str, backbone: str) -> tuple[float, float]:
    """Seconds of a kNN and of the same one again, in another run directory."""
    seconds = []
    for name in ("first", "second"):
        options = Knn(backbone=backbone, data=data, run_dir=str(folder / name), num_workers=0)
        began = time.perf_counter()
        knn.run(options, open_backbone(backbone))
        seconds.append(time.perf_counter() - began)
    return seconds[0], seconds[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    data, candidate = open_shards(arguments.data), open_backbone(arguments.backbone)
    with tempfile.TemporaryDirectory() as scratch:
        options = Linear(backbone="", data=arguments.data, run_dir=f"{scratch}/linear", num_workers=0)
        one, five = (probe(options, data, candidate, heads) for heads in (("feature5",), LAYERS))
        one(0), five(0)
        ratios = [five(number) / one(number) for number in range(1, arguments.pairs + 1)]
        first, second = second_knn(Path(scratch), arguments.data, arguments.backbone)
    rows = [
        {"row": "five heads over one", "value": statistics.median(ratios), "must": 1.2, "values": ratios},
        {"row": "second kNN over the first", "value": second / first, "seconds": [first, second]},
    ]
    for row in rows:
        print(f"{row['row']:<28}{row['value']:>7.3f}   {[round(v, 3) for v in row.get('values', row.get('seconds'))]}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
