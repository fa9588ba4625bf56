"""A streamed epoch of JPEGs at 224 pixels against the same decode and crop in tight loops: row 6 of README's table.

    uv run python tests/bench/stream.py --images FOLDER --json stream.json

The JPEGs of a folder, repeated to ``--rows``, as shards; one Ray Train worker that only takes the batches, with a thread a
CPU to decode. The tight loops are one process a CPU that decodes and cuts images it holds in memory, no Ray and no batches.
6a: images a second from the second batch of a training pass to its last, over the tight loops', in turns; the median.
6b: seconds from asking for a pass to its first batch, of all but the first epoch; the slower of extraction and training.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from decode import ours as decode_and_crop
from epoch import in_a_worker
from measure import Rivals, answer, finish, parser, row
from torchvision.transforms import RandomResizedCrop

from raydc import make_shards
from raydc.clustering.sampling import plan_length, uniform_plan
from raydc.config import ImagesConfig
from raydc.data.decode import decode
from raydc.launch import Job
from raydc.recipes import imagenette_resnet18
from raydc.run import Run
from raydc.seeding import derive

SIZE, RESIZE, BATCH, K = 224, 256, 128, 100
SAMPLE = 1500  # images of a tight loop


def tight(files: list[str]) -> None:
    """A process of the rival: images a second."""
    torch.set_num_threads(1)
    images = [Path(file).read_bytes() for file in files]
    torch.manual_seed(0)
    sizes = [decode(data).shape[:2] for data in images]
    boxes = [RandomResizedCrop.get_params(torch.empty(3, *size), [0.08, 1.0], [3 / 4, 4 / 3]) for size in sizes]

    def rate() -> float:
        began = time.perf_counter()
        for data, box in zip(images, boxes, strict=True):
            decode_and_crop(data, box)
        return len(images) / (time.perf_counter() - began)

    answer(rate)


def taken(batches) -> tuple[float, float, int]:
    """(seconds to the first batch, images a second from the second batch to the last, images)."""
    began, moments, images = time.perf_counter(), [], []
    for ids, _ in batches:
        moments.append(time.perf_counter())
        images.append(len(ids))
    return moments[0] - began, sum(images[1:]) / (moments[-1] - moments[0]), sum(images)


def loop(job: Job) -> list[dict]:
    """An epoch's two passes and the tight loops, in turns."""
    run, found = Run(job), []
    num, cpus = run.sizes["train"], job.config.train.threads
    rivals = Rivals([[__file__, "--tight", *job.extras["files"][cpu::cpus]] for cpu in range(cpus)])
    for epoch in range(job.extras["repeats"] + 1):
        extract = taken(run.prefetched(run.images.extract("train")))
        assert extract[2] == num
        plan = uniform_plan(np.arange(num, dtype=np.int32) % K, K, plan_length(num, 1.0, BATCH), derive(0, "plan", epoch))
        train = taken(run.prefetched(run.images.train(plan, epoch, BATCH)))
        assert train[2] == plan.num_draws
        found.append({"extract": extract[:2], "train": train[:2], "tight": sum(rivals.ask())})
        run.worker.say(f"epoch {epoch}: {found[-1]}")
    rivals.close()
    return found[1:]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--images", type=Path, required=True, help="folder of JPEG files, searched through")
    options.add_argument("--rows", type=int, default=20_000)
    options.add_argument("--decode", choices=["worker", "tasks"], default="worker", help="where")
    arguments = options.parse_args()
    files = sorted(str(file.resolve()) for file in arguments.images.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg"))
    with tempfile.TemporaryDirectory() as scratch:
        listed = Path(scratch, "list.txt")
        listed.write_text("".join(f"{files[number % len(files)]}\n" for number in range(arguments.rows)))
        make_shards(str(listed), f"{scratch}/shards", root="/", val_fraction=0.0, use_ray=False, progress=False)
        config = imagenette_resnet18()
        images = ImagesConfig(size=SIZE, resize=RESIZE, cache="no", decode=arguments.decode)
        train = replace(config.train, batch_size=BATCH, threads=os.cpu_count())
        config = replace(config, data=f"{scratch}/shards", images=images, train=train)
        found = in_a_worker(loop, config, repeats=arguments.repeats, files=files[:SAMPLE])
    share = statistics.median(one["train"][1] / one["tight"] for one in found)
    first = max(statistics.median(one[view][0] for one in found) for view in ("extract", "train"))
    quality = {
        "images_a_second": {key: [round(one[key][-1] if key != "tight" else one[key]) for one in found] for key in found[0]},
        "first_batch_s": {key: [round(one[key][0], 2) for one in found] for key in ("extract", "train")},
    }
    finish([row("6a", share, 0.70, 0.95, quality), row("6b", first, 3, 0.5, None, least=False)], arguments.json)


if __name__ == "__main__":
    tight(sys.argv[2:]) if sys.argv[1:2] == ["--tight"] else main()
