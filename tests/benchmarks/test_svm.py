"""The SVM arithmetic against hand-worked cases and plain scikit-learn on features that were never rotated."""

import json
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.model_selection import GridSearchCV
from sklearn.svm import LinearSVC

from raydc.benchmarks import svm
from raydc.benchmarks.datasets import read_voc_lists
from raydc.benchmarks.svm import (
    COSTS,
    K_SHOTS,
    average_precision,
    counting_unconverged,
    draw_low_shot,
    fit_full,
    normalise,
    rotate,
    run_low_shot,
    run_svm,
)
from raydc.config import RunError, UsageError
from raydc.seeding import derive
from raydc.storage import Folder

FEW = (1.0, 100.0, 0.5**5)
NAMES = ["ant", "bee"]


def plain(cost: float, seed: int) -> LinearSVC:
    """The protocol's classifier with its own labels, 1 and -1."""
    weight = {1: 2, -1: 1}
    return LinearSVC(
        C=cost,
        class_weight=weight,
        penalty="l2",
        loss="squared_hinge",
        dual=True,
        tol=1e-4,
        max_iter=2000,
        random_state=seed,
    )


def made_up(num_train=90, num_test=80, dim=400, noise=1.0, seed=0):
    """Two layers of features, labels of two classes with a few difficult ones; feature1 is worse than feature2."""
    random = np.random.default_rng(seed)
    num = num_train + num_test
    latent = random.standard_normal((num, 6))
    wide = latent @ random.standard_normal((6, dim))
    layers = [np.maximum(wide + scale * noise * random.standard_normal((num, dim)), 0) for scale in (12, 2)]
    labels = (latent[:, :2] > 0.8).astype(np.int8)
    labels[random.random(labels.shape) < 0.06] = -1
    named = {f"feature{n}": (one[:num_train], one[num_train:]) for n, one in enumerate(layers, 1)}
    return named, labels[:num_train], labels[num_train:]


# --- arithmetic


@pytest.mark.parametrize(
    ("labels", "scores", "expected"),
    [
        ([1, 0, 1, 0, 0, 1], [6, 5, 4, 3, 2, 1], (1 + 2 / 3 + 3 / 6) / 3),
        ([0, 1, 1], [3, 2, 1], 2 / 3),  # precision 1/2 at the first hit is lifted to the envelope
        ([1, 1, 0, 0], [9, 8, 1, 0], 1.0),
        ([0, 0, 1], [3, 2, 1], 1 / 3),
        ([0, 1, 0, 1], [2, 1, 1, 0], (1 / 2 + 1 / 2) / 2),  # one threshold for the tie: 1/3, lifted to 2/4
        ([1, 0, 1, 0], [1, 1, 1, 1], 1 / 2),
        ([0, 1, 0, 1], [1, 1, 1, 1], 1 / 2),
        ([1, 1], [0, 0], 1.0),
    ],
)
def test_average_precision_by_hand(labels, scores, expected):
    assert average_precision(np.array(labels), np.array(scores, float)) == pytest.approx(expected, abs=1e-12)


def test_average_precision_without_a_positive_is_no_number():
    assert np.isnan(average_precision(np.zeros(3, int), np.arange(3.0)))


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5)), min_size=1, max_size=30).filter(lambda x: any(a for a, _ in x))
)
def test_average_precision_is_each_positive_s_best_precision(pairs):
    """By definition: for each positive, the best precision of any threshold that lets it in."""
    best = [
        max(
            sum(label for label, score in pairs if score >= t) / sum(score >= t for _, score in pairs)
            for t in range(mine + 1)
        )
        for is_positive, mine in pairs
        if is_positive
    ]
    labels, scores = np.array(pairs).T
    assert average_precision(labels, scores.astype(float)) == pytest.approx(np.mean(best))


def test_normalise_keeps_a_dead_row():
    assert normalise(np.float32([[3, 4], [0, 0]])) == pytest.approx(np.array([[3, 4], [0, 0]]) / (5 + 1e-5), rel=1e-14)
    assert normalise(np.float16([[300, 400]])).dtype == np.float64  # whose squares overflow


