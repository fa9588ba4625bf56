"""Linear SVMs on fixed features of VOC2007: mean average precision with all labels, and with k positives a class.

The protocol is that of fair_self_supervision, OpenSelfSup and mmselfsup: rows divided by their L2 norm, one LinearSVC for
each class and cost, the cost chosen by 3-fold cross-validation (all labels), or by the test mAP (low-shot, as published;
beside it a clean figure whose cost is chosen on the drawn rows alone).

N trainval rows, M test rows, D dimensions, C classes. Labels are 1 present, 0 absent, -1 difficult. Figures are percent.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC
from threadpoolctl import threadpool_limits

from raydc.config import RunError, UsageError
from raydc.seeding import derive

LAYERS = tuple(f"feature{n}" for n in range(1, 6))
COSTS = (1.0, 10.0, 100.0, *(0.5**n for n in range(4, 20)))  # the order matters: the first of equal costs is taken
K_SHOTS = (1, 2, 4, 8, 16, 32, 64, 96)
NUM_SAMPLES = 5
NUM_FOLDS = 3
NEGATIVES = 19  # for each positive of a low-shot draw
PLAIN_COST = 1.0  # where one positive leaves nothing to validate on

Layers = dict[str, tuple[np.ndarray, np.ndarray]]  # name to raw features, (N, D) and (M, D)
Progress = Callable[[int, int, str], None]  # tasks done, tasks in all, which one


# --- arithmetic ---------------------------------------------------------------------------------------------------------


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """All-points area under the monotone envelope of precision over recall, as a fraction; nan without a positive.

    ``labels`` are 1 or 0. Equal scores are one threshold, so the order of rows has no say.
    """
    order = np.argsort(-scores, kind="stable")
    hits, ranked = np.cumsum(labels[order]), scores[order]
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # of each run of equal scores
    envelope = np.maximum.accumulate((hits[last] / (last + 1))[::-1])[::-1]
    new_hits = np.diff(hits[last], prepend=0)
    return float((new_hits * envelope).sum() / hits[-1]) if hits[-1] else float("nan")


def normalise(features: np.ndarray) -> np.ndarray:
    """Rows by their L2 norm, as float64; 1e-5 keeps a dead row at zero."""
    features = np.asarray(features, np.float64)
    return features / (np.linalg.norm(features, axis=1, keepdims=True) + 1e-5)


def rotate(train_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """The rows in an orthonormal basis of their own span, (N, N), and the basis, (D, N); as they are (None) where N >= D.

    An SVM's solution depends on rows through their inner products alone, so the fits are the same and shorter. The rows come
    out lower triangular, and liblinear skips zeros.
    """
    if len(train_ND) >= train_ND.shape[1]:
        return train_ND, None
    basis, upper = np.linalg.qr(train_ND.T)
    return np.ascontiguousarray(upper.T), basis


def linear_svm(cost: float, random_state: int) -> LinearSVC:
    """The protocol's classifier, for targets 1 and 0."""
    return LinearSVC(
        C=cost,
        class_weight={1: 2, 0: 1},
        dual=True,
        tol=1e-4,
        max_iter=2000,
        intercept_scaling=1.0,
        random_state=random_state,
    )


@contextmanager
def counting_unconverged() -> Iterator[Counter]:
    """Counts fits that ended at max_iter, under "unconverged", instead of warning of each; other warnings pass."""
    count: Counter = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        yield count
    for one in caught:
        if issubclass(one.category, ConvergenceWarning):
            count["unconverged"] += 1
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def cross_validate(
    train: np.ndarray, targets: np.ndarray, costs: Iterable[float], folds: int, random_state: int
) -> list[float]:
    """Mean AP over stratified, unshuffled folds for each cost: scikit-learn's AP, as in the references."""
    how = {"cv": folds, "scoring": "average_precision", "error_score": "raise"}
    return [float(cross_val_score(linear_svm(cost, random_state), train, targets, **how).mean()) for cost in costs]


# --- all labels ---------------------------------------------------------------------------------------------------------


