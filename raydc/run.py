"""A run as one worker sees it: model, optimizer, images, bank, journal, and this worker's place among the others."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from raydc import checkpoint, training
from raydc.checkpoint import TrainState
from raydc.clustering import diagnostics
from raydc.clustering.assignment import Assignment
from raydc.clustering.bank import CoverageError
from raydc.clustering.sampling import SamplingPlan, plan_length
from raydc.config import Config, RunError
from raydc.launch import Job, Worker
from raydc.models.backbone import build_backbone
from raydc.models.head import Classifier
from raydc.models.norm import equalise_statistics, folded
from raydc.optim import build_optimizer
from raydc.seeding import derive, uniforms
from raydc.tracking import Journal, sentence
from raydc.training import Clock

BLOCK = 2048  # rows that travel to the bank at once


def classifier(config: Config, backbone: nn.Module) -> Classifier:
    """The paper's network: a linear head on the backbone."""
    return Classifier(backbone, config.clustering.num_clusters)


class Run:
    """What the verbs of a loop work on: model, optimizer, images, bank, journal, and this worker's place.

    ``build(config, backbone)`` makes the network of the algorithm, a module with ``backbone``, ``trunk``, ``head`` and
    ``embed`` (see models.head.Classifier). ``memory``: ``num_views``, and for ODC ``online``, options of its OnlineClusters.
    """

    def __init__(self, job: Job, build: Callable[[Config, nn.Module], nn.Module] = classifier, **memory) -> None:
        self.config: Config = job.config
        self.folder, self.bank = job.run_dir, job.bank
        use_gpu = self.config.use_gpu == "yes"
        self.worker = Worker.here(job.board, use_gpu)
        self.compute, self.threads = training.open_compute(
            self.config.train, self.worker.device, self.worker.local_world_size, deterministic=self.config.deterministic
        )
        self.sizes: dict[str, int] = job.streams.sizes
        self.images = job.streams.open(self.worker, self.threads)
        self.streamed = job.streams.cached is None
        backbone = build_backbone(self.config.model, derive(self.config.seed, "backbone"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.config.seed, "network"))
            model = build(self.config, backbone)
        if self.config.algorithm != "deepcluster" and use_gpu and self.worker.world_size > 1:  # as in their references
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = self.compute.prepare(model)
        self.state = TrainState(self.model, build_optimizer(self.model.trunk, self.model.head, self.config.train))
        checkpoint.load_state(self.folder, self.state)
        self.wrap()
        self.labels = job.extras["labels"].get() if self.worker.is_first else None
        order = np.argsort(uniforms(derive(self.config.seed, "probe"), np.arange(self.sizes["train"]))[:, 0], kind="stable")
        self.probe_ids = np.sort(order[: self.config.probe.num_images])
        self.journal = Journal(self.folder) if self.worker.is_first else None
        self.noted: str | None = None  # what the last clustering was found ill of, which need not be said again
        self.remembers = self.config.clustering.features == "remembered"
        self.first_epoch = self.state.epoch
        self.unreadable_ids: np.ndarray | None = None  # rank 0, where features are remembered
        if self.remembers:
            self._recall(**memory)
        self._go_on(job)

    def wrap(self) -> None:
        """What is stepped; a compiled module has the model's own weights, as a wrapped one has."""
        self.trained = self.worker.wrap(torch.compile(self.model) if self.config.train.compile else self.model)

    def _recall(self, num_views: int = 1, online: dict | None = None) -> None:
        """What was remembered at the last commit point; the bank may hold what a killed start has changed since."""
        self.num_views, self.online, found = num_views, online is not None, False
        with self.together():
            if self.worker.is_first and self.first_epoch > 0:
                found = self.bank.load_memory(self.folder, checkpoint.memory_file(self.first_epoch - 1), online)
        self.has_memory = self.worker.broadcast(found)

    def _go_on(self, job: Job) -> None:
        """Say where this start begins, and forget what will be written again."""
        committed = self.committed_assignment(self.first_epoch) is not None
        if not self.worker.is_first:
            return
        self.journal.rewind(self.first_epoch, keep=None if committed else ("start",))
        workers, threads = (self.journal.last("start", name) for name in ("num_workers", "threads"))
        now = {"num_workers": self.worker.world_size, "threads": self.threads}
        self.log(self.first_epoch, "start", seconds=round(time.time() - job.began, 2), **now)
        if self.first_epoch > 0 or committed:
            where = "train, with the labels it had" if committed else "extract"
            if self.first_epoch == self.config.train.epochs:
                where = "measuring the final features"
            self.worker.say(f"going on in epoch {self.first_epoch}: {where}")
        if workers not in (None, self.worker.world_size):
            now = f"{workers} workers before, {self.worker.world_size} now"
            self.worker.say(f"{now}: BatchNorm sees batches of another size, so later epochs differ from an unbroken run's")
        elif threads not in (None, self.threads):
            now = f"{threads} threads before, {self.threads} now"
            self.worker.say(f"{now}: sums are rounded in another order, so later epochs may differ from an unbroken run's")

    def committed_assignment(self, epoch: int) -> Assignment | None:
        """The clustering that an earlier start committed for these very weights; the same answer on all ranks.

        ODC's labels are worth nothing without the memory they hang on.
        """
        if epoch != self.first_epoch or (self.remembers and self.online and not self.has_memory):
            return None
        digest = checkpoint.weights_hash(self.model.backbone) if self.worker.is_first else None
        return self.load_assignment(epoch, self.worker.broadcast(digest))

    def load_assignment(self, epoch: int, digest: str, part: int = 0) -> Assignment | None:
        """What rank 0 has committed for these weights, on every rank, or on none of them."""
        found = checkpoint.load_assignment(self.folder, epoch, digest, part)
        return found if self.worker.all_agree(found is not None) else None

    def previous(self, epoch: int, part: int = 0) -> Assignment | None:
        """The clustering of the epoch before."""
        return checkpoint.load_assignment(self.folder, epoch - 1, part=part) if epoch else None

    def ask_bank(self, method: str, *args):
        """The bank's answer; what it says the user must mend ends the run."""
        try:
            return getattr(self.bank, method)(*args)
        except ValueError as error:
            raise RunError(str(error)) from None

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What happens inside, happens on all ranks or on none: a CoverageError of one is raised on every one. A barrier."""
        problem = None
        try:
            yield
        except CoverageError as error:
            problem = error
        if not self.worker.all_agree(problem is None):
            raise problem or CoverageError("another worker lost the bank")

    def open_bank(self) -> str:
        """The token of a new extraction pass."""
        token = None
        with self.together():
            token = self.bank.open() if self.worker.is_first else None
        return self.worker.broadcast(token)

    def unreadable(self, split: str) -> np.ndarray:
        return np.array(getattr(self.images, "unreadable", {}).get(split, []), np.int64)

    def prefetched(self, batches: Iterator) -> Iterator:
        return training.prefetched(batches, self.streamed, self.worker.device)

    def probe_is_due(self, epoch: int) -> bool:
        if epoch == 0:
            return self.config.probe.baselines
        every = self.config.probe.every
        return epoch == self.config.train.epochs or bool(every and epoch % every == 0)

    def probe_options(self, row: str) -> dict:
        """k keeps the run's images per cluster where the probe sees only a part of them."""
        share = len(self.probe_ids) / self.sizes["train"]
        k = max(2, round(self.config.clustering.num_clusters * share))
        whiten_dim = 0 if row == "pixels" or not self.config.clustering.whiten else self.config.clustering.pca_dim
        return {"seed": self.config.seed, "k": k, "whiten_dim": whiten_dim}

    def describe(self, assignment: Assignment, part: int = 0) -> dict:
        """Health of a clustering, and its agreement with the labels and with the clustering before it."""
        before = self.previous(assignment.epoch, part)
        train_labels, _ = self.labels
        nmi = {
            "nmi_labels": diagnostics.nmi(assignment.pseudo_labels, train_labels),
            "nmi_previous": None if before is None else diagnostics.nmi(assignment.pseudo_labels, before.pseudo_labels),
        }
        rounded = {name: None if value is None else round(value, 4) for name, value in nmi.items()}
        return diagnostics.health(assignment) | rounded

    # --- training ---

    def train_pass(
        self, epoch: int, plan: SamplingPlan, loss_of: Callable, *, views: list | None = None, after_step=None
    ) -> float:
        """One pass over the plan's draws; the mean loss. ``after_step()`` follows each step."""
        config, clock = self.config.train, Clock()
        seed = derive(self.config.seed, "crops", epoch)
        torch.manual_seed(derive(self.config.seed, "dropout", epoch, self.worker.rank))

        def on_step(step: int) -> None:
            if after_step is not None:
                after_step()
            self.progress(epoch, "train", step * config.batch_size)

        loss = training.run_batches(
            self.trained,
            self.prefetched(self.images.train(plan, seed, config.batch_size, views)),
            loss_of,
            self.state.optimizer,
            config,
            self.compute,
            epoch=epoch,
            num_steps=plan.num_draws // config.batch_size,
            clock=clock,
            on_step=on_step,
        )
        equalise_statistics(self.model)
        loss, images = self.worker.mean(loss), self.worker.sum(clock.images)
        drawn = int((plan.counts > 0).sum())
        facts = {"num_clusters": self.journal.last("cluster", "num_clusters")} if self.worker.is_first else {}
        self.log(epoch, "train", **clock.summary(images), loss=round(loss, 4), num_images_drawn=drawn, **facts)
        return loss

    # --- words ---

    def log(self, epoch: int, phase: str, **values) -> None:
        """A line in metrics.jsonl and, for a phase of the paper, one on the console."""
        if not self.worker.is_first:
            return
        line = self.journal.add(epoch, phase, **values)
        text = sentence(line, self.config)
        if text:
            self.worker.say(text)
        if phase == "cluster":
            ill = diagnostics.verdict(values, self.sizes["train"], self.config.clustering.method)
            if ill and ill != self.noted:
                self.worker.say(f"  note: {ill}")
            self.noted = ill

    def progress(self, epoch: int, phase: str, images: int) -> None:
        """Images done in the whole run, of those it will send through the network."""
        extracted, trained = 0 if self.remembers else self.sizes["train"], self.num_draws
        before = epoch * (extracted + trained) + (extracted if phase == "train" else 0)
        total = self.config.train.epochs * (extracted + trained) + extracted
        self.worker.progress(min(total, before + images), total, f"epoch {epoch}/{self.config.train.epochs} {phase}")

    @property
    def num_draws(self) -> int:
        """Draws between two clusterings."""
        return plan_length(self.sizes["train"], self.config.train.plan_length, self.config.train.batch_size)


