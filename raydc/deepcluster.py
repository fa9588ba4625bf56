"""DeepCluster (Caron et al., ECCV 2018): extract, cluster, reassign, train.

``loop`` is section 3 of the paper as every worker runs it; ``pretrain`` prepares a run directory and hands it to Ray.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from raydc import checkpoint, launch, training
from raydc import config as configs
from raydc.checkpoint import TrainState
from raydc.clustering import diagnostics
from raydc.clustering.assignment import Assignment
from raydc.clustering.bank import CoverageError, FeatureBank
from raydc.clustering.sampling import SamplingPlan, plain_plan, plan_length, uniform_plan
from raydc.clustering.whitening import moments
from raydc.config import Config, RunError, UsageError
from raydc.data import ingest, shards, stream
from raydc.launch import Job, Remote, Shared, Worker
from raydc.models.backbone import build_backbone
from raydc.models.head import Classifier
from raydc.models.norm import adapt_statistics, batchnorms, equalise_statistics, folded
from raydc.optim import build_optimizer, forget_momentum
from raydc.seeding import derive, uniforms
from raydc.storage import Folder
from raydc.tracking import Journal
from raydc.training import Clock, Compute

EXTRACT_ATTEMPTS = 3
ADAPT_BATCHES = 32  # of extraction pixels, for the random-init baseline with adapted BatchNorm statistics
PIXEL_SIDE = 32  # the raw-pixel row compares images of at most this side
FIGURES = ("nmi_labels", "nmi_classes", "knn_top1", "linear_top1")


# --- the loop -----------------------------------------------------------------------------------------------------------


def loop(job: Job) -> dict | None:
    """Every worker's run, from the last commit point to the end. Rank 0 returns what result.json holds."""
    run = Run(job)
    for epoch in run.state.remaining(run.config.train.epochs):
        assignment = run.committed_assignment(epoch)
        if assignment is None:
            assignment = extract_and_cluster(run, epoch)
        reassign(run, assignment)
        loss = train(run, assignment)
        report(run, epoch, loss)
    return finish(run)


def extract_and_cluster(run: Run, epoch: int) -> Assignment:
    """Features of every image under today's weights, then k-means; again from the start if the bank lost them."""
    for attempt in range(EXTRACT_ATTEMPTS):
        problem = None
        try:
            token = extract(run, epoch)
            probe(run, epoch, token)
            assignment = cluster(run, epoch, token)
        except CoverageError as error:
            problem = error
        if run.worker.all_agree(problem is None):
            return assignment
        run.worker.say(f"epoch {epoch}: {problem or 'another worker lost the bank'} (try {attempt + 2})")
    raise RunError(f"epoch {epoch} could not be clustered in {EXTRACT_ATTEMPTS} tries: {problem}; see --verbose")


def extract(run: Run, epoch: int) -> str:
    """One pass over this rank's images in eval mode; PCA of all ranks' sums; reduced features go to the bank."""
    token = run.open_bank()
    clock = Clock(time.perf_counter())
    batches = run.images.extract("train")
    ids, features = collect(run, run.model.backbone, batches, clock, f"epoch {epoch} extract")
    run.bank.send("add_moments", token, run.worker.rank, moments(features))
    run.bank.send("skip", token, run.unreadable("train"))
    run.bank.flush()
    run.sync()
    whitening = run.bank.whitening(token)
    for start in range(0, len(ids), stream.EXTRACT_BATCH * 8):
        block = slice(start, start + stream.EXTRACT_BATCH * 8)
        run.bank.send("push", token, ids[block], whitening(features[block]))
    if run.probe_is_due(epoch):
        mine = np.isin(ids, run.probe_ids)
        push_probe(run, token, "train", ids[mine], features[mine])
    run.bank.flush()
    run.sync()
    run.log(epoch, "extract", **clock.summary(run.worker.world_size), num_unreadable=len(run.unreadable("train")))
    return token


