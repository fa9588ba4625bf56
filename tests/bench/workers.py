"""Two training workers of one thread each against two plain processes of torch DDP (gloo): row 8 of README's table.

    uv run python tests/bench/workers.py --data CIFAR_SHARDS --json workers.json

Ours: a training pass of two Ray Train workers on cached images, with crops, colours, progress and the check of the loss.
The rival: the same model, dtype, batch, optimizer and number of steps in two processes without Ray, on pixels that are
already there. In turns; the median of the ratios of images a second.
"""

from __future__ import annotations

import os
import socket
import statistics
import sys
import time
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from epoch import in_a_worker
from measure import Rivals, answer, finish, parser, row

from raydc import deepcluster
from raydc.launch import Job
from raydc.models.backbone import build_backbone
from raydc.models.head import Classifier
from raydc.optim import build_optimizer
from raydc.recipes import cifar10_resnet18
from raydc.run import Run
from raydc.training import choose_precision, open_compute

WORKERS, STEPS = 2, 20


def settings():
    plain = cifar10_resnet18()
    train = replace(plain.train, threads=1, precision=choose_precision("auto", "cpu"), channels_last="yes")
    return replace(plain, num_workers=WORKERS, train=train)


def bare(rank: int, port: int) -> None:
    """A process of the rival: seconds of ``STEPS`` steps."""
    config = settings()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=WORKERS)
    compute, _ = open_compute(config.train, torch.device("cpu"), WORKERS, deterministic=False)
    model = compute.prepare(Classifier(build_backbone(config.model, 0), config.clustering.num_clusters))
    optimizer = build_optimizer(model.trunk, model.head, config.train)
    wrapped = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    part, side = config.train.batch_size // WORKERS, config.images.size
    pixels = compute.place(torch.randint(0, 256, (part, 3, side, side)).float())
    labels = torch.randint(0, config.clustering.num_clusters, (part,))

    def steps(num: int = STEPS) -> float:
        dist.barrier()
        began = time.perf_counter()
        for _ in range(num):
            with compute.autocast():
                scores = wrapped(pixels)
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(scores.float(), labels).backward()
            optimizer.step()
        return time.perf_counter() - began

    steps(5)
    answer(steps)


def loop(job: Job) -> list[tuple[float, float]]:
    """(seconds of ours, of the rival's) for as many steps, in turns; the first pass is a warm-up."""
    run, pairs, rivals = Run(job), [], None
    if run.worker.is_first:
        rivals = Rivals([[__file__, "--bare", str(rank), str(job.extras["port"])] for rank in range(WORKERS)])
    assignment = deepcluster.extract_and_cluster(run, 0)
    for epoch in range(job.extras["repeats"] + 1):
        run.worker.barrier()
        began = time.perf_counter()
        deepcluster.train(run, replace(assignment, epoch=epoch))
        ours = time.perf_counter() - began
        if rivals is not None:
            pairs.append((ours, statistics.mean(rivals.ask())))
            run.worker.say(f"ours {ours:.2f} s, bare {pairs[-1][1]:.2f} s for {STEPS} steps")
        run.worker.barrier()
    if rivals is not None:
        rivals.close()
    return pairs[1:]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", required=True, help="shards of CIFAR-10")
    arguments = options.parse_args()
    config = replace(settings(), data=arguments.data)
    length = STEPS * config.train.batch_size / 50_000
    config = replace(config, train=replace(config.train, plan_length=length))
    pairs = in_a_worker(loop, config, repeats=arguments.repeats, port=free_port())
    share = statistics.median(rival / ours for ours, rival in pairs)
    quality = {"seconds": [[round(one, 2) for one in pair] for pair in pairs], "steps": STEPS}
    finish([row("8", share, 0.95, 0.99, quality)], arguments.json)


if __name__ == "__main__":
    bare(int(sys.argv[2]), int(sys.argv[3])) if sys.argv[1:2] == ["--bare"] else main()
