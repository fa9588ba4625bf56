"""What detection and segmentation have in common: a network trained by iterations on whole images, then tested.

A problem (detection, segmentation) says what a sample is, what the network is, what it loses and what it finds; here is how
samples come (Ray Data reads, decodes and augments them on any node's CPUs), and the loop. The training is cut into
rounds; after each one there is a commit, and a start that was killed goes on there.
"""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.train
import safetensors.torch
import torch
from torch import nn

from raydc import launch, training
from raydc.benchmarks import pictures
from raydc.benchmarks.learner import Session, fit, job_config
from raydc.benchmarks.options import Dense
from raydc.benchmarks.published import OFFICIAL
from raydc.benchmarks.scorecard import SETS, Row
from raydc.benchmarks.setting import Candidate, once
from raydc.config import Config, ImagesConfig, RunError, TrainConfig, UsageError, check
from raydc.data.decode import UnreadableImage, decode
from raydc.data.draws import PlanBoard
from raydc.data.stream import LosslessDataConfig
from raydc.launch import Job, Worker
from raydc.models.backbone import Backbone
from raydc.remote import Board, Remote, Shared
from raydc.seeding import derive, uniforms
from raydc.storage import Folder
from raydc.training import Clock, Compute

Sample = dict[str, torch.Tensor]
NUM_PICTURES = 6
TASK_ROWS = 8  # samples that a data task makes: megabytes each, in tenths of a second


