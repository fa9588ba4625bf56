"""Supervised training over shards, as one worker sees it: what linear evaluation and fine-tuning share.

Every labelled image once an epoch (a last batch that is not full takes images a second time), the val split in eval mode,
a commit after each epoch. All runs of a benchmark go on from their last commit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from raydc import checkpoint, launch, training
from raydc.benchmarks.features import ImageSet, shard_split
from raydc.benchmarks.options import Setting
from raydc.checkpoint import TrainState
from raydc.clustering.sampling import SamplingPlan, plain_plan
from raydc.config import Config, ImagesConfig, ModelConfig, RunError, TrainConfig, UsageError
from raydc.data import shards, stream
from raydc.data.schema import Manifest
from raydc.launch import Job, Worker
from raydc.models.norm import batchnorms, equalise_statistics
from raydc.remote import Board, Remote, Shared
from raydc.seeding import derive
from raydc.storage import Folder
from raydc.tracking import Journal
from raydc.training import Clock

# --- driver side --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LabelledShards:
    """A shards folder with labels: ``labels`` int32 by image_id for train and val, -1 where there is none."""

    folder: Folder
    manifest: Manifest
    labels: dict[str, np.ndarray]
    num_classes: int

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    def images(self, split: str) -> ImageSet:
        """A split, to extract features from."""
        return shard_split(self.folder, self.manifest, split)

    def describe(self, num_train: int | None = None) -> str:
        """The data in words, for a row of the scorecard."""
        train, val = (self.manifest.splits[split].rows for split in ("train", "val"))
        used = f"{train:,}" if num_train in (None, train) else f"{num_train:,} of {train:,}"
        return f"{self.folder.name}: {used} train, {val:,} val images, {self.num_classes:,} classes"

    def has(self, expected: dict[str, int]) -> bool:
        """Whether the splits have the official sizes."""
        return all(split in self.manifest.splits and self.manifest.splits[split].rows == n for split, n in expected.items())


def open_shards(path: str) -> LabelledShards:
    """UsageError unless ``path`` holds shards with a train and a val split and labels that are its classes."""
    folder = Folder(path)
    try:
        manifest = shards.open_manifest(folder)
        for split in ("train", "val"):
            if split not in manifest.splits or not manifest.splits[split].rows:
                raise UsageError(
                    f"{folder.uri} has no {split} images; make shards with both splits (--val or --val-fraction)"
                )
        labels = {split: shards.labels(folder, manifest, split) for split in ("train", "val")}
    except shards.ShardError as error:
        raise UsageError(str(error)) from None
    for split, values in labels.items():
        if (values < 0).all():
            raise UsageError(
                f"{folder.uri} has no labels in {split}; make shards of a class-per-folder tree or a labelled list"
            )
    highest = max(int(values.max()) for values in labels.values())
    num_classes = len(manifest.classes) if manifest.classes else highest + 1
    if highest >= num_classes:
        raise UsageError(f"{folder.uri} has label {highest} and only {num_classes} classes; make the shards again")
    return LabelledShards(folder, manifest, labels, num_classes)


def open_job(
    setting: Setting,
    data: LabelledShards,
    run_dir: Folder,
    *,
    model: ModelConfig,
    images: ImagesConfig,
    train: TrainConfig,
    extras: dict,
    ids: np.ndarray | None = None,
    streams: stream.Streams | None = None,
) -> Job:
    """Everything a worker needs; Ray is attached already. ``ids``: the images of train that are used (all labelled ones)."""
    local = setting.num_workers == 0
    ids = np.flatnonzero(data.labels["train"] >= 0) if ids is None else ids
    share = len(ids) / len(data.labels["train"])
    config = job_config(setting, run_dir, data.folder.uri, model=model, images=images, train=train)
    if streams is None:
        cached = stream.choose_cache(config, data.folder, data.manifest, {"train": share, "val": 1.0})
        if not cached and not local and stream.choose_cache(config, data.folder, data.manifest, {"train": share}):
            cached = "train"
        if not cached and setting.deterministic:
            raise UsageError("--deterministic needs the images in memory, and these are streamed; give a node more memory")
        if not cached and local:
            raise UsageError(
                "these images are streamed through Ray, and num_workers 0 runs without it; give --num-workers 1"
            )
        only = None if share == 1 else ids
        streams = stream.open_streams(config, data.folder, data.manifest, cached=cached, local=local, only=only)
    extras = extras | {"ids": Shared(ids, local=local), "labels": Shared(data.labels, local=local)}
    board = Remote(Board, local=local, num_cpus=0)
    return Job(config, run_dir, board, streams, None, extras, time.time())


def job_config(
    setting: Setting, run_dir: Folder, data: str, *, model: ModelConfig, images: ImagesConfig, train: TrainConfig
) -> Config:
    """What workers are told, with the choices that this machine makes."""
    use_gpu = launch.choose_gpu(setting.use_gpu, setting.num_workers)
    precision = training.choose_precision("auto", "cuda" if use_gpu else "cpu")
    return Config(
        recipe="benchmark",
        seed=setting.seed,
        data=data,
        run_dir=run_dir.uri,
        num_workers=setting.num_workers,
        use_gpu="yes" if use_gpu else "no",
        deterministic=setting.deterministic,
        verbose=setting.verbose,
        model=model,
        images=images,
        train=replace(train, precision=precision, channels_last="yes", threads=setting.threads),
    )


def fit(loop: Callable[[Job], dict | None], job: Job, setting: Setting, callbacks=()) -> dict:
    """Run ``loop`` on the workers; what rank 0 returns."""
    return launch.fit(
        loop,
        job,
        num_workers=setting.num_workers,
        use_gpu=job.config.use_gpu == "yes",
        max_failures=setting.max_failures,
        callbacks=callbacks,
    )


# --- worker side --------------------------------------------------------------------------------------------------------


class Session:
    """Model, optimizer, journal and commits of one worker of a benchmark that trains."""

    def __init__(self, job: Job, worker: Worker | None = None) -> None:
        self.config: Config = job.config
        self.folder = job.run_dir
        self.worker = worker or Worker.here(job.board, self.config.use_gpu == "yes")
        self.compute, self.threads = training.open_compute(
            self.config.train, self.worker.device, self.worker.local_world_size, deterministic=self.config.deterministic
        )
        self.journal = Journal(self.folder) if self.worker.is_first else None

    def hold(self, model: nn.Module, kept: nn.Module, make_optimizer: Callable[[], torch.optim.Optimizer]) -> None:
        """Take the model to the device and to the last commit; wrap it for several workers.

        ``kept``: the part of the model that learns and that commits hold.
        """
        self.model = self.compute.prepare(model)
        self.state = TrainState(kept, make_optimizer())
        checkpoint.load_state(self.folder, self.state)
        if self.state.epoch:
            self.worker.say(f"going on in {self.place(self.state.epoch)}")
        if self.journal is not None:
            self.journal.rewind(self.state.epoch, keep=())
        self.trained = self.worker.wrap(self.model)

    def place(self, epoch: int) -> str:
        """What a person calls it."""
        return f"epoch {epoch}/{self.config.train.epochs}"

    def ended(self, epoch: int, clock: Clock, loss: float) -> None:
        """All ranks' statistics are one again, and the journal has a line on the epoch."""
        equalise_statistics(self.state.model)
        loss = self.worker.mean(loss)
        self.log(epoch, "train", **clock.summary(self.worker.sum(clock.images)), loss=round(loss, 4))

    def log(self, epoch: int, phase: str, **values) -> None:
        """A line in metrics.jsonl and on the console."""
        if not self.worker.is_first:
            return
        line = self.journal.add(epoch, phase, **values)
        if phase == "train":
            said = f"{line['seconds']:>7.1f} s  {line['images_per_s']:>8,.1f} img/s  loss {line['loss']:.3f}"
        else:
            said = "  ".join(
                f"{key.removesuffix(' top1')} {value:.2f}" for key, value in values.items() if self.is_figure(key)
            )
        self.worker.say(f"{self.place(epoch + 1)}  {phase:<8} {said}")

    def is_figure(self, key: str) -> bool:
        """Whether a value of a look at val is said."""
        return key.endswith("top1")

    def commit(self, epoch: int, metrics: dict) -> None:
        """Model and optimizer after ``epoch``, and a barrier for all workers."""
        if self.worker.is_first:
            checkpoint.check_finite(self.state.model, epoch)
            checkpoint.save_state(self.folder, self.state, epoch)
        self.worker.report({"epoch": epoch + 1} | metrics)

    def synchronised(self, model: nn.Module) -> tuple[nn.Module, str]:
        """SyncBN where it exists (CUDA, several workers), and a sentence that says which it is."""
        if not batchnorms(model):
            return model, ""
        world, train = self.worker.world_size, self.config.train
        share = train.batch_size // world
        at_once = min(train.micro_batch or share, share)
        few = f", {at_once} of {share} images at a time" if at_once < share else ""
        if world == 1:
            return model, f"BatchNorm over the {'whole ' * (not few)}batch (one worker){few}"
        if self.worker.device.type == "cuda":
            return nn.SyncBatchNorm.convert_sync_batchnorm(model), f"SyncBN over {world} workers{few}"
        return model, f"BatchNorm of each of {world} CPU workers, not SyncBN{few}"