def cluster(run: Run, epoch: int, token: str) -> Assignment:
    """k-means on the bank, committed by rank 0, read by all: what is trained on is what was committed."""
    if run.compute.device.type == "cuda":
        torch.cuda.empty_cache()
    problem = None
    if run.worker.is_first:
        began = time.perf_counter()
        try:
            assignment = run.bank.cluster(token, epoch, run.config.seed, checkpoint.weights_hash(run.model.backbone))
            checkpoint.save_assignment(run.folder, assignment)
            run.log(epoch, "cluster", seconds=round(time.perf_counter() - began, 3), **run.describe(assignment))
        except CoverageError as error:
            problem = str(error)
        except ValueError as error:
            raise RunError(str(error)) from None
    problem = run.worker.broadcast(problem)
    if problem:
        raise CoverageError(problem)
    return checkpoint.load_assignment(run.folder, epoch)


def reassign(run: Run, assignment: Assignment) -> None:
    """New pseudo-labels need a new head: fresh weights in place, no momentum left of the old ones."""
    run.model.head.refresh(derive(run.config.seed, "head", assignment.epoch))
    forget_momentum(run.state.optimizer, run.model.head.parameters())


def train(run: Run, assignment: Assignment) -> float:
    """One pass over the plan's draws with the pseudo-labels as targets; the mean loss."""
    epoch, config = assignment.epoch, run.config.train
    plan = make_plan(run.config, assignment)
    seed = derive(run.config.seed, "crops", epoch)
    num_steps = plan.num_draws // config.batch_size
    torch.manual_seed(derive(run.config.seed, "torch", epoch, run.worker.rank))
    clock = Clock(time.perf_counter())
    loss = training.run_steps(
        run.trained,
        run.prefetched(run.images.train(plan, seed, config.batch_size)),
        torch.from_numpy(assignment.pseudo_labels).long(),
        run.state.optimizer,
        config,
        run.compute,
        epoch=epoch,
        num_steps=num_steps,
        clock=clock,
        on_step=lambda step: run.progress(epoch, step * config.batch_size, f"epoch {epoch} train"),
    )
    equalise_statistics(run.model)
    loss = run.worker.mean(loss)
    drawn = int((plan.counts > 0).sum())
    run.log(epoch, "train", **clock.summary(run.worker.world_size), loss=round(loss, 4), num_images_drawn=drawn)
    return loss


def make_plan(config: Config, assignment: Assignment) -> SamplingPlan:
    """How often each image is drawn in the assignment's epoch."""
    length = plan_length(len(assignment.pseudo_labels), config.train.plan_length, config.train.batch_size)
    seed = derive(config.seed, "plan", assignment.epoch)
    if config.train.balance == "none":
        return plain_plan(assignment.pseudo_labels, length, seed)
    return uniform_plan(assignment.pseudo_labels, assignment.num_clusters, length, seed)


def report(run: Run, epoch: int, loss: float) -> None:
    """The second commit point: model and optimizer, and a barrier for all workers."""
    if run.worker.is_first:
        checkpoint.save_state(run.folder, run.state, epoch)
        checkpoint.save_backbone(run.folder, run.model.backbone, run.config)
    metrics = {"epoch": epoch, "loss": loss}
    if run.worker.is_first:
        metrics |= {key: run.journal.last("cluster", key) for key in ("nmi_previous", "nmi_labels", "num_empty_clusters")}
        metrics |= {key: run.journal.last("probe", key) for key in FIGURES if key != "nmi_labels"}
    run.worker.report(metrics)


def finish(run: Run) -> dict | None:
    """Cluster and probe the features of the final weights; what result.json holds."""
    epochs = run.config.train.epochs
    if run.committed_assignment(epochs) is None or run.journal_lacks("probe", epochs):
        extract_and_cluster(run, epochs)
    if not run.worker.is_first:
        return None
    checkpoint.save_backbone(run.folder, run.model.backbone, run.config)
    return summary(run)