def in_blocks(num: int) -> Iterator[slice]:
    """Slices of ``num`` rows that are small enough to travel."""
    return (slice(start, start + BLOCK) for start in range(0, num, BLOCK))


def collect(
    run: Run, model: torch.nn.Module, batches: Iterator, clock: Clock, epoch: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(image_ids (n,), outputs (n, D) float32) of this rank's images; with ``epoch`` it moves the progress bar."""
    ids: list[np.ndarray] = []
    features: list[np.ndarray] = []
    for image_ids, outputs in training.run_inference(folded(model), run.prefetched(batches), run.compute, clock):
        ids.append(image_ids)
        features.append(outputs.numpy())
        if epoch is not None:
            run.progress(epoch, "extract", clock.images * run.worker.world_size)
    if not ids:
        return np.empty(0, np.int64), np.empty((0, run.model.backbone.feature_dim), np.float32)
    return np.concatenate(ids), np.concatenate(features)


class Recorder:
    """Features on their way from the training pass into the bank's memory, a block at a time."""

    def __init__(self, run: Run, epoch: int) -> None:
        self.run, self.lost = run, False
        self.step = self.first = first_step(epoch)
        self.rows: list[list[tuple]] = [[] for _ in range(run.num_views)]

    def keep(self, image_ids: np.ndarray, *views_Bd: torch.Tensor) -> None:
        """Features of one piece of a batch, of each view. All ranks count alike; the rank decides between equals."""
        steps = np.full(len(image_ids), self.step + self.run.worker.rank, np.int64)
        self.step += self.run.worker.world_size
        for view, (rows, features) in enumerate(zip(self.rows, views_Bd, strict=True)):
            rows.append((image_ids, steps, features.detach().float()))
            if sum(len(ids) for ids, _, _ in rows) >= BLOCK:
                self._send(view)

    def _send(self, view: int) -> None:
        """A bank that is gone is no reason to leave the other ranks alone in the middle of a pass."""
        ids, steps, features = zip(*self.rows[view], strict=True)
        self.rows[view] = []
        try:
            block = np.concatenate(ids), np.concatenate(steps), torch.cat(features).cpu().numpy()
            self.run.bank.send("remember", view, *block)
        except CoverageError:
            self.lost = True

    def finish(self) -> int:
        """Images that this pass has not drawn; they keep what was remembered. CoverageError on all ranks if it is lost."""
        for view in (view for view, rows in enumerate(self.rows) if rows):
            self._send(view)
        with self.run.together():
            self.run.bank.flush()
            if self.lost:
                raise CoverageError("the bank lost what was remembered")
            return self.run.bank.num_older(self.first) if self.run.worker.is_first else 0


def first_step(epoch: int) -> int:
    """Number of an epoch's first training step in the bank's memory; what an extraction pass fills in comes just before."""
    return (epoch << 32) + 1
