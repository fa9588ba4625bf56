"""Semi-supervised fine-tuning with a part of the labels: all layers learn for 20 epochs, rate x 0.2 at 12 and 16 (protocol
5).

Its run directory holds backbone.safetensors and config.json, so what comes out can be measured like any other run; with
all labels and fresh weights that is a supervised backbone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from raydc import checkpoint, launch
from raydc.benchmarks.learner import LabelledShards, Learner, fit, open_job, open_shards, scaled
from raydc.benchmarks.options import Semisup, trial_name
from raydc.benchmarks.published import OFFICIAL
from raydc.benchmarks.scorecard import Row
from raydc.benchmarks.setting import OFFICIAL_SIZE, Candidate, notes, once
from raydc.config import ImagesConfig, TrainConfig, UsageError
from raydc.data import shards
from raydc.launch import Job, Worker
from raydc.models.head import Classifier
from raydc.optim import LR_SCALE
from raydc.probe import pick_per_class
from raydc.remote import Shared
from raydc.seeding import derive

SCHEDULE = TrainConfig(epochs=20, batch_size=256, schedule="step", milestones=(12, 16), gamma=0.2)
FEW = 0.02  # share of the labels up to which the protocol of 1 % holds
LISTS = (12_811, 128_116)  # names in the official lists
NAMES_LISTED = 3


# --- which labels -------------------------------------------------------------------------------------------------------


def choose_ids(options: Semisup, data: LabelledShards) -> np.ndarray:
    """image_ids of train whose labels are used, sorted."""
    labels = data.labels["train"]
    if options.list:
        return listed_ids(options.list, shards.names(data.folder, data.manifest, "train"), labels)
    return stratified_ids(labels, options.fraction, options.seed)


def stratified_ids(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """The same share of each class, rounded, at least one image; chosen by image_id and seed alone."""
    quotas = np.maximum(1, np.rint(np.bincount(labels[labels >= 0]) * fraction))
    return pick_per_class(np.arange(len(labels)), labels, quotas, derive(seed, "fraction"))


def listed_ids(path: str, names: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """image_ids of a list's names, matched by file name. UsageError for a name that is missing, double or unlabelled."""
    if not Path(path).is_file():
        raise UsageError(f"--list {path} is no file; give a text file with one image name a line")
    wanted = [_name(line) for line in Path(path).read_text().splitlines() if line.strip()]
    if not wanted:
        raise UsageError(f"--list {path} is empty; give one image name a line")
    short = [name.rpartition("/")[2] for name in names.tolist()]
    whole, where = {name: i for i, name in enumerate(names.tolist())}, {name: i for i, name in enumerate(short)}
    found = [whole.get(name, where.get(name.rpartition("/")[2])) for name in wanted]
    missing = [name for name, i in zip(wanted, found, strict=True) if i is None]
    if missing:
        raise UsageError(
            f"{len(missing):,} of {len(wanted):,} names of {path} are not in the train split "
            f"({', '.join(missing[:NAMES_LISTED])}{' ...' * (len(missing) > NAMES_LISTED)}); give the list of these shards"
        )
    twice = {name for i, name in enumerate(short) if where[name] != i}
    unclear = [name for name in wanted if name not in whole and name.rpartition("/")[2] in twice]
    if unclear:
        raise UsageError(
            f"several images of the train split are named {unclear[0]}; give names with their folders, or --fraction"
        )
    ids = np.unique(found)
    if (labels[ids] < 0).any():
        raise UsageError(
            f"{int((labels[ids] < 0).sum())} images of {path} have no label in the shards; make shards with labels"
        )
    return ids


def _name(line: str) -> str:
    """Of ``name`` or ``name label``; a name may hold spaces, so only a number after the last one is a label."""
    name, _, last = line.strip().rpartition(" ")
    return name.strip() if name and last.isdigit() else line.strip()


# --- on a worker --------------------------------------------------------------------------------------------------------


def loop(job: Job) -> dict | None:
    """As Ray Train calls it."""
    return fine_tune(job)


def fine_tune(job: Job, worker: Worker | None = None, tell: Callable[[dict], None] | None = None) -> dict | None:
    """All epochs, from the last commit; rank 0 returns {"top1", "top5", "note"}. ``tell`` hears of every look at val."""
    options: Semisup = job.extras["options"]
    learner, candidate = Learner(job, worker), job.extras["candidate"].get()
    model = Classifier(candidate.build().train(), job.extras["num_classes"])
    model.head.refresh(derive(options.seed, "head"))
    model, note = learner.synchronised(model)
    learner.hold(model, model, lambda: build_optimizer(model, job.config.train, options.head_factor))
    epochs = job.config.train.epochs
    for epoch in learner.state.remaining(epochs):
        learner.train(epoch)
        due = (epoch + 1) % options.eval_every == 0 or epoch + 1 == epochs
        found = learner.evaluate(epoch)[""] if due else {}
        learner.commit(epoch, found)
        if found and tell:
            tell({"epoch": epoch + 1} | found)
    if not learner.worker.is_first:
        return None
    save_backbone(learner, candidate)
    last = next(line for line in reversed(learner.journal.lines) if line["phase"] == "evaluate")
    return {"top1": last["top1"], "top5": last["top5"], "note": note}


