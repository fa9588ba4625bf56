"""What a run is worth, on labels its training never sees: probes of the features beside what they must beat."""

from __future__ import annotations

import copy
import time

import numpy as np
import torch

from raydc.models.norm import adapt_statistics, equalise_statistics
from raydc.run import Run, collect, in_blocks
from raydc.training import Clock

ADAPT_BATCHES = 32  # of extraction pixels, for the random-init baseline with adapted BatchNorm statistics
PIXEL_SIDE = 32  # the raw-pixel row compares images of at most this side
FIGURES = ("nmi_labels", "nmi_classes", "knn_top1", "linear_top1")
PHASES = ("extract", "cluster", "train")


def probe(run: Run, epoch: int, token: str) -> None:
    """kNN, linear probe and NMI of the features just extracted; before the first epoch also of what they must beat."""
    if not run.probe_is_due(epoch):
        return
    rows = features_to_probe(run, epoch)  # passes over images have no part in what can fail below
    with run.together():
        for name, (ids, features) in rows.items():
            push_probe(run, token, name, ids, features)
        run.bank.flush()
    with run.together():
        if run.worker.is_first:
            for row in ("untouched", "adapted", "pixels") if epoch == 0 else ("trained",):
                _measure(run, epoch, token, row)


def probe_alone(run: Run, epoch: int) -> None:
    """The same, where there is no extraction pass to share: one over the images that probes look at."""
    if not run.probe_is_due(epoch):
        return
    ids, features = collect(run, run.model.backbone, run.images.extract("train", run.probe_ids), Clock())
    token = run.open_bank()
    with run.together():
        push_probe(run, token, "train", ids, features)
        run.bank.flush()
    probe(run, epoch, token)


def features_to_probe(run: Run, epoch: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """This rank's features of the val split; before the first epoch also the baselines' of both splits."""
    clock, rows = Clock(), {}
    if "val" in run.sizes:
        rows["val"] = collect(run, run.model.backbone, run.images.extract("val"), clock)
    if epoch > 0:
        return rows
    models = {"adapted": adapted_backbone(run), "pixels": Pixels()}
    for name, ids in (("train", run.probe_ids), ("val", None)):
        for row, model in models.items():
            if name in run.sizes:
                rows[f"{row}_{name}"] = collect(run, model, run.images.extract(name, ids), clock)
    return rows


def _measure(run: Run, epoch: int, token: str, row: str) -> None:
    began = time.perf_counter()
    prefix = "" if row in ("trained", "untouched") else f"{row}_"
    names = f"{prefix}train", f"{prefix}val"
    figures = run.bank.run_probe(token, names, run.config.probe, run.labels, **run.probe_options(row))
    figures = {key: None if value is None else round(value, 4) for key, value in figures.items()}
    phase = "probe" if row == "trained" else f"probe_{row}"
    run.log(epoch, phase, seconds=round(time.perf_counter() - began, 3), **figures)


def push_probe(run: Run, token: str, name: str, ids: np.ndarray, features: np.ndarray) -> None:
    """Raw features to the bank; of the train split only the images that probes look at."""
    if name.endswith("train"):
        mine = np.isin(ids, run.probe_ids)
        ids, features = ids[mine], features[mine]
    for block in in_blocks(len(ids)):
        run.bank.send("push_probe", token, name, ids[block], features[block])


def adapted_backbone(run: Run) -> torch.nn.Module:
    adapted = copy.deepcopy(run.model.backbone)
    adapt(run, adapted)
    return adapted


def adapt(run: Run, model: torch.nn.Module) -> None:
    """BatchNorm statistics of the data in place of fresh ones, averaged over the ranks that saw some of it."""
    seen = []

    def pixels():
        for _, (ids, batch) in zip(range(ADAPT_BATCHES), run.images.extract("train", run.probe_ids), strict=False):
            if len(ids) > 1:  # one image has no variance
                seen.append(len(ids))
                yield run.compute.place(batch)

    with run.compute.autocast():
        adapt_statistics(model, pixels())
    equalise_statistics(model, weight=sum(seen))


class Pixels(torch.nn.Module):
    """Pixels as features: (B, 3, S, S) -> (B, 3 * s * s), s at most 32."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        small = min(PIXEL_SIDE, pixels.shape[-1])
        return torch.nn.functional.adaptive_avg_pool2d(pixels.float(), small).flatten(1)


def summary(run: Run) -> dict:
    """The facts and figures of a finished run."""
    journal, last = run.journal, run.journal.last
    probes = ("probe", "probe_untouched", "probe_adapted", "probe_pixels")
    metrics = {"loss": last("train", "loss"), "nmi_previous": last("cluster", "nmi_previous")}
    for key in FIGURES:
        fresh = [value for row in ("untouched", "adapted") if (value := last(f"probe_{row}", key)) is not None]
        metrics |= {key: last("probe", key), f"{key}_random": max(fresh, default=None)}
        metrics[f"{key}_pixels"] = last("probe_pixels", key)
    if len(run.probe_ids) < run.sizes["train"]:  # a part of the images cannot tell the NMI at the run's k
        clusterings = journal.all("cluster", "nmi_labels") or [None]
        metrics |= {"nmi_labels": clusterings[-1], "nmi_labels_random": clusterings[0], "nmi_labels_pixels": None}
    return {
        "recipe": run.config.recipe,
        "seed": run.config.seed,
        "num_images": run.sizes["train"],
        "num_clusters": last("cluster", "num_clusters"),
        "epochs": run.config.train.epochs,
        "metrics": metrics,
        "num_empty_clusters": last("cluster", "num_empty_clusters"),
        "phase_s": {phase: round(sum(journal.all(phase, "seconds")), 2) for phase in PHASES}
        | {"pca": round(sum(journal.all("extract", "pca_s")), 2)}
        | {"probe": round(sum(sum(journal.all(one, "seconds")) for one in probes), 2), "start_up": last("start", "seconds")},
        "cpu_s": {phase: round(sum(journal.all(phase, "cpu_s")), 1) for phase in ("extract", "cluster", "train")},
        "images_per_s": {phase: _median(journal.all(phase, "images_per_s")) for phase in ("extract", "train")}
        | {"cluster": _median([run.sizes["train"] / max(s, 1e-3) for s in journal.all("cluster", "seconds")])},
        "num_workers": run.worker.world_size,
    }


def _median(values: list[float]) -> float | None:
    return round(float(np.median(values)), 1) if values else None