def fit_full(train, labels, test, test_labels, costs: tuple[float, ...] = COSTS, random_state: int = 0) -> dict:
    """One class: the best cost by cross-validation, refitted on all of trainval. In training difficult means absent."""
    targets, asked = (labels == 1).astype(int), test_labels >= 0
    with counting_unconverged() as count:
        scores = cross_validate(train, targets, costs, NUM_FOLDS, random_state)
        best = int(np.argmax(scores))
        model = linear_svm(costs[best], random_state).fit(train, targets)
    ap = average_precision(test_labels[asked], model.decision_function(test)[asked])
    return {"ap": 100 * ap, "cost": costs[best], "cv_ap": 100 * scores[best], "num_unconverged": count["unconverged"]}


def run_svm(
    layers: Layers,
    labels: np.ndarray,
    test_labels: np.ndarray,
    classes: Iterable[str],
    *,
    costs: tuple[float, ...] = COSTS,
    seed: int = 0,
    parallel: bool = True,
    progress: Progress | None = None,
) -> dict:
    """mAP of each layer, with one Ray task for each (layer, class), or in a plain loop (``parallel=False``).

    ``labels`` are (N, C) and (M, C). UsageError where a class has too few images to fold or none to test on.
    """
    classes = list(classes)
    _check_costs(costs)
    check_classes(labels, test_labels, classes)
    parts = ((labels[:, column], test_labels[:, column]) for column in range(len(classes)))
    jobs = {
        (layer, name): (part, tuple(costs), _state(seed, "svm", name))
        for name, part in zip(classes, parts, strict=True)
        for layer in layers
    }
    done = _each(_full_task, layers, jobs, parallel, progress)
    per_layer = {layer: {name: done[layer, name] for name in classes} for layer in layers}
    summaries = {layer: _summary(per_class) for layer, per_class in per_layer.items()}
    best = max(summaries, key=lambda layer: summaries[layer]["map"])
    return {
        "layers": summaries,
        "best_layer": best,
        "map": summaries[best]["map"],
        "costs": list(costs),
        "num_folds": NUM_FOLDS,
        "seed": seed,
    }


def _full_task(rotated, part, costs, random_state: int) -> dict:
    with threadpool_limits(1):
        train, test = rotated
        labels, test_labels = part
        return fit_full(train, labels, test, test_labels, costs, random_state)


def _summary(per_class: dict[str, dict]) -> dict:
    unconverged = sum(one["num_unconverged"] for one in per_class.values())
    mean = float(np.mean([one["ap"] for one in per_class.values()]))
    return {"map": mean, "per_class": per_class, "num_unconverged": unconverged}


# --- low-shot -----------------------------------------------------------------------------------------------------------