def build_optimizer(model: Classifier, config: TrainConfig, head_factor: float) -> torch.optim.SGD:
    """Everything is decayed, BatchNorm and biases too; the head's rate is ``head_factor`` times the backbone's."""
    groups = [
        {"params": list(model.backbone.parameters())},
        {"params": list(model.head.parameters()), LR_SCALE: head_factor},
    ]
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


def save_backbone(learner: Learner, candidate: Candidate) -> None:
    """Under the same names as any run's, whichever kind of BatchNorm it was trained with."""
    plain = candidate.build()
    plain.load_state_dict(learner.model.backbone.state_dict())
    config = replace(learner.config, recipe="semisup")
    checkpoint.save_backbone(learner.folder, plain, config)


# --- the benchmark ------------------------------------------------------------------------------------------------------


def run(options: Semisup, candidate: Candidate) -> list[Row]:
    """The rows of the scorecard. Fresh weights start with untouched BatchNorm statistics: they are learnt anyway."""
    data = open_shards(options.data)
    ids = choose_ids(options, data)
    return once(options, facts(candidate, data, ids), lambda: measure(options, candidate, data, ids))


def facts(candidate: Candidate, data: LabelledShards, ids: np.ndarray) -> dict[str, str]:
    """What tells one run of this benchmark from another, wherever its inputs lie."""
    labelled = hashlib.blake2b(np.ascontiguousarray(ids, np.int64).tobytes(), digest_size=16).hexdigest()
    return {"backbone": candidate.fingerprint, "data": data.fingerprint, "labelled": labelled}


def measure(options: Semisup, candidate: Candidate, data: LabelledShards, ids: np.ndarray) -> list[Row]:
    """Train, or read what a finished run left; result.json is written last."""
    if not options.folder.exists("result.json"):
        print(f"{benchmark_name(options, data, ids)} of {candidate.name} on {data.describe(len(ids))}", flush=True)
        finish(options, train(options, prepare(options, candidate, data, ids)))
    return to_rows(options, candidate, data, ids, options.folder.read_json("result.json"))


def train(options: Semisup, job: Job, callbacks=()) -> dict:
    """On Ray Train's workers: {"top1", "top5", "note"}."""
    return fit(loop, job, options, callbacks)


def finish(options: Semisup, figures: dict) -> None:
    """Write result.json, the sign that the run is done."""
    result = {"recipe": "semisup", "seed": options.seed, "figures": figures, "versions": launch.versions()}
    options.folder.write_json("result.json", result)


def prepare(options: Semisup, candidate: Candidate, data: LabelledShards, ids: np.ndarray, streams=None) -> Job:
    """What the workers are given."""
    return open_job(
        options,
        data,
        options.folder,
        model=candidate.model,
        images=ImagesConfig(size=candidate.size, resize=candidate.resize),
        train=schedule(options, _share(data, ids)),
        extras={
            "options": options,
            "candidate": Shared(candidate, local=options.num_workers == 0),
            "num_classes": data.num_classes,
        },
        ids=ids,
        streams=streams,
    )


def schedule(options: Semisup, share: float) -> TrainConfig:
    """The protocol's at this rate, for this share of the labels: 5e-4 decay with 1 %, 1e-4 with more."""
    decay = options.weight_decay if options.weight_decay >= 0 else 5e-4 if share <= FEW else 1e-4
    return replace(scaled(SCHEDULE, options.epochs), lr=options.lr, weight_decay=decay, batch_size=options.batch_size)


def benchmark_name(options: Semisup, data: LabelledShards, ids: np.ndarray) -> str:
    """semisup_1percent and so on; for a list, by the share of the labels that it holds."""
    share = _share(data, ids) if options.list else options.fraction
    return f"semisup_{float(f'{100 * share:.2g}'):g}percent"


def _share(data: LabelledShards, ids: np.ndarray) -> float:
    return len(ids) / max(1, int((data.labels["train"] >= 0).sum()))


def to_rows(options: Semisup, candidate: Candidate, data: LabelledShards, ids: np.ndarray, result: dict) -> list[Row]:
    figures = result["figures"]
    changed = [f"{options.epochs} epochs instead of {SCHEDULE.epochs}"] if options.epochs else []
    changed += [f"batches of {options.batch_size}"] if options.batch_size != SCHEDULE.batch_size else []
    changed += [f"weight decay {options.weight_decay:g}"] if options.weight_decay >= 0 else []
    official = data.has(OFFICIAL["imagenet"]) and bool(options.list) and len(ids) in LISTS
    setting = trial_name(options.lr, options.head_factor)
    chosen = [f"labels of {Path(options.list).name}"] if options.list else []
    return [
        Row(
            benchmark=benchmark_name(options, data, ids),
            column=column,
            value=round(figures[key], 2),
            data=data.describe(len(ids)),
            backbone=candidate.label,
            full=official and candidate.size == OFFICIAL_SIZE and not changed,
            notes=notes(candidate, "", figures["note"], setting, *chosen, *changed),
        )
        for column, key in (("Top-1", "top1"), ("Top-5", "top5"))
    ]