def test_rotation_keeps_inner_products_and_leaves_zeros():
    train = np.random.default_rng(0).standard_normal((7, 20))
    train[3] = train[2]  # equal images are no trouble
    rotated, basis = rotate(train)
    assert rotated.shape == (7, 7) and not np.triu(rotated, 1).any()
    assert rotated @ rotated.T == pytest.approx(train @ train.T) and train @ basis == pytest.approx(rotated)
    tall, none = rotate(train.T)
    assert tall is not None and tall.shape == (20, 7) and none is None


@pytest.mark.parametrize("cost", [100.0, 1.0, 0.5**4, 0.5**19])
def test_rotated_fits_decide_as_plain_ones(cost):
    layers, labels, _ = made_up()
    train, test = map(normalise, layers["feature2"])
    targets = (labels[:, 0] == 1).astype(int)
    expected = plain(cost, 3).fit(train, 2 * targets - 1).decision_function(test)
    rotated, basis = rotate(train)
    found = svm.linear_svm(cost, 3).fit(rotated, targets).decision_function(test @ basis)
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


def test_only_convergence_warnings_are_counted():
    random = np.random.default_rng(0)
    with warnings.catch_warnings(record=True) as others:
        with counting_unconverged() as count:
            LinearSVC(max_iter=1, C=1e3).fit(random.standard_normal((50, 5)), np.arange(50) % 2)
            warnings.warn("something else", UserWarning, stacklevel=1)
    assert count["unconverged"] == 1
    assert [str(one.message) for one in others] == ["something else"]


def test_costs_and_shots_are_the_protocol_s():
    assert len(COSTS) == 19 and COSTS[:5] == (1, 10, 100, 0.0625, 0.03125) and COSTS[-1] == 2.0**-19
    assert K_SHOTS == (1, 2, 4, 8, 16, 32, 64, 96)


# --- all labels


def test_a_class_is_a_plain_grid_search():
    layers, labels, test_labels = made_up()
    train, test = map(normalise, layers["feature2"])
    labels, test_labels = labels[:, 0], test_labels[:, 0]
    assert (labels == -1).any() and (test_labels == -1).any()
    search = GridSearchCV(plain(1.0, 5), {"C": list(COSTS)}, cv=3, scoring="average_precision")
    search.fit(train, np.where(labels == 1, 1, -1))
    asked = test_labels != -1
    scores = search.decision_function(test[asked])
    rotated, basis = rotate(train)
    found = fit_full(rotated, labels, test @ basis, test_labels, COSTS, random_state=5)
    assert found["cost"] == search.best_params_["C"]
    assert found["cv_ap"] == pytest.approx(100 * search.best_score_)
    assert found["ap"] == pytest.approx(100 * average_precision(test_labels[asked], scores))
    assert found["num_unconverged"] == 0


def test_a_run_over_layers_and_classes():
    layers, labels, test_labels = made_up()
    calls = []
    result = run_svm(
        layers, labels, test_labels, NAMES, costs=FEW, parallel=False, progress=lambda *call: calls.append(call)
    )
    assert json.loads(json.dumps(result)) == result
    assert result["best_layer"] == "feature2" and list(result["layers"]) == ["feature1", "feature2"]
    for layer in result["layers"].values():
        assert list(layer["per_class"]) == NAMES
        assert layer["map"] == pytest.approx(np.mean([one["ap"] for one in layer["per_class"].values()]))
        assert all(one["cost"] in FEW for one in layer["per_class"].values())
    prevalence = 100 * np.mean([(column == 1).sum() / (column >= 0).sum() for column in test_labels.T])
    assert prevalence + 20 < result["map"] <= 100
    assert [call[:2] for call in calls] == [(n, 4) for n in range(1, 5)]
    assert {call[2] for call in calls} == {f"{layer} {name}" for layer in layers for name in NAMES}


def test_ray_tasks_find_what_a_plain_loop_finds(local_ray):
    layers, labels, test_labels = made_up()
    given_ = {"costs": FEW, "seed": 1}
    one, other = (run_svm(layers, labels, test_labels, NAMES, parallel=way, **given_) for way in (True, False))
    assert one == other
    one, other = (
        run_low_shot(layers, labels, test_labels, NAMES, shots=(1, 3), num_samples=2, parallel=way, **given_)
        for way in (True, False)
    )
    assert one == other