def draw_low_shot(labels: np.ndarray, k: int, sample: int, seed: int, *, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Sorted rows and their 1/0 targets for one class: k positives and 19 k negatives (all, where there are fewer).

    ``labels`` (N,); difficult rows are never drawn. Each (seed, name, sample, k) is a draw of its own, as in the references.
    """
    positives, negatives = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    if k > len(positives):
        raise UsageError(_too_many_shots(k, name, len(positives)))
    random = np.random.default_rng(derive(seed, "low_shot", name, sample, k))
    drawn = random.choice(positives, k, replace=False)
    others = random.choice(negatives, min(NEGATIVES * k, len(negatives)), replace=False)
    rows = np.sort(np.concatenate([drawn, others]))
    return rows, (labels[rows] == 1).astype(int)


def fit_low_shot(train, rows, targets, test, test_labels, k: int, costs: tuple[float, ...], random_state: int) -> dict:
    """One class, one draw: the test AP of every cost, and of the one that cross-validation on the drawn rows chooses."""
    asked = test_labels >= 0
    few, basis = rotate(train[rows])
    with counting_unconverged() as count:
        chosen = PLAIN_COST
        if k > 1:
            chosen = costs[int(np.argmax(cross_validate(few, targets, costs, min(NUM_FOLDS, k), random_state)))]
        fitted = {cost: linear_svm(cost, random_state).fit(few, targets) for cost in dict.fromkeys((*costs, chosen))}
    weights = np.stack([model.coef_[0] for model in fitted.values()], 1)
    # Weights go back to the space of the test rows, 19 vectors, instead of all test rows into that of each draw.
    scores = test @ (weights if basis is None else basis @ weights) + [model.intercept_[0] for model in fitted.values()]
    aps = {cost: average_precision(test_labels[asked], column[asked]) for cost, column in zip(fitted, scores.T, strict=True)}
    return {
        "aps": [100 * aps[cost] for cost in costs],
        "clean_ap": 100 * aps[chosen],
        "clean_cost": chosen,
        "num_negatives": int((targets == 0).sum()),
        "num_unconverged": count["unconverged"],
    }


def low_shot(train, labels, test, test_labels, classes, k: int, sample: int, costs=COSTS, seed: int = 0) -> dict[str, dict]:
    """One sample of k shots: ``fit_low_shot`` of every class. Features are normalised, and rotated or not."""
    results = {}
    for column, name in enumerate(classes):
        rows, targets = draw_low_shot(labels[:, column], k, sample, seed, name=name)
        state = _state(seed, "low_shot", name, sample, k)
        results[name] = fit_low_shot(train, rows, targets, test, test_labels[:, column], k, tuple(costs), state)
    return results


def run_low_shot(
    layers: Layers,
    labels: np.ndarray,
    test_labels: np.ndarray,
    classes: Iterable[str],
    *,
    shots: tuple[int, ...] = K_SHOTS,
    num_samples: int = NUM_SAMPLES,
    costs: tuple[float, ...] = COSTS,
    seed: int = 0,
    parallel: bool = True,
    progress: Progress | None = None,
) -> dict:
    """mAP of each layer and k over independent samples, with one Ray task for each (layer, k, sample), or in a plain loop.

    UsageError where a class has fewer than k positives.
    """
    classes = list(classes)
    _check_costs(costs)
    check_shots(labels, test_labels, classes, shots, num_samples)
    jobs = {
        (layer, f"k={k}", f"sample {sample + 1}"): (labels, test_labels, classes, k, sample, tuple(costs), seed)
        for k in sorted(shots, reverse=True)  # the long ones first
        for sample in range(num_samples)
        for layer in layers
    }
    done = _each(_low_shot_task, layers, jobs, parallel, progress)

    def samples(layer: str, k: int) -> list[dict]:
        return [done[layer, f"k={k}", f"sample {sample + 1}"] for sample in range(num_samples)]

    rows = {layer: [summarise_low_shot(samples(layer, k), k, costs) for k in shots] for layer in layers}
    return {"layers": rows, "costs": list(costs), "num_samples": num_samples, "seed": seed}


def _low_shot_task(rotated, *args) -> dict:
    with threadpool_limits(1):
        train, test = rotated
        labels, test_labels, *others = args
        return low_shot(train, labels, test, test_labels, *others)


def summarise_low_shot(samples: list[dict[str, dict]], k: int, costs: tuple[float, ...]) -> dict:
    """The figures of one k: the mAP over classes of each sample, then their mean, std (ddof 0), min and max.

    ``as_published`` takes the cost whose mean TEST mAP is highest; ``clean`` never looks at the test labels for a choice.
    """
    maps = np.array([np.mean([one["aps"] for one in sample.values()], 0) for sample in samples])  # (samples, costs)
    best = int(np.argmax(maps.mean(0)))
    everything = [one for sample in samples for one in sample.values()]
    clean = [float(np.mean([one["clean_ap"] for one in sample.values()])) for sample in samples]
    folds = min(NUM_FOLDS, k)
    return {
        "k": k,
        "as_published": _spread(maps[:, best]) | {"cost": costs[best], "cost_chosen": "on test"},
        "clean": _spread(clean) | {"cost_chosen": f"by {folds} folds of the draw" if k > 1 else f"fixed at {PLAIN_COST:g}"},
        "num_draws": len(everything),
        "num_draws_short_of_negatives": sum(one["num_negatives"] < NEGATIVES * k for one in everything),
        "num_unconverged": sum(one["num_unconverged"] for one in everything),
    }


def _spread(maps) -> dict:
    maps = np.asarray(maps)
    figures = {"map": maps.mean(), "std": maps.std(), "min": maps.min(), "max": maps.max()}
    return {key: float(value) for key, value in figures.items()} | {"samples": [float(value) for value in maps]}


# --- what the user can mend ---------------------------------------------------------------------------------------------


def _check_costs(costs: tuple[float, ...]) -> None:
    if not costs or min(costs) <= 0:
        raise UsageError(f"costs are {tuple(costs)}; give one or more positive numbers")


def _check_tested(test_labels: np.ndarray, classes: list[str]) -> None:
    for column, name in enumerate(classes):
        if not (test_labels[:, column] == 1).any():
            raise UsageError(f"class {name} has no positive image in test, so it has no AP; give images of it")


def check_classes(labels: np.ndarray, test_labels: np.ndarray, classes: list[str]) -> None:
    for column, name in enumerate(classes):
        positives = int((labels[:, column] == 1).sum())
        for kind, number in (("positive", positives), ("negative", len(labels) - positives)):
            if number < NUM_FOLDS:
                raise UsageError(
                    f"class {name} has {number} {kind} images in trainval, too few for {NUM_FOLDS}-fold cross-validation; "
                    f"give at least {NUM_FOLDS}"
                )
    _check_tested(test_labels, classes)


def check_shots(labels: np.ndarray, test_labels: np.ndarray, classes: list[str], shots, num_samples: int) -> None:
    if not shots or min(shots) < 1 or num_samples < 1:
        raise UsageError(f"shots are {tuple(shots)}, samples {num_samples}; give positive whole numbers")
    positives = (labels == 1).sum(0)
    rarest = int(positives.argmin())
    if max(shots) > positives[rarest]:
        raise UsageError(_too_many_shots(max(shots), classes[rarest], int(positives[rarest])))
    for name, negatives in zip(classes, (labels == 0).sum(0), strict=True):
        if negatives < min(NUM_FOLDS, max(shots)):  # one for each fold
            raise UsageError(f"class {name} has {negatives} negative images in trainval, too few to fit; give more")
    _check_tested(test_labels, classes)


def _too_many_shots(k: int, name: str, positives: int) -> str:
    return (
        f"{k} shots need {k} positive images of every class, and {name} has {positives} in trainval; the largest k possible "
        f"is {positives}"
    )


# --- tasks --------------------------------------------------------------------------------------------------------------


def _state(seed: int, *purpose: int | str) -> int:
    """What scikit-learn takes as a random_state."""
    return derive(seed, *purpose) % 2**32


def _prepare(layer: str, train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Normalised trainval and test rows, in the span of the former: once a layer, for all classes and costs."""
    for split, features in (("trainval", train), ("test", test)):
        bad = int((~np.isfinite(features).all(1)).sum())
        if bad:
            raise RunError(f"{layer} of {bad} of {len(features)} {split} images is not finite; check the weights")
    with threadpool_limits(1):  # the same last digits on every machine
        train, basis = rotate(normalise(train))
        test = normalise(test)
        return train, test if basis is None else test @ basis


def _each(task: Callable, layers: Layers, jobs: dict[tuple, tuple], parallel: bool, progress: Progress | None) -> dict:
    """``task(prepared layer, *arguments)`` for every job; a job's key begins with its layer."""
    results: dict[tuple, dict] = {}
    for key, result in (_as_tasks if parallel else _in_turn)(task, layers, jobs):
        results[key] = result
        if progress is not None:
            progress(len(results), len(jobs), " ".join(key))
    return results


def _in_turn(task: Callable, layers: Layers, jobs: dict[tuple, tuple]) -> Iterator[tuple[tuple, dict]]:
    for layer, (train, test) in layers.items():
        prepared = _prepare(layer, train, test)
        for key, arguments in jobs.items():
            if key[0] == layer:
                yield key, task(prepared, *arguments)


def _as_tasks(task: Callable, layers: Layers, jobs: dict[tuple, tuple]) -> Iterator[tuple[tuple, dict]]:
    """As they come. Features go into the object store once; Ray starts a job when its layer is there."""
    from raydc import launch  # sets what Ray reads when it is imported, so it comes first; imports torch too

    launch.attach(os.cpu_count() or 1)
    ray = launch.ray
    prepare, remote = ray.remote(num_cpus=1)(_prepare), ray.remote(num_cpus=1)(task)
    prepared = {layer: prepare.remote(layer, ray.put(train), ray.put(test)) for layer, (train, test) in layers.items()}
    waiting = {remote.remote(prepared[key[0]], *arguments): key for key, arguments in jobs.items()}
    try:
        while waiting:
            (ref,), _ = ray.wait(list(waiting), num_returns=1)
            yield waiting.pop(ref), _get(ref)
    finally:  # an error or Ctrl-C leaves no fits behind
        for ref in waiting:
            ray.cancel(ref, force=True)


def _get(ref) -> dict:
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:  # the process is gone, and so were its repeats
        raise RunError(
            f"a fit was lost ({type(error).__name__}), most likely to full memory; give fewer CPUs or more memory"
        ) from None
