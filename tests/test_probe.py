"""The probes against numpy, scikit-learn, and the figures known for raw digits."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from raydc import probe
from raydc.config import ProbeConfig
from raydc.probe import evaluate, knn_top1, linear_top1, nmi_of_kmeans, pick_per_class

FIGURES = {"nmi_labels", "nmi_classes", "knn_top1", "linear_top1"}


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """1,437 training and 360 validation images, as raw pixels, with their labels."""
    data = load_digits()
    held = np.arange(1797) % 5 == 4
    held[-1] = True  # 360 of them
    pixels = data.data.astype(np.float32)
    return pixels[~held], data.target[~held], pixels[held], data.target[held]


@pytest.mark.parametrize("neighbours", [1, 5, 20])
def test_knn_is_a_cosine_vote_by_brute_force(digits, neighbours):
    train, labels, val, val_labels = (part[:300] for part in digits)
    a, b = (x.astype(np.float64) - train.mean(0) for x in (train, val))
    cosine = (b @ a.T) / np.linalg.norm(b, axis=1)[:, None] / np.linalg.norm(a, axis=1)
    nearest = np.argsort(-cosine, axis=1)[:, :neighbours]
    votes = [np.bincount(labels[row], minlength=10).argmax() for row in nearest]  # a tie goes to the smaller class
    assert knn_top1(train, labels, val, val_labels, neighbours) == pytest.approx(np.mean(votes == val_labels))


def test_knn_with_fewer_images_than_neighbours(digits):
    train, labels, val, val_labels = digits
    share = (val_labels == np.bincount(labels[:7]).argmax()).mean()
    assert knn_top1(train[:7], labels[:7], val, val_labels, 20) == pytest.approx(share)


def test_linear_probe_is_a_plain_pipeline(digits):
    train, labels, val, val_labels = digits
    plain = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200)).fit(train[:400], labels[:400])
    assert linear_top1(train[:400], labels[:400], val, val_labels) == plain.score(val, val_labels)


def test_linear_probe_of_one_class_is_its_share(digits):
    train, _, val, val_labels = digits
    assert linear_top1(train[:5], np.full(5, 3), val, val_labels) == (val_labels == 3).mean()


@pytest.mark.parametrize("per_class", [1, 10, 500])
def test_pick_per_class_takes_so_many_of_each(digits, per_class):
    labels = np.where(np.arange(1437) % 7 == 0, -1, digits[1])
    rows = pick_per_class(np.arange(1437), labels, per_class, seed=0)
    available = np.bincount(labels[labels >= 0])
    assert np.array_equal(np.bincount(labels[rows]), np.minimum(available, per_class))
    assert len(np.unique(rows)) == len(rows) and (labels[rows] >= 0).all()


def test_pick_per_class_goes_by_image_id_alone(digits):
    ids, labels = np.arange(1437) * 3, digits[1]
    order = np.random.default_rng(0).permutation(1437)
    picked = ids[pick_per_class(ids, labels, 10, seed=5)]
    shuffled = ids[order][pick_per_class(ids[order], labels[order], 10, seed=5)]
    assert sorted(picked) == sorted(shuffled)
    assert set(picked) != set(ids[pick_per_class(ids, labels, 10, seed=6)])


def test_pick_per_class_of_nought_is_every_labelled_row():
    assert pick_per_class(np.arange(4), np.array([1, -1, 0, 1]), 0, seed=0).tolist() == [0, 2, 3]


def run(digits, config=None, **changes):
    train, labels, val, val_labels = digits
    given = {"train_ids": np.arange(1437), "train_ND": train, "train_labels": labels}
    given |= {"val_ids": np.arange(360), "val_MD": val, "val_labels": val_labels}
    options = {"config": config or ProbeConfig(images_per_class=10), "seed": 0, "k": 100, "whiten_dim": 0}
    return evaluate(**(given | options | changes))


def test_raw_digits_score_what_is_known_of_them(digits):
    """calibration.md, row "raw 8x8 pixels"."""
    figures = run(digits)
    assert figures["nmi_classes"] == pytest.approx(0.705, abs=0.06)
    assert figures["nmi_labels"] == pytest.approx(0.647, abs=0.06)
    assert figures["knn_top1"] == pytest.approx(0.972, abs=0.06)
    assert figures["linear_top1"] == pytest.approx(0.904, abs=0.06)


def test_figures_without_labels_are_none(digits):
    assert run(digits, train_labels=np.full(1437, -1)) == dict.fromkeys(FIGURES)
    figures = run(digits, val_labels=np.full(360, -1))
    assert {name for name, value in figures.items() if value is None} == {"knn_top1", "linear_top1"}


def test_unlabelled_rows_count_for_nothing(digits):
    train, labels, val, val_labels = digits
    some = np.arange(1437) % 3 > 0
    figures = run(digits, train_labels=np.where(some, labels, -1), val_labels=np.where(np.arange(360) < 200, val_labels, -1))
    ids = np.arange(1437)[some]
    small = (train[some], labels[some], val[:200], val_labels[:200])
    assert figures == run(small, train_ids=ids, val_ids=np.arange(200))


def test_nmi_rises_with_separate_classes_and_is_nought_for_random_labels(digits):
    train, labels, _, _ = digits
    apart = np.hstack([10 * np.eye(10, dtype=np.float32)[labels], train / 16])
    assert nmi_of_kmeans(apart, labels, 40, seed=0) > nmi_of_kmeans(train, labels, 40, seed=0) + 0.05
    assert nmi_of_kmeans(train, np.random.default_rng(0).permutation(labels), 10, seed=0) < 0.05


def test_wide_pixels_are_reduced_first_to_the_same_figures(digits, monkeypatch):
    """A PCA to 61 dimensions turns raw digits, three of whose 64 pixels are always zero, and loses nothing."""
    expected = run(digits)
    monkeypatch.setattr(probe, "WIDE", 32)
    monkeypatch.setattr(probe, "REDUCED", 61)
    figures = run(digits)
    assert figures["knn_top1"] == pytest.approx(expected["knn_top1"], abs=0.003)
    assert figures["nmi_classes"] == pytest.approx(expected["nmi_classes"], abs=0.05)
    monkeypatch.setattr(probe, "REDUCED", 1)
    assert run(digits)["knn_top1"] < 0.6, "it is the reduced features that are measured"