@pytest.mark.parametrize("parallel", [False, True])
def test_features_that_are_no_numbers(local_ray, parallel):
    layers, labels, test_labels = made_up()
    layers["feature1"][1][[3, 5], 7] = np.nan
    with pytest.raises(RunError, match="feature1 of 2 of 80 test images is not finite"):
        run_svm(layers, labels, test_labels, NAMES, costs=FEW, parallel=parallel)


def spoiled(place: int, column: int, keep: int):
    """Labels of which one class keeps only so many positives."""
    both = list(made_up()[1:])
    rows = np.flatnonzero(both[place][:, column] == 1)[keep:]
    both[place][rows, column] = 0
    return both


@pytest.mark.parametrize(
    ("labels", "options", "says"),
    [
        (spoiled(0, 1, 2), {}, "class bee has 2 positive images in trainval, too few for 3-fold .* give at least 3"),
        (spoiled(0, 0, 0), {}, "class ant has 0 positive images in trainval"),
        (spoiled(1, 0, 0), {}, "class ant has no positive image in test"),
        ([np.ones((90, 2), np.int8), spoiled(0, 0, 9)[1]], {}, "class ant has 0 negative images"),
        (spoiled(0, 0, 9), {"costs": ()}, "costs are"),
        (spoiled(0, 0, 9), {"costs": (1.0, 0.0)}, "costs are"),
    ],
)
def test_sets_too_small_to_fit(labels, options, says):
    with pytest.raises(UsageError, match=says):
        run_svm(made_up()[0], *labels, NAMES, parallel=False, **options)


# --- low-shot


def test_draws_of_the_official_lists(real_data):
    labels = read_voc_lists(Folder(real_data / "voc07_lists" / "VOC2007" / "ImageSets" / "Main"), "trainval")[1]
    sheep = labels[:, 16]
    draws = {}
    for k in K_SHOTS:
        for sample in range(5):
            rows, targets = draws[k, sample] = draw_low_shot(sheep, k, sample, 0, name="sheep")
            assert targets.sum() == k and len(rows) == 20 * k == len(set(rows))
            assert (sheep[rows] == targets).all()  # no difficult one among them
    again = draw_low_shot(sheep, 2, 1, 0, name="sheep")
    assert all((one == other).all() for one, other in zip(again, draws[2, 1], strict=True))
    assert not set(draws[1, 0][0]) <= set(draws[2, 0][0])  # each k is drawn afresh
    others = [draws[2, 2], draw_low_shot(sheep, 2, 1, 1, name="sheep"), draw_low_shot(sheep, 2, 1, 0, name="ship")]
    assert all(set(other[0]) != set(again[0]) for other in others)
    with pytest.raises(
        UsageError, match="97 shots need 97 positive images of every class, and sheep has 96 .* possible is 96"
    ):
        draw_low_shot(sheep, 97, 0, 0, name="sheep")


@pytest.fixture(scope="module")
def few_shots():
    layers, labels, test_labels = made_up()
    options = {"shots": (1, 2, 4), "num_samples": 3, "costs": FEW, "seed": 7, "parallel": False}
    return layers, labels, test_labels, run_low_shot(layers, labels, test_labels, NAMES, **options)


def by_hand(few_shots, layer: str, k: int) -> np.ndarray:
    """mAP in percent, (samples, costs), by plain fits on the drawn rows of features that were never rotated."""
    layers, labels, test_labels, _ = few_shots
    train, test = map(normalise, layers[layer])
    aps = np.zeros((3, 2, 3))
    for sample, column, cost in np.ndindex(aps.shape):
        rows, targets = draw_low_shot(labels[:, column], k, sample, 7, name=NAMES[column])
        state = derive(7, "low_shot", NAMES[column], sample, k) % 2**32
        asked = test_labels[:, column] >= 0
        scores = plain(FEW[cost], state).fit(train[rows], 2 * targets - 1).decision_function(test[asked])
        aps[sample, column, cost] = 100 * average_precision(test_labels[asked, column], scores)
    return aps.mean(1)


