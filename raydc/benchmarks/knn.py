"""Weighted k-nearest neighbours on the frozen feature: k 10, 20, 100, 200, temperature .07 (protocol 8a)."""

from __future__ import annotations

import numpy as np

from raydc.benchmarks.features import extract, variants
from raydc.benchmarks.learner import LabelledShards, open_shards
from raydc.benchmarks.options import Knn
from raydc.benchmarks.published import OFFICIAL
from raydc.benchmarks.scorecard import Row
from raydc.benchmarks.setting import OFFICIAL_SIZE, Candidate, notes, once
from raydc.clustering.neighbours import nearest
from raydc.config import UsageError

TEMPERATURE = 0.07  # of the published rows


def vote(similar_Mk: np.ndarray, labels_Mk: np.ndarray, k: int, temperature: float, num_classes: int) -> np.ndarray:
    """(M,) predicted classes from the first ``k`` of the neighbours, best first; of equal classes the first."""
    weights = np.exp((similar_Mk[:, :k] - similar_Mk[:, :1]) / temperature)  # over the best one: cannot overflow
    rows = np.repeat(np.arange(len(weights)), weights.shape[1])
    scores = np.zeros((len(weights), num_classes))
    np.add.at(scores, (rows, labels_Mk[:, :k].reshape(-1)), weights.reshape(-1))
    return scores.argmax(1)


def accuracies(train_ND, train_labels, val_MD, val_labels, options: Knn) -> dict[str, float]:
    """Top-1 in percent for each k; rows without a label neither vote nor count."""
    if (train_labels < 0).any():
        train_ND, train_labels = train_ND[train_labels >= 0], train_labels[train_labels >= 0]
    val_MD, val_labels = val_MD[val_labels >= 0], val_labels[val_labels >= 0]
    most = min(max(options.neighbours), len(train_ND))
    num_classes = int(max(train_labels.max(), val_labels.max())) + 1
    correct = dict.fromkeys(options.neighbours, 0)
    for block, similar, rows in nearest(train_ND, val_MD, most):
        for k in options.neighbours:
            predicted = vote(similar, train_labels[rows], k, options.temperature, num_classes)
            correct[k] += int((predicted == val_labels[block]).sum())
    return {f"k={k}": 100 * hits / len(val_labels) for k, hits in correct.items()}


def run(options: Knn, candidate: Candidate) -> list[Row]:
    """The rows of the scorecard; for fresh weights the better of both variants, k by k."""
    data = open_shards(options.data)
    num_train = int((data.labels["train"] >= 0).sum())
    if max(options.neighbours) > num_train:
        raise UsageError(f"neighbours {max(options.neighbours)} is above the {num_train} labelled training images; lower it")
    facts = {"backbone": candidate.fingerprint, "data": data.fingerprint}
    return once(options, facts, lambda: _rows(options, candidate, data))


def _rows(options: Knn, candidate: Candidate, data: LabelledShards) -> list[Row]:
    found = {v.statistics: _measure(options, v, data) for v in variants(options, candidate, data.images("train"))}
    full = data.has(OFFICIAL["imagenet"]) and candidate.size == OFFICIAL_SIZE and options.temperature == TEMPERATURE
    rows = []
    for column in (f"k={k}" for k in options.neighbours):
        statistics, best = max(found.items(), key=lambda item: item[1][column])
        rows.append(
            Row(
                benchmark="knn",
                column=column,
                value=round(best[column], 2),
                data=data.describe(),
                backbone=candidate.label,
                full=full,
                notes=notes(candidate, statistics, f"temperature {options.temperature:g}"),
            )
        )
    return rows


def _measure(options: Knn, candidate: Candidate, data: LabelledShards) -> dict[str, float]:
    train, val = (extract(options, candidate, data.images(split), "avgpool") for split in ("train", "val"))
    return accuracies(train.load("avgpool"), data.labels["train"], val.load("avgpool"), data.labels["val"], options)