# --- measuring ----------------------------------------------------------------------------------------------------------


def probe(run: Run, epoch: int, token: str) -> None:
    """kNN, linear probe and NMI of the features just extracted; before the first epoch also of what they must beat."""
    if not run.probe_is_due(epoch):
        return
    clock = Clock(time.perf_counter())
    if "val" in run.sizes:
        push_probe(run, token, "val", *collect(run, run.model.backbone, run.images.extract("val"), clock, "probe"))
    rows = ["trained"]
    if epoch == 0:
        push_baselines(run, token, clock)
        rows = ["untouched", "adapted", "pixels"]
    run.bank.flush()
    run.sync()
    if not run.worker.is_first:
        return
    for row in rows:
        prefix = "" if row in ("trained", "untouched") else f"{row}_"
        figures = run.bank.run_probe(token, (f"{prefix}train", f"{prefix}val"), run.config.probe, run.labels, **run.probe_options(row))
        figures = {key: None if value is None else round(value, 4) for key, value in figures.items()}
        run.log(epoch, "probe" if row == "trained" else f"probe_{row}", seconds=round(clock.seconds, 3), **figures)


def push_probe(run: Run, token: str, name: str, ids: np.ndarray, features: np.ndarray) -> None:
    for start in range(0, len(ids), stream.EXTRACT_BATCH * 8):
        block = slice(start, start + stream.EXTRACT_BATCH * 8)
        run.bank.send("push_probe", token, name, ids[block], features[block])


def push_baselines(run: Run, token: str, clock: Clock) -> None:
    """Features of the fresh weights with BatchNorm statistics adapted to the data, and raw pixels."""
    adapted = copy.deepcopy(run.model.backbone)
    if batchnorms(adapted):
        pixels = (p for (_, p), _ in zip(run.images.extract("train", run.probe_ids), range(ADAPT_BATCHES), strict=False))
        with run.compute.autocast():
            adapt_statistics(adapted, (run.compute.place(p) for p in pixels))
        equalise_statistics(adapted)
    for name, ids in (("train", run.probe_ids), ("val", None)):
        if name in run.sizes:
            push_probe(run, token, f"adapted_{name}", *collect(run, adapted, run.images.extract(name, ids), clock, "probe"))
            push_probe(run, token, f"pixels_{name}", *collect(run, _as_pixels, run.images.extract(name, ids), clock, "probe"))


class _Pixels(torch.nn.Module):
    """Pixels as features: (B, 3, S, S) -> (B, 3 * s * s), s at most 32."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        small = min(PIXEL_SIDE, pixels.shape[-1])
        return torch.nn.functional.adaptive_avg_pool2d(pixels.float(), small).flatten(1)


_as_pixels = _Pixels()


def collect(run: Run, model: torch.nn.Module, batches: Iterator, clock: Clock, what: str) -> tuple[np.ndarray, np.ndarray]:
    """(image_ids (n,), outputs (n, D) float32) of this rank's images."""
    ids: list[np.ndarray] = []
    features: list[np.ndarray] = []
    for image_ids, outputs in training.run_inference(folded(model), run.prefetched(batches), run.compute, clock):
        ids.append(image_ids)
        features.append(outputs.numpy())
        run.tick(what)
    if not ids:
        return np.empty(0, np.int64), np.empty((0, run.model.backbone.feature_dim), np.float32)
    return np.concatenate(ids), np.concatenate(features)