@pytest.mark.parametrize("layer", ["feature1", "feature2"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_as_published_the_cost_is_chosen_on_test(few_shots, layer, place):
    row = few_shots[3]["layers"][layer][place]
    maps = by_hand(few_shots, layer, row["k"])
    best = maps[:, maps.mean(0).argmax()]
    assert (row["k"], row["as_published"]["cost_chosen"]) == ((1, 2, 4)[place], "on test")
    assert row["as_published"]["map"] == pytest.approx(best.mean())
    assert row["as_published"]["samples"] == pytest.approx(list(best))
    assert row["as_published"]["std"] == pytest.approx(np.sqrt(((best - best.mean()) ** 2).mean()))
    assert row["as_published"]["min"] == min(row["as_published"]["samples"])
    assert row["as_published"]["max"] == max(row["as_published"]["samples"])


def test_one_shot_has_nothing_to_validate_on(few_shots):
    one, two, four = (row["clean"] for row in few_shots[3]["layers"]["feature2"])
    assert (one["cost_chosen"], two["cost_chosen"]) == ("fixed at 1", "by 2 folds of the draw")
    assert four["cost_chosen"] == "by 3 folds of the draw"
    assert one["samples"] == pytest.approx(list(by_hand(few_shots, "feature2", 1)[:, FEW.index(1.0)]))
    assert "cost" not in one  # one for each class and sample


def test_the_clean_cost_is_that_of_a_grid_search_on_the_draw(few_shots):
    layers, labels, test_labels, _ = few_shots
    train, test = map(normalise, layers["feature2"])
    rows, targets = draw_low_shot(labels[:, 0], 4, 0, 7, name="ant")
    search = GridSearchCV(plain(1.0, 2), {"C": list(FEW)}, cv=3, scoring="average_precision")
    search.fit(train[rows], 2 * targets - 1)
    found = svm.fit_low_shot(train, rows, targets, test, test_labels[:, 0], 4, FEW, 2)
    assert found["clean_cost"] == search.best_params_["C"]
    asked = test_labels[:, 0] >= 0
    expected = average_precision(test_labels[asked, 0], search.decision_function(test[asked]))
    assert found["clean_ap"] == pytest.approx(100 * expected)


def test_draws_short_of_negatives_are_counted(few_shots):
    _, labels, _, result = few_shots
    negatives = (labels == 0).sum(0)
    assert (negatives >= 19).all() and (negatives < 4 * 19).all()
    for row in result["layers"]["feature1"]:
        short = 3 * (negatives < 19 * row["k"]).sum()
        assert (row["num_draws_short_of_negatives"], row["num_draws"]) == (short, 6)
    rows, targets = draw_low_shot(labels[:, 0], 4, 0, 7, name="ant")
    assert targets.sum() == 4 and len(rows) == 4 + negatives[0]


def test_a_low_shot_result_is_json(few_shots):
    assert json.loads(json.dumps(few_shots[3])) == few_shots[3]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"shots": (1, 64)}, r"64 shots need 64 positive images of every class, and (ant|bee) has \d+ in trainval"),
        ({"shots": ()}, "give positive whole numbers"),
        ({"shots": (0, 1)}, "give positive whole numbers"),
        ({"num_samples": 0}, "give positive whole numbers"),
        ({"costs": (-1.0,)}, "costs are"),
    ],
)
def test_shots_that_cannot_be_drawn(options, says):
    layers, labels, test_labels = made_up()
    with pytest.raises(UsageError, match=says):
        run_low_shot(layers, labels, test_labels, NAMES, **({"shots": (1,), "parallel": False} | options))


def test_the_largest_shot_possible_is_that_of_the_rarest_class():
    layers = made_up()[0]
    labels, test_labels = spoiled(0, 1, 5)
    with pytest.raises(UsageError, match="bee has 5 in trainval; the largest k possible is 5"):
        run_low_shot(layers, labels, test_labels, NAMES, shots=(1, 6), parallel=False)
    result = run_low_shot(layers, labels, test_labels, NAMES, shots=(5,), num_samples=1, costs=FEW, parallel=False)
    assert result["layers"]["feature2"][0]["as_published"]["map"] > 20


def test_convergence_warnings_stay_out_of_sight():
    layers, labels, test_labels = made_up(dim=30)  # not separable, so a high cost takes long
    with warnings.catch_warnings(record=True) as seen:
        result = run_svm(layers, labels, test_labels, NAMES, costs=(1e4,), parallel=False)
    assert not seen
    per_class = result["layers"]["feature1"]["per_class"]
    assert result["layers"]["feature1"]["num_unconverged"] == sum(one["num_unconverged"] for one in per_class.values()) > 0
