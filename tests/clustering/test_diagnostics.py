"""Agreement of partitions, counts of clusters, and the verdict on them."""

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import normalized_mutual_info_score

from raydc.clustering.assignment import Assignment
from raydc.clustering.diagnostics import health, nmi, verdict


def assignment(labels, num_clusters: int) -> Assignment:
    labels = np.array(labels, np.int32)
    return Assignment(0, labels, np.ones(len(labels), np.float32), np.zeros((num_clusters, 2), np.float32), 12.5, "")


def test_nmi_of_a_two_by_two_table_by_hand():
    """Six images; the table of a against b is [[2, 1], [0, 3]]."""
    a, b = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 0, 1, 1, 1, 1])
    log = math.log
    mutual = (
        2 / 6 * log((2 / 6) / (3 / 6 * 2 / 6))
        + 1 / 6 * log((1 / 6) / (3 / 6 * 4 / 6))
        + 3 / 6 * log((3 / 6) / (3 / 6 * 4 / 6))
    )
    entropy_a, entropy_b = log(2), -(2 / 6 * log(2 / 6) + 4 / 6 * log(4 / 6))
    assert nmi(a, b) == pytest.approx(mutual / math.sqrt(entropy_a * entropy_b))
    assert nmi(a, b) != pytest.approx(mutual / ((entropy_a + entropy_b) / 2), abs=1e-4), "the arithmetic mean is another"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 4), st.integers(-1, 4)), min_size=1, max_size=60))
def test_nmi_is_sklearns_on_rows_known_to_both(rows):
    a, b = (np.array(column) for column in zip(*rows, strict=True))
    known = [(x, y) for x, y in rows if x >= 0 and y >= 0]
    if not known:
        assert nmi(a, b) is None
        return
    expected = normalized_mutual_info_score(*zip(*known, strict=True), average_method="geometric")
    assert nmi(a, b) == pytest.approx(expected)
    assert nmi(b, a) == pytest.approx(expected)


def test_nmi_of_renamed_and_of_unrelated_partitions():
    a = np.arange(120) % 4
    assert nmi(a, np.array([2, 0, 3, 1])[a]) == pytest.approx(1)
    assert nmi(a, np.arange(120) // 4 % 3) == pytest.approx(0, abs=1e-9)
    assert nmi(np.zeros(43, int), np.arange(43) % 5) == 0, "one cluster tells nothing, not even by rounding"


def test_counts_of_a_hand_made_clustering():
    """Sizes 4, 2, 1, 1, 0, 0 and one unreadable image: the entropy of (1/2, 1/4, 1/8, 1/8) is 1.75 bits."""
    found = assignment([0, 0, 0, 0, 1, 1, 2, 3, -1], 6)
    assert found.sizes.tolist() == [4, 2, 1, 1, 0, 0]
    counts = health(found)
    assert counts["num_clusters"] == 6
    assert counts["num_empty_clusters"] == found.num_empty_clusters == 2
    assert counts["num_singletons"] == 2
    assert counts["largest_cluster"] == 0.5
    assert counts["effective_clusters"] == pytest.approx(2**1.75)
    assert counts["objective"] == 12.5


@pytest.mark.parametrize(
    ("labels", "num_clusters", "says"),
    [
        (np.arange(100) % 10, 10, None),
        (np.arange(50) % 10, 10, None),  # exactly five a cluster
        (np.where(np.arange(100) < 50, 0, 1 + np.arange(100) % 9), 10, None),  # half, not more
        (np.where(np.arange(100) < 51, 0, 1 + np.arange(100) % 9), 10, "one cluster holds 51%.*lower train.lr"),
        (np.arange(100) % 8, 10, None),  # two of ten empty
        (np.arange(100) % 7, 10, "3 of 10 clusters are empty; lower clustering.num_clusters"),
        (np.arange(49) % 10, 10, "49 images make 10 clusters of fewer than 5; lower clustering.num_clusters"),
        (np.zeros(100), 10, "one cluster holds 100%"),  # collapse is named before the empty clusters
    ],
)
def test_the_verdict_names_the_illness_and_its_remedy(labels, num_clusters, says):
    found = verdict(health(assignment(labels, num_clusters)), len(labels))
    if says is None:
        assert found is None
    else:
        assert re.search(says, found)


def test_a_large_cluster_of_pic_is_no_fault_of_the_training():
    labels = np.concatenate([np.zeros(600, int), np.arange(400) % 40])
    said = {method: verdict(health(assignment(labels, 40)), 1000, method) for method in ("kmeans", "pic")}
    assert "train.lr" in said["kmeans"] and "clustering.sigma" in said["pic"] and "train.lr" not in said["pic"]