def summary(run: Run) -> dict:
    """The facts and figures of a finished run."""
    journal, last = run.journal, run.journal.last
    metrics = {"loss": last("train", "loss"), "nmi_previous": last("cluster", "nmi_previous")}
    for key in FIGURES:
        fresh = [value for row in ("untouched", "adapted") if (value := last(f"probe_{row}", key)) is not None]
        metrics |= {key: last("probe", key), f"{key}_random": max(fresh, default=None)}
        metrics[f"{key}_pixels"] = last("probe_pixels", key)
    phases = ("extract", "cluster", "train")
    return {
        "recipe": run.config.recipe,
        "seed": run.config.seed,
        "num_images": run.sizes["train"],
        "num_clusters": run.config.clustering.num_clusters,
        "epochs": run.config.train.epochs,
        "metrics": metrics,
        "num_empty_clusters": last("cluster", "num_empty_clusters"),
        "phase_s": {phase: round(sum(journal.all(phase, "seconds")), 2) for phase in phases}
        | {"probe": round(sum(journal.all("probe", "seconds")), 2), "start_up": last("start", "seconds")},
        "images_per_s": {phase: _median(journal.all(phase, "images_per_s")) for phase in ("extract", "train")}
        | {"cluster": _median([run.sizes["train"] / max(s, 1e-3) for s in journal.all("cluster", "seconds")])},
        "num_workers": run.worker.world_size,
    }


def _median(values: list[float]) -> float | None:
    return round(float(np.median(values)), 1) if values else None


# --- a run on one worker ------------------------------------------------------------------------------------------------


