"""Weighted kNN against brute force in numpy."""

import numpy as np
import pytest

from raydc.benchmarks import knn
from raydc.benchmarks.knn import accuracies, vote
from raydc.benchmarks.options import Knn
from raydc.benchmarks.setting import open_backbone
from raydc.clustering import neighbours
from raydc.clustering.neighbours import nearest
from raydc.config import UsageError


def options(run_dir="r", data="d", **more) -> Knn:
    return Knn(**{"backbone": "", "data": data, "run_dir": str(run_dir), "num_workers": 0, "threads": 1} | more)


def brute_force(train, labels, val, k, temperature, num_classes):
    """One query at a time, with Python's own sort."""
    predicted = []
    for query in val:
        similar = [float(query @ row / np.linalg.norm(query) / np.linalg.norm(row)) for row in train]
        best = sorted(range(len(train)), key=lambda i: -similar[i])[:k]
        scores = np.zeros(num_classes)
        for i in best:
            scores[labels[i]] += np.exp(similar[i] / temperature)
        predicted.append(int(scores.argmax()))
    return np.array(predicted)


@pytest.mark.parametrize("k", [1, 10, 60])
def test_votes_as_brute_force_does(k):
    random = np.random.default_rng(0)
    train, val = random.standard_normal((60, 8)), random.standard_normal((40, 8))
    labels, wanted = random.integers(0, 4, 60), random.integers(0, 4, 40)
    ((_, similar, rows),) = nearest(train, val, 60)
    expected = brute_force(train, labels, val, k, 0.07, 4)
    np.testing.assert_array_equal(vote(similar, labels[rows], k, 0.07, 4), expected)
    found = accuracies(train, labels, val, wanted, options(neighbours=(k,)))
    assert found[f"k={k}"] == pytest.approx(100 * (expected == wanted).mean())


def test_nearest_is_by_cosine_best_first():
    train = np.array([[10.0, 0], [0, 0.1], [1, 1]], np.float32)
    ((block, similar, rows),) = nearest(train, np.array([[5.0, 0.1]], np.float32), 3)
    assert block == slice(0, 1)
    assert rows[0].tolist() == [0, 2, 1]
    assert similar[0] == pytest.approx([5 / np.sqrt(25.01), 5.1 / np.sqrt(2 * 25.01), 0.1 / np.sqrt(25.01)], abs=1e-6)


def test_two_weak_votes_against_a_strong_one():
    similar, labels = np.array([[0.9, 0.5, 0.5]]), np.array([[1, 0, 0]])
    assert vote(similar, labels, 3, 0.07, 2) == [1]  # e^(.4/.07) = 303 > 2
    assert vote(similar, labels, 3, 10.0, 2) == [0]  # nearly a plain majority


def test_rows_without_labels_neither_vote_nor_count():
    train, labels = np.eye(3, dtype=np.float32), np.array([0, -1, 1])
    val, wanted = np.eye(3, dtype=np.float32), np.array([0, 0, -1])
    # The second query's own neighbour has no label: the two others are equally far, and the first of them is right.
    assert accuracies(train, labels, val, wanted, options(neighbours=(1,)))["k=1"] == 100


def test_a_run_is_far_above_chance_and_a_rerun_reads_the_features(tmp_path, digits_shards, run_dir, capsys):
    asked = options(tmp_path / "knn", digits_shards, neighbours=(10, 20))
    rows = knn.run(asked, open_backbone(run_dir))
    assert [row.column for row in rows] == ["k=10", "k=20"]
    assert all(row.value > 50 for row in rows)
    capsys.readouterr()
    elsewhere = options(tmp_path / "again", digits_shards, neighbours=(10, 20))
    assert [row.value for row in knn.run(elsewhere, open_backbone(run_dir))] == [row.value for row in rows]
    assert capsys.readouterr().out.count("has them") == 2
    assert knn.run(asked, open_backbone(run_dir)) == rows  # a finished one is only read
    assert capsys.readouterr().out == f"{tmp_path / 'knn'} has these figures already\n"


def test_many_queries_come_in_blocks(monkeypatch):
    monkeypatch.setattr(neighbours, "ROWS", 7)
    random = np.random.default_rng(1)
    train, val = random.standard_normal((50, 4)), random.standard_normal((20, 4))
    cosine = (val / np.linalg.norm(val, axis=1, keepdims=True)) @ (train / np.linalg.norm(train, axis=1, keepdims=True)).T
    blocks = list(nearest(train, val, 5))
    assert [block for block, _, _ in blocks] == [slice(0, 7), slice(7, 14), slice(14, 20)]
    np.testing.assert_array_equal(np.concatenate([rows for _, _, rows in blocks]), np.argsort(-cosine, 1)[:, :5])


def test_more_neighbours_than_images(tmp_path, digits_shards, run_dir):
    asked = options(tmp_path / "knn", digits_shards, neighbours=(10, 2000))
    with pytest.raises(UsageError, match="neighbours 2000 is above the 1437 labelled training images"):
        knn.run(asked, open_backbone(run_dir))
    assert not (tmp_path / "knn").exists()