# --- schedule -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Of SGD with momentum .9; everything is counted in iterations. A step schedule has milestones, a poly one a power."""

    iterations: int
    batch_size: int
    rounds: int
    lr: float
    weight_decay: float
    warmup: float = 0
    warmup_from: float = 0.001
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    power: float = 0.0
    least: float = 0.0

    def rate(self, iteration: int) -> float:
        """The learning rate of an iteration, from 0."""
        if self.power:
            return (self.lr - self.least) * (1 - iteration / self.iterations) ** self.power + self.least
        rate = self.lr * self.gamma ** sum(iteration >= milestone for milestone in self.milestones)
        if iteration < self.warmup:
            rate *= self.warmup_from + (1 - self.warmup_from) * iteration / self.warmup
        return rate

    def given(self, options: Dense) -> Schedule:
        """The same with what the options change; warmup and milestones stay in proportion.

        UsageError where the workers cannot share a batch evenly.
        """
        iterations, lr = options.max_iters or self.iterations, options.lr or self.lr
        batch_size, workers = options.batch_size or self.batch_size, max(1, options.num_workers)
        check(
            batch_size % workers == 0,
            f"batches of {batch_size} images are not a multiple of num_workers {workers}; change it, or give --batch-size",
        )

        def scaled(count: float) -> float:
            return count * iterations / self.iterations

        return replace(
            self,
            iterations=iterations,
            batch_size=batch_size,
            rounds=min(iterations, options.rounds or self.rounds),
            lr=lr,
            least=min(lr, self.least),
            warmup=scaled(self.warmup),
            milestones=tuple(map(scaled, self.milestones)),
        )

    def differences(self, published: Schedule) -> list[str]:
        """What a row has to say."""
        pairs = (
            (self.iterations, published.iterations, "iterations"),
            (self.batch_size, published.batch_size, "images a batch"),
            (self.lr, published.lr, "of learning rate"),
        )
        return [f"{ours:,} instead of {theirs:,} {what}" for ours, theirs, what in pairs if ours != theirs]

    @property
    def ends(self) -> list[int]:
        """The iteration at which each round ends."""
        return [self.iterations * (number + 1) // self.rounds for number in range(self.rounds)]

    def steps(self, number: int) -> int:
        """Iterations of a round."""
        return self.ends[number] - self.start(number)

    def start(self, number: int) -> int:
        """The iteration at which a round starts."""
        return self.ends[number - 1] if number else 0


# --- the problem --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem(ABC):
    """One benchmark on one set. It travels to data tasks and workers; ids count the images of train, and those of test."""

    schedule: Schedule
    num_train: int
    num_test: int
    fixed_shapes: ClassVar[bool]
    """Whether all training batches have the same."""

    @abstractmethod
    def training_sample(self, image_id: int, seed: int) -> Sample:
        """An augmented image and what is to be learnt from it."""

    @abstractmethod
    def test_sample(self, image_id: int) -> Sample:
        """An image as it is tested."""

    @abstractmethod
    def network(self, backbone: Backbone) -> nn.Module:
        """With fresh heads, from torch's global generator."""

    @abstractmethod
    def loss(self, model: nn.Module, samples: list[Sample], compute: Compute) -> torch.Tensor:
        """The mean over the samples."""

    @abstractmethod
    def find(self, model: nn.Module, sample: Sample, compute: Compute) -> Any:
        """What the network, in eval mode, says of a test sample; small, for it travels between processes."""

    @abstractmethod
    def picture(self, model: nn.Module, image_id: int, compute: Compute) -> torch.Tensor:
        """A test image twice, with what is there and with what is found: uint8 (3, H, W)."""

    @abstractmethod
    def figures(self, found: list[Any]) -> dict[str, float]:
        """In percent, from what was found in each test image: ``columns``, and what else is worth a look."""

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Of the scorecard."""


def read_pixels(folder: Folder, path: str) -> torch.Tensor:
    """uint8 (3, H, W); RunError that names an image that cannot be decoded."""
    try:
        pixels = decode(folder.read(path))
    except (UnreadableImage, OSError) as error:
        raise RunError(f"{folder.path(path)} cannot be read ({error}); unpack it again, and give the same command") from None
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


@dataclass(frozen=True)
class Order:
    """The images in the order of training: each once, in an order of its own, then again in another."""

    seed: int
    num_images: int

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 image_ids and draws (how often each was shown before) at these places of the sequence."""
        draws, places = np.divmod(positions, self.num_images)
        ids = [
            int(_shuffled(self.seed, int(draw), self.num_images)[place]) for draw, place in zip(draws, places, strict=True)
        ]
        return np.array(ids, np.int64), draws


@lru_cache(maxsize=4)
def _shuffled(seed: int, draw: int, num_images: int) -> np.ndarray:
    return np.argsort(uniforms(derive(seed, "order", draw), np.arange(num_images))[:, 0], kind="stable")


# --- samples through Ray ------------------------------------------------------------------------------------------------


def load_rows(table: pa.Table, problem: Shared, seed: int, board: Remote | None) -> pa.Table:
    """What a data task does: rows of ids -> rows of samples in safetensors; a fault travels as text to the worker.

    Of training (``board`` says which part of the order) or of the test images.
    """
    ids, held = table["id"].to_numpy(), _held(problem)
    if board is not None:
        first, end = board.current()[1] or _lost()
        ids, draws = Order(seed, held.num_train)(ids[ids < end - first] + first)
        made = [_encoded(training_sample, held, i, d, seed) for i, d in zip(ids, draws, strict=True)]
    else:
        made = [_encoded(held.test_sample, int(i)) for i in ids]
    samples, faults = ([one[part] for one in made] for part in (0, 1))
    return pa.table({"id": ids, "sample": pa.array(samples, pa.large_binary()), "fault": pa.array(faults, pa.string())})


def _lost():
    """The board came back empty. The words are those by which launch knows a death, after which it starts again."""
    raise RuntimeError("an actor died: the one that says which images come next")


_problems: dict = {}  # of this data process: the annotations of a large set are unpacked once


def _held(shared: Shared) -> Problem:
    if _problems.get("key") != shared.key:
        _problems.update(key=shared.key, problem=shared.get())
    return _problems["problem"]


def training_sample(problem: Problem, image_id: int, draw: int, seed: int) -> Sample:
    """Depends on image_id, draw and seed alone."""
    return problem.training_sample(int(image_id), derive(seed, "augment", int(image_id), int(draw)))


def _encoded(make: Callable[..., Sample], *given) -> tuple[bytes | None, str | None]:
    try:
        return safetensors.torch.save({key: value.contiguous() for key, value in make(*given).items()}), None
    except (RunError, UsageError, OSError) as error:
        return None, str(error)


@dataclass
class DenseStreams:
    """What launch hands to the workers. In local mode the worker loads samples itself."""

    config: Config
    problem: Shared
    num_test: int
    schedule: Schedule
    board: Remote | None
    cached: None = None

    @property
    def datasets(self) -> dict:
        """A round of training, and the test images; ids are read, and samples come out."""
        if self.board is None:
            return {}
        rows = max(map(self.schedule.steps, range(self.schedule.rounds))) * self.schedule.batch_size
        return {"train": self._samples(rows, self.board), "test": self._samples(self.num_test, None)}

    def _samples(self, rows: int, board: Remote | None):
        ray.data.DataContext.get_current().enable_progress_bars = False
        ids = ray.data.range(rows, override_num_blocks=-(-rows // TASK_ROWS))
        arguments = {"problem": self.problem, "seed": self.config.seed, "board": board}
        return ids.map_batches(load_rows, batch_size=None, batch_format="pyarrow", zero_copy_batch=True, fn_kwargs=arguments)

    @property
    def data_config(self) -> ray.train.DataConfig | None:
        if self.board is None:
            return None
        return LosslessDataConfig(execution_options=ray.data.ExecutionOptions(preserve_order=True))


class Images:
    """The samples of one worker."""

    def __init__(self, streams: DenseStreams, worker: Worker) -> None:
        self.streams, self.worker = streams, worker
        self.seed, self.schedule = streams.config.seed, streams.schedule

    def train(self, number: int) -> Iterator[tuple[np.ndarray, list[Sample]]]:
        """The round in batches, to each rank as many of its images as a rank's part of a batch: ids and samples."""
        size = self.schedule.batch_size
        first, end = self.schedule.start(number) * size, self.schedule.ends[number] * size
        if self.streams.board is None:
            return self._train_here(first, end, size)
        if self.worker.is_first:
            self.streams.board.publish((first, end))
        self.worker.barrier()  # the round is known before anybody's reading begins
        return self._decoded("train", size // self.worker.world_size)

    def test(self) -> Iterator[tuple[int, Sample]]:
        """Whatever test images this rank is given."""
        if self.streams.board is None:
            problem = self.streams.problem.get()
            return ((i, problem.test_sample(i)) for i in range(self.streams.num_test))
        return ((int(ids[0]), samples[0]) for ids, samples in self._decoded("test", 1))

    def _train_here(self, first: int, end: int, size: int) -> Iterator[tuple[np.ndarray, list[Sample]]]:
        problem = self.streams.problem.get()
        for start in range(first, end, size):
            ids, draws = Order(self.seed, problem.num_train)(np.arange(start, start + size))
            yield ids, [training_sample(problem, i, d, self.seed) for i, d in zip(ids, draws, strict=True)]

    def _decoded(self, view: str, size: int) -> Iterator[tuple[np.ndarray, list[Sample]]]:
        shard = ray.train.get_dataset_shard(view)
        for table in shard.iter_batches(batch_size=size, batch_format="pyarrow", prefetch_batches=2):
            fault = next((one for one in table["fault"].to_pylist() if one), None)
            if fault:
                raise RunError(fault)
            yield table["id"].to_numpy(), [safetensors.torch.load(one) for one in table["sample"].to_pylist()]


# --- on a worker --------------------------------------------------------------------------------------------------------


class DenseSession(Session):
    """A session that counts rounds of iterations in place of epochs."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.problem: Problem = job.extras["problem"].get()
        if not self.problem.fixed_shapes:  # else cuDNN would look for the fastest algorithm anew at every step
            torch.backends.cudnn.benchmark = False
        self.schedule = self.problem.schedule
        self.images = Images(job.streams, self.worker)
        self.streamed = job.streams.board is not None

    def place(self, epoch: int) -> str:
        return f"iteration {self.schedule.start(epoch):,}/{self.schedule.iterations:,}"

    def is_figure(self, key: str) -> bool:
        return key in self.problem.columns

    def train(self, number: int) -> None:
        """One round."""
        # For what torch draws itself (dropout, sampled anchors), so that a start in the middle goes on alike.
        torch.manual_seed(derive(self.config.seed, "round", number, self.worker.rank))
        clock, steps, start = Clock(), self.schedule.steps(number), self.schedule.start(number)
        size, total = self.schedule.batch_size, self.schedule.iterations * self.schedule.batch_size

        def loss_of(_: np.ndarray, samples: list[Sample]) -> torch.Tensor:
            with self.compute.autocast():
                return self.problem.loss(self.trained, samples, self.compute)

        def set_rate(optimizer: torch.optim.Optimizer, now: float) -> None:
            for group in optimizer.param_groups:
                group["lr"] = self.schedule.rate(start + round((now - number) * steps))

        loss = training.run_batches(
            self.trained,
            training.prefetched(self.images.train(number), self.streamed, self.worker.device),
            loss_of,
            self.state.optimizer,
            self.config.train,
            self.compute,
            epoch=number,
            num_steps=steps,
            clock=clock,
            on_step=lambda step: self.worker.progress((start + step) * size, total, "train"),
            set_rate=set_rate,
        )
        self.ended(number, clock, loss)

    @torch.inference_mode()
    def evaluate(self, number: int) -> dict[str, float]:
        """Figures of all test images, on rank 0; empty elsewhere."""
        self.model.eval()
        clock, found = Clock(), {}
        for image_id, sample in self.images.test():
            with self.compute.autocast():
                found[image_id] = self.problem.find(self.model, sample, self.compute)
        parts = self.worker.gather(found)
        if parts is None:
            return {}
        found = {image_id: one for part in parts for image_id, one in part.items()}
        if len(found) != self.problem.num_test:
            raise RunError(
                f"{len(found):,} of {self.problem.num_test:,} test images were tested; give the same command again"
            )
        figures = self.problem.figures([found[image_id] for image_id in range(len(found))])
        said = {key: round(value, 4) for key, value in figures.items()}
        self.log(number, "evaluate", seconds=round(clock.seconds, 3), num_images=len(found), **said)
        return figures

    @torch.inference_mode()
    def draw(self) -> None:
        """examples.png: the first test images, with what is there and what is found."""
        self.model.eval()
        ids = range(min(NUM_PICTURES, self.problem.num_test))
        with self.compute.autocast():
            pairs = [self.problem.picture(self.model, image_id, self.compute) for image_id in ids]
        self.folder.write("examples.png", pictures.png(pairs))


def loop(job: Job) -> dict | None:
    """Train all rounds, test after the last; rank 0 returns {"figures", "note"}."""
    session = DenseSession(job)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(job.config.seed, "heads"))
        model = session.problem.network(job.extras["candidate"].get().build().train())
    model, note = session.synchronised(model)
    config = job.config.train
    session.hold(
        model,
        model,
        lambda: torch.optim.SGD(
            model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        ),
    )
    every = job.extras["eval_every"]
    for number in session.state.remaining(session.schedule.rounds):
        session.train(number)
        if every and (number + 1) % every == 0 and number + 1 < session.schedule.rounds:
            session.evaluate(number)
        session.commit(number, {})
    figures = session.evaluate(session.schedule.rounds - 1)
    if not session.worker.is_first:
        return None
    session.draw()
    return {"figures": figures, "note": note}


# --- the benchmark ------------------------------------------------------------------------------------------------------


def measure(options: Dense, candidate: Candidate, problem: Problem, what: str) -> list[dict]:
    """The results of all trials, {"figures", "note"} each; those that are finished are only read."""
    found = []
    for trial in range(options.trials):
        folder = options.folder.child(f"trial_{trial}")
        if not folder.exists("result.json"):
            print(f"{what}, trial {trial + 1} of {options.trials}" if options.trials > 1 else what, flush=True)
            result = fit(loop, _job(options, candidate, problem, folder, trial), options)
            folder.write_json("result.json", result | {"versions": launch.versions()})
        found.append(folder.read_json("result.json"))
    return found


def _job(options: Dense, candidate: Candidate, problem: Problem, folder: Folder, trial: int) -> Job:
    local, schedule = options.num_workers == 0, problem.schedule
    train = TrainConfig(
        epochs=schedule.rounds,
        batch_size=schedule.batch_size,
        micro_batch=options.micro_batch,
        lr=schedule.lr,
        weight_decay=schedule.weight_decay,
    )
    seed = derive(options.seed, "trial", trial)
    images = ImagesConfig(size=candidate.size, resize=candidate.resize)
    config = job_config(options, folder, options.data, model=candidate.model, images=images, train=train)
    config = replace(config, seed=seed)
    board = None if local else Remote(PlanBoard, local=False, num_cpus=0)
    shared = Shared(problem, local=local)
    streams = DenseStreams(config, shared, problem.num_test, schedule, board)
    extras = {"problem": shared, "candidate": Shared(candidate, local=local), "eval_every": options.eval_every}
    return Job(config, folder, Remote(Board, local=local, num_cpus=0), streams, None, extras, time.time())


def rows(
    options: Dense, candidate: Candidate, problem: Problem, benchmark: str, *, data: str, full: bool, notes: list[str]
) -> list[Row]:
    """The rows of the scorecard: means over the trials, and their spread where there are several."""
    results = measure(options, candidate, problem, f"{benchmark} of {candidate.name} on {data}")
    network = candidate.model.architecture
    trained = dict.fromkeys(result["note"] for result in results)
    said = [*candidate.notes, *trained, "" if network == "resnet50" else f"{network} instead of resnet50", *notes]
    return [
        Row(
            benchmark=benchmark,
            column=column,
            value=round(statistics.mean(values), 2),
            data=data,
            backbone=candidate.label,
            full=full,
            seeds=len(values),
            spread=round(statistics.stdev(values), 2) if len(values) > 1 else None,
            notes=tuple(filter(None, said)),
        )
        for column in problem.columns
        for values in [[result["figures"][column] for result in results]]
    ]


def score(
    options: Dense,
    candidate: Candidate,
    problem: Problem,
    sets: dict[str, Any],
    fingerprint: Callable[[Any], str],
    family: str,
    dataset: str,
    *,
    changed: list[str],
    more: list[str],
) -> list[Row]:
    """The rows of the scorecard, measured once; ``sets`` by split; notes: ``changed`` of the protocol, and ``more``."""
    benchmark, counts = f"{family}_{dataset}", {split: len(one.images) for split, one in sets.items()}
    data = f"{SETS[benchmark]}: {', '.join(f'{count:,} {split}' for split, count in counts.items())} images"
    full = counts == OFFICIAL.get(dataset) and not changed
    facts = {"backbone": candidate.fingerprint, "data": "/".join(map(fingerprint, sets.values()))}
    return once(
        options,
        facts,
        lambda: rows(options, candidate, problem, benchmark, data=data, full=full, notes=[*changed, *more]),
        free=("micro_batch",),
    )