@dataclass(init=False)
class Run:
    """What the verbs above work on: model, optimizer, images, bank, journal, and this worker's place."""

    def __init__(self, job: Job) -> None:
        self.config: Config = job.config
        self.folder, self.bank = job.run_dir, job.bank
        use_gpu = self.config.use_gpu == "yes"
        self.worker = Worker.here(job.board, use_gpu)
        threads = training.choose_threads(self.config.train.threads, self.worker.local_world_size)
        torch.set_num_threads(threads)
        self.threads = threads
        if self.config.deterministic:
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        self.compute = Compute(self.worker.device, self.config.train.precision, self.config.train.channels_last == "yes")
        self.sizes: dict[str, int] = job.streams.sizes
        self.images = job.streams.open(self.worker, threads)
        self.streamed = job.streams.cached is None
        backbone = build_backbone(self.config.model, derive(self.config.seed, "backbone"))
        self.model = self.compute.prepare(Classifier(backbone, self.config.clustering.num_clusters))
        self.state = TrainState(self.model, build_optimizer(self.model.backbone, self.model.head, self.config.train))
        checkpoint.load_state(self.folder, self.state)
        self.trained = self._trained()
        self.labels = job.extras["labels"].get() if self.worker.is_first else None
        order = np.argsort(uniforms(derive(self.config.seed, "probe"), np.arange(self.sizes["train"]))[:, 0], kind="stable")
        self.probe_ids = np.sort(order[: self.config.probe.num_images])
        self.previous: np.ndarray | None = None
        self.journal = Journal(self.folder) if self.worker.is_first else None
        self.done_images = 0
        self._go_on(job)

    def _trained(self) -> torch.nn.Module:
        """The module that is stepped: compiled and wrapped where asked for. Its weights are the model's own."""
        model = torch.compile(self.model) if self.config.train.compile else self.model
        if self.worker.world_size == 1:
            return model
        # BatchNorm's buffers are made equal once an epoch; broadcasting them before every step costs time and would
        # throw away what the other ranks saw.
        on = [self.worker.device] if self.worker.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=on, broadcast_buffers=False)

    def _go_on(self, job: Job) -> None:
        """Say where this start begins, and forget what will be written again."""
        epoch = self.state.epoch
        if epoch > 0 and self.worker.is_first:
            before = checkpoint.load_assignment(self.folder, epoch - 1)
            self.previous = None if before is None else before.pseudo_labels
        committed = self.committed_assignment(epoch)
        if not self.worker.is_first:
            return
        phases = ("start", "extract", "cluster", "probe", "probe_untouched", "probe_adapted", "probe_pixels")
        self.journal.rewind(epoch, phases if committed is not None else ("start",))
        self.log(epoch, "start", seconds=round(time.time() - job.began, 2), num_workers=self.worker.world_size)
        if epoch > 0 or committed is not None:
            where = "train, with the labels it had" if committed is not None else "extract"
            self.worker.say(f"going on in epoch {epoch}: {where}")

    def committed_assignment(self, epoch: int) -> Assignment | None:
        """The clustering that an earlier start committed for these very weights, the same answer on all ranks."""
        digest = checkpoint.weights_hash(self.model.backbone) if self.worker.is_first else None
        assignment = checkpoint.load_assignment(self.folder, epoch, self.worker.broadcast(digest))
        if assignment is not None and self.previous is None and self.worker.is_first and epoch > 0:
            before = checkpoint.load_assignment(self.folder, epoch - 1)
            self.previous = None if before is None else before.pseudo_labels
        return assignment

    def journal_lacks(self, phase: str, epoch: int) -> bool:
        lacks = self.worker.is_first and not any(a["epoch"] == epoch and a["phase"] == phase for a in self.journal.lines)
        return bool(self.worker.broadcast(lacks))

    def open_bank(self) -> str:
        return self.worker.broadcast(self.bank.open() if self.worker.is_first else None)

    def sync(self) -> None:
        self.worker.barrier()

    def unreadable(self, split: str) -> np.ndarray:
        return np.array(getattr(self.images, "unreadable", {}).get(split, []), np.int64)

    def prefetched(self, batches: Iterator) -> Iterator:
        """Batches made ahead in a thread, where that does not take the CPU from the network."""
        return training.prefetch(batches) if self.streamed or self.worker.device.type == "cuda" else batches

    def probe_is_due(self, epoch: int) -> bool:
        every = self.config.probe.every
        return epoch in (0, self.config.train.epochs) or bool(every and epoch % every == 0)

    def probe_options(self, row: str) -> dict:
        """k keeps the run's images per cluster where the probe sees only a part of them."""
        share = len(self.probe_ids) / self.sizes["train"]
        k = max(2, round(self.config.clustering.num_clusters * share))
        whiten_dim = 0 if row == "pixels" or not self.config.clustering.whiten else self.config.clustering.pca_dim
        return {"seed": self.config.seed, "k": k, "whiten_dim": whiten_dim}

    def describe(self, assignment: Assignment) -> dict:
        """Health of a clustering, and its agreement with the labels and with the clustering before it."""
        counts = diagnostics.health(assignment)
        labels, _ = self.labels
        counts["nmi_labels"] = _rounded(diagnostics.nmi(assignment.pseudo_labels, labels))
        before, self.previous = self.previous, assignment.pseudo_labels
        counts["nmi_previous"] = None if before is None else _rounded(diagnostics.nmi(assignment.pseudo_labels, before))
        return counts

    # --- words ---

    def log(self, epoch: int, phase: str, **values) -> None:
        """A line in metrics.jsonl and, for a phase of the paper, one on the console."""
        if not self.worker.is_first:
            return
        line = self.journal.add(epoch, phase, **values)
        text = sentence(line, self.config)
        if text:
            self.worker.say(text)
        if phase == "cluster" and (ill := diagnostics.verdict(values, self.sizes["train"])):
            self.worker.say(f"  note: {ill}")

    def progress(self, epoch: int, images: int, what: str) -> None:
        """Images done in the whole run, of those it will send through the network."""
        length = plan_length(self.sizes["train"], self.config.train.plan_length, self.config.train.batch_size)
        each = self.sizes["train"] + length
        total = self.config.train.epochs * each + self.sizes["train"]
        self.worker.progress(min(total, epoch * each + self.sizes["train"] + images), total, what)

    def tick(self, what: str) -> None:
        pass


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def sentence(line: dict, config: Config) -> str | None:
    """A line of the journal as a person reads it."""
    head = f"epoch {line['epoch']:>3}/{config.train.epochs}  {line['phase']:<8}"
    if line["phase"] in ("extract", "train"):
        wait = line["waiting_s"] / max(line["seconds"], 1e-9)
        text = f"{head}{line['seconds']:>7.1f} s  {line['images_per_s']:>8,.0f} img/s  waiting {wait:>3.0%}"
        if line["phase"] == "train":
            text += f"  loss {line['loss']:.3f} (ln k {np.log(config.clustering.num_clusters):.3f})"
        elif line["num_unreadable"]:
            text += f"  {line['num_unreadable']} unreadable"
        return text
    if line["phase"] == "cluster":
        nmi = f"NMI previous {_figure(line['nmi_previous'])}, labels {_figure(line['nmi_labels'])}"
        return f"{head}{line['seconds']:>7.1f} s  {line['num_clusters']} clusters, {line['num_empty_clusters']} empty  {nmi}"
    if line["phase"].startswith("probe"):
        row = {"probe": "trained", "probe_untouched": "random init", "probe_adapted": "random init, BN adapted"}
        name = row.get(line["phase"], "raw pixels")
        figures = f"20-NN {_figure(line['knn_top1'])}, linear {_figure(line['linear_top1'])}"
        return f"epoch {line['epoch']:>3}/{config.train.epochs}  probe   {name:>24}  {figures}"
    return None