class Learner(Session):
    """A session on labelled images: an epoch shows each once, and val is looked at as a whole."""

    def __init__(self, job: Job, worker: Worker | None = None) -> None:
        super().__init__(job, worker)
        self.images = job.streams.open(self.worker, self.threads)
        self.streamed = bool(job.streams.datasets)
        self.labels: dict[str, np.ndarray] = job.extras["labels"].get()
        self.ids: np.ndarray = job.extras["ids"].get()

    @property
    def num_steps(self) -> int:
        return -(-len(self.ids) // self.config.train.batch_size)

    def plan(self, epoch: int) -> SamplingPlan:
        """Each labelled image once, as whole batches."""
        drawn = np.full(len(self.labels["train"]), -1, np.int32)
        drawn[self.ids] = 0
        return plain_plan(drawn, self.num_steps * self.config.train.batch_size, derive(self.config.seed, "plan", epoch))

    def train(
        self,
        epoch: int,
        *,
        change: Callable[[Iterator, int], Iterator] | None = None,
        criterion=training.cross_entropy,
        set_rate=None,
    ) -> None:
        """One epoch; ``change(batches, seed)`` alters what the network is given."""
        seed, size = derive(self.config.seed, "crops", epoch), self.config.train.batch_size
        batches = self.images.train(self.plan(epoch), seed, size)
        batches = change(batches, seed) if change else batches
        clock = Clock()
        what = self.place(epoch)
        total = self.config.train.epochs * self.num_steps * size
        loss = training.run_steps(
            self.trained,
            self._prefetched(batches),
            torch.from_numpy(self.labels["train"]).long(),
            self.state.optimizer,
            self.config.train,
            self.compute,
            epoch=epoch,
            num_steps=self.num_steps,
            clock=clock,
            on_step=lambda step: self.worker.progress((epoch * self.num_steps + step) * size, total, what),
            criterion=criterion,
            set_rate=set_rate,
        )
        self.ended(epoch, clock, loss)

    def _prefetched(self, batches: Iterator) -> Iterator:
        return training.prefetched(batches, self.streamed, self.worker.device)

    @torch.inference_mode()
    def evaluate(self, epoch: int, names: tuple[str, ...] = ("",)) -> dict[str, dict[str, float]]:
        """Top-1 and top-5 of the val split in percent, for each named output of the model ("" where it has one)."""
        self.model.eval()
        clock, correct, seen = Clock(), {}, 0
        for ids, pixels in self._prefetched(self.images.extract("val")):
            labels = torch.from_numpy(self.labels["val"][ids]).long()
            known = labels >= 0
            with self.compute.autocast():
                outputs = self.model(self.compute.place(pixels))
            for name, scores in (outputs if isinstance(outputs, dict) else {"": outputs}).items():
                hits = top_hits(scores.float().cpu()[known], labels[known])
                correct[name] = correct.get(name, 0) + hits
            seen += int(known.sum())
        seen = self.worker.sum(seen)
        if not seen:
            raise RunError("not one labelled image of val could be read; make the shards again")
        # Every rank adds the same names: a rank of a stream may have been given no image.
        sums = {name: [self.worker.sum(float(n)) for n in correct.get(name, (0, 0))] for name in names}
        found = {name: {"top1": 100 * one / seen, "top5": 100 * five / seen} for name, (one, five) in sums.items()}
        flat = {
            f"{name} {key}".strip(): round(value, 4) for name, figures in found.items() for key, value in figures.items()
        }
        self.log(epoch, "evaluate", seconds=round(clock.seconds, 3), num_images=round(seen), **flat)
        return found


def top_hits(scores: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """How many labels are the best score, and among the five best."""
    best = scores.topk(min(5, scores.shape[1]), 1).indices == labels[:, None]
    return np.array([best[:, :1].sum().item(), best.sum().item()])


def scaled(train: TrainConfig, epochs: int) -> TrainConfig:
    """The schedule squeezed into ``epochs`` (0: as it is), its milestones in proportion."""
    if not epochs:
        return train
    milestones = tuple(milestone * epochs / train.epochs for milestone in train.milestones)
    return replace(train, epochs=epochs, milestones=milestones)
