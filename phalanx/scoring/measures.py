"""Metrics of rows that came in parts: what is kept of a part, and what all parts come to.

Counts are whole numbers, sums are exact to the last bits, and the area under the curve is a count
of pairs of rows: no metric depends on how rows are cut into parts by more than rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Part = dict[str, Array]

_EPSILON = float(np.finfo(np.float64).eps)


def class_part(
    targets: NDArray[np.int64], probabilities: Array, classes: int, *, scores: bool
) -> Part:
    """Return what is kept of rows with known classes; with `scores` also what ranks them."""
    matrix = _matrix(targets, probabilities.argmax(axis=1), classes)
    of_target = probabilities[np.arange(len(targets)), targets].astype(np.float64)
    surprise = -np.log(np.clip(of_target, _EPSILON, 1 - _EPSILON))
    part = {"confusion": matrix, "log_loss": np.array([math.fsum(surprise)])}
    if scores:
        part["targets"] = targets
        part["scores"] = np.ascontiguousarray(
            probabilities[:, 1:] if classes == 2 else probabilities
        )
    return part


def decided_part(targets: NDArray[np.int64], values: Array, *, scores: bool) -> Part:
    """Return what is kept of rows of two classes by their decision values: no log loss."""
    part = {"confusion": _matrix(targets, (values > 0).astype(np.int64), 2)}
    if scores:
        part["targets"] = targets
        part["scores"] = np.ascontiguousarray(values[:, np.newaxis])
    return part


def number_part(targets: Array, predicted: Array) -> Part:
    """Return what is kept of rows with known numbers."""
    targets, predicted = targets.astype(np.float64), predicted.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        errors = targets - predicted
        mean = _total(targets) / max(1, len(targets))
        return {
            "rows": np.array([len(targets)], np.int64),
            "mean": np.array([mean]),
            # What rounding took from the mean, without which the spread of far-off numbers is lost.
            "rest": np.array([_total(targets - mean) / max(1, len(targets))]),
            "spread": np.array([_total((targets - mean) ** 2)]),
            "squared": np.array([_total(errors**2)]),
            "absolute": np.array([_total(np.abs(errors))]),
        }


def class_metrics(parts: Sequence[Part], names: Iterable[str]) -> dict[str, float]:
    """Return the named metrics of all parts; one that is not defined for these rows or this model
    is left out.

    Of two classes F1 is that of the second, of more the mean over all; the area under the curve is
    the mean of each class against the rest.
    """
    matrix = confusion(parts)
    rows = int(matrix.sum())
    found: dict[str, float] = {}
    if "accuracy" in names:
        found["accuracy"] = int(np.trace(matrix)) / rows
    if "f1" in names:
        found["f1"] = _f1(matrix)
    if "log_loss" in names and all("log_loss" in part for part in parts):
        found["log_loss"] = math.fsum(float(part["log_loss"][0]) for part in parts) / rows
    if "auc" in names:
        targets = np.concatenate([part["targets"] for part in parts])
        scores = np.concatenate([part["scores"] for part in parts])
        positives = [1] if scores.shape[1] == 1 else range(scores.shape[1])
        areas = [
            area(targets == label, scores[:, column]) for column, label in enumerate(positives)
        ]
        if all(each is not None for each in areas):
            found["auc"] = math.fsum(each for each in areas if each is not None) / len(areas)
    return _finite(found)


def confusion(parts: Sequence[Part]) -> NDArray[np.int64]:
    """Return how many rows of each class (down) were taken for each class (across)."""
    total: NDArray[np.int64] = np.sum([part["confusion"] for part in parts], axis=0)
    return total


def number_metrics(parts: Sequence[Part], names: Iterable[str]) -> dict[str, float]:
    """Return the named metrics of all parts, those that are finite; R² is left out where all
    numbers are the same."""
    parts = [part for part in parts if int(part["rows"][0])]
    counts = [int(part["rows"][0]) for part in parts]
    rows = sum(counts)
    spread = _spread(parts, counts, rows)
    squared = _total(float(part["squared"][0]) for part in parts)
    absolute = _total(float(part["absolute"][0]) for part in parts)
    found = {"rmse": math.sqrt(squared / rows), "mae": absolute / rows}
    if spread > 0:
        found["r2"] = 1 - squared / spread
    return _finite({name: found[name] for name in names if name in found})


def _spread(parts: Sequence[Part], counts: Sequence[int], rows: int) -> float:
    """Return the sum of the squared distances of all numbers from their mean."""
    first = float(parts[0]["mean"][0])
    rests = [float(part["rest"][0]) for part in parts]
    means = [float(part["mean"][0]) - first + rest for part, rest in zip(parts, rests, strict=True)]
    mean = _total(count * each for count, each in zip(counts, means, strict=True)) / rows
    terms = [float(part["spread"][0]) for part in parts]
    distances = [each - mean for each in means]
    terms += [count * each * each for count, each in zip(counts, distances, strict=True)]
    terms += [-count * rest * rest for count, rest in zip(counts, rests, strict=True)]
    return _total(terms)


def area(positive: NDArray[np.bool_], scores: Array) -> float | None:
    """Return the part of all pairs (positive, negative) in which the positive has the higher score,
    equal ones counted half; None without any pair, and where a score is no number."""
    count = int(np.count_nonzero(positive))
    others = len(positive) - count
    if not count or not others or np.isnan(scores).any():
        return None
    _, places = np.unique(scores, return_inverse=True)
    positives = np.bincount(places[positive], minlength=int(places.max()) + 1)
    negatives = np.bincount(places[~positive], minlength=len(positives))
    below = np.cumsum(negatives) - negatives
    halves = sum((positives * (2 * below + negatives)).tolist())
    return float(halves / (2 * count * others))


def _finite(found: dict[str, float]) -> dict[str, float]:
    """Leave out what is beyond all numbers: a model may have grown without bounds."""
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _total(numbers: Iterable[float]) -> float:
    """Return the sum of numbers; one that is not finite where it is beyond all numbers, or where
    some are."""
    try:
        return math.fsum(numbers)
    except OverflowError:
        return math.inf
    except ValueError:  # infinities of both signs
        return math.nan


def _matrix(
    targets: NDArray[np.int64], predicted: NDArray[np.int64], classes: int
) -> NDArray[np.int64]:
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (targets, predicted), 1)
    return matrix


def _f1(matrix: NDArray[np.int64]) -> float:
    right, taken, there = np.diag(matrix), matrix.sum(axis=0), matrix.sum(axis=1)
    each = [
        2 * int(hit) / int(all_) if all_ else 0.0
        for hit, all_ in zip(right, taken + there, strict=True)
    ]
    return each[1] if len(each) == 2 else math.fsum(each) / len(each)