def _figure(value: float | None) -> str:
    return "  - " if value is None else f"{value:.3f}"


# --- driver -------------------------------------------------------------------------------------------------------------


def pretrain(config: Config, callbacks=()) -> dict:
    """Run (or go on with) ``config`` in its run directory; what result.json holds.

    UsageError for what the user can mend (data, resources, a run directory of another config), RunError for a run that
    cannot go on.
    """
    began = time.time()
    local = config.num_workers == 0
    run_dir = Folder(config.run_dir or f"runs/{config.recipe}")
    if not local:
        launch.attach(config.num_workers + launch.SPARE_CPUS, config.verbose)
        launch.check_resources(config.num_workers, run_dir)
    data, manifest = open_data(config, run_dir)
    config = settle(config, run_dir, data, manifest)
    if run_dir.exists("result.json"):
        print(f"this run is finished; give another --run-dir to train again (its results are in {run_dir.uri})")
        return run_dir.read_json("result.json")
    streams = stream.open_streams(config, data, manifest, cached=config.images.cache == "yes", local=local)
    job = Job(
        config=config,
        run_dir=run_dir,
        board=Remote(launch.Board, local=local, num_cpus=0),
        streams=streams,
        bank=make_bank(config, streams.sizes["train"], local),
        extras={"labels": Shared(read_labels(data, manifest), local=local)},
        began=began,
    )
    print(headline(config, streams, run_dir), flush=True)
    result = launch.fit(
        loop,
        job,
        num_workers=config.num_workers,
        use_gpu=config.use_gpu == "yes",
        max_failures=config.max_failures,
        callbacks=callbacks,
    )
    result |= {"data_fingerprint": manifest.fingerprint, "versions": launch.versions()}
    run_dir.write_json("result.json", result)
    return result


def open_data(config: Config, run_dir: Folder):
    """The shards folder and its manifest; scikit-learn's digits are written into the run directory."""
    if config.data == "digits":
        folder = run_dir.child("shards")
        if not folder.exists("manifest.json"):
            ingest.make_shards("digits", folder.uri, val_fraction=0.2, seed=config.seed, use_ray=False, progress=False)
    elif config.data:
        folder = Folder(config.data)
    else:
        raise UsageError(f"recipe {config.recipe} needs images; make shards with jobs/make_shards.py and give --data SHARDS")
    try:
        manifest = shards.open_manifest(folder)
    except shards.ShardError as error:
        raise UsageError(str(error)) from None
    if not manifest.splits.get("train") or not manifest.splits["train"].rows:
        raise UsageError(f"{folder.uri} has no images to train on; make shards of a folder that has some")
    return folder, manifest


def read_labels(data: Folder, manifest) -> tuple[np.ndarray, np.ndarray]:
    """int32 labels of train and val by image_id, -1 where there are none."""
    none = np.empty(0, np.int32)
    return tuple(shards.labels(data, manifest, s) if s in manifest.splits else none for s in ("train", "val"))


def make_bank(config: Config, num_images: int, local: bool) -> Remote:
    gpus = config.bank.num_gpus if config.use_gpu == "yes" and not local else 0
    threads = config.bank.threads
    return Remote(FeatureBank, num_images, config.clustering, threads=threads, local=local, num_gpus=gpus)


FREE_TO_CHANGE = ("num_workers", "run_dir", "data", "use_gpu", "max_failures", "verbose")


def settle(config: Config, run_dir: Folder, data: Folder, manifest) -> Config:
    """Every "auto" decided, once per run: written to config.json by the first start, reused by the later ones."""
    if not run_dir.exists("config.json"):
        chosen = choose(config, data, manifest)
        facts = {"config": configs.to_dict(config), "chosen": configs.to_dict(chosen)}
        run_dir.write_json("config.json", facts | {"data_fingerprint": manifest.fingerprint, "versions": launch.versions()})
        return chosen
    written = run_dir.read_json("config.json")
    asked = configs.from_dict(Config, written["config"])
    here = {name: getattr(config, name) for name in FREE_TO_CHANGE}
    others = configs.differences(config, dataclasses.replace(asked, **here))
    if others:
        raise UsageError(f"{run_dir.uri} belongs to another config: {'; '.join(others)}. Give another --run-dir")
    if written["data_fingerprint"] != manifest.fingerprint:
        raise UsageError(f"the shards in {data.uri} are not those {run_dir.uri} was started with; give another --run-dir")
    chosen = configs.from_dict(Config, written["chosen"])
    return dataclasses.replace(chosen, **here | {"use_gpu": _yes(launch.choose_gpu(config.use_gpu, config.num_workers))})


def choose(config: Config, data: Folder, manifest) -> Config:
    """Decide from the machine and the sizes, never from a stopwatch, so that two runs on one machine choose alike."""
    num_images = manifest.splits["train"].rows
    k = config.clustering.num_clusters or max(2, num_images // 128)
    if k > num_images:
        raise UsageError(f"clustering.num_clusters {k} is above the number of images {num_images}; lower it")
    use_gpu = launch.choose_gpu(config.use_gpu, config.num_workers)
    decode = "tasks" if stream.decode_in_tasks(config) else "worker"
    return dataclasses.replace(
        config,
        use_gpu=_yes(use_gpu),
        clustering=dataclasses.replace(config.clustering, num_clusters=k),
        images=dataclasses.replace(
            config.images, cache=_yes(stream.choose_cache(config, data, manifest)), decode=decode
        ),
        train=dataclasses.replace(
            config.train,
            precision=training.choose_precision(config.train.precision, "cuda" if use_gpu else "cpu"),
            channels_last="no" if config.train.channels_last == "no" else "yes",
        ),
    )


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def headline(config: Config, streams, run_dir: Folder) -> str:
    held = f", {streams.sizes['val']:,} held out" if "val" in streams.sizes else ""
    how = "cached" if streams.cached is not None else f"streamed, decoded in {config.images.decode}"
    workers = f"{config.num_workers} worker{'s' * (config.num_workers != 1)}" if config.num_workers else "in this process"
    where = "GPU" if config.use_gpu == "yes" else "CPU"
    return (
        f"raydc {config.recipe} · {streams.sizes['train']:,} images{held} · {config.clustering.num_clusters} clusters · "
        f"{how} · {workers} on {where}, {config.train.precision} · {run_dir.uri}"
    )
