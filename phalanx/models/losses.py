"""Output layers: from scores to loss, derivative, evaluation sums and predictions.

Losses are those of one row, so that a leaf's loss is their sum: ½(z − y)² for regression, the
negative log likelihood for classification, or by how much a row falls short of the margin.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from phalanx.training.metrics import CLASSIFICATION_SUMS, REGRESSION_SUMS

Array = NDArray[Any]
Float64 = NDArray[np.float64]


class OutputLayer(Protocol):
    """``scores`` are (rows, outputs); ``targets`` (rows,)."""

    sums: tuple[str, ...]

    def residual(self, scores: Array, targets: Array, weights: Array | None = None) -> float:
        """Turn ``scores`` in place into d loss / d scores; return the loss sum.

        ``weights`` (rows,) multiply the loss of each row.
        """

    def evaluate(self, scores: Array, targets: Array) -> Float64:
        """Return the evaluation sums; may overwrite ``scores``."""

    def predict(self, scores: Array) -> Array:
        """Return what ``Model.predict`` does; may overwrite ``scores``."""


class SquaredError:
    """Regression: one output."""

    sums: tuple[str, ...] = REGRESSION_SUMS

    def residual(self, scores: Array, targets: Array, weights: Array | None = None) -> float:
        """See ``OutputLayer``."""
        flat = scores[:, 0]
        np.subtract(flat, targets, out=flat)
        if weights is None:
            return 0.5 * float(np.dot(flat, flat))
        loss = 0.5 * float(np.dot(flat * weights, flat))
        np.multiply(flat, weights, out=flat)
        return loss

    def evaluate(self, scores: Array, targets: Array) -> Float64:
        """See ``OutputLayer``."""
        target = targets.astype(np.float64)
        error = scores[:, 0] - target
        squared = float(np.dot(error, error))
        absolute = float(np.abs(error).sum())
        return np.array(
            [0.5 * squared, squared, absolute, target.sum(), np.dot(target, target)], np.float64
        )

    def predict(self, scores: Array) -> Array:
        """See ``OutputLayer``."""
        return scores[:, 0]


class Logistic:
    """Two classes, one score: the log odds of class 1."""

    sums: tuple[str, ...] = CLASSIFICATION_SUMS

    def residual(self, scores: Array, targets: Array, weights: Array | None = None) -> float:
        """See ``OutputLayer``."""
        z = scores[:, 0]
        loss = _logistic_loss(z, targets, weights)
        probability = _sigmoid(z)
        np.subtract(probability, targets, out=z, casting="same_kind")
        if weights is not None:
            np.multiply(z, weights, out=z)
        return loss

    def evaluate(self, scores: Array, targets: Array) -> Float64:
        """See ``OutputLayer``."""
        z = scores[:, 0]
        # The probability, not the score, as that is what predictions are made from.
        correct = np.count_nonzero((_sigmoid(z) > 0.5) == (targets > 0))
        return np.array([_logistic_loss(z, targets), correct], np.float64)

    def predict(self, scores: Array) -> Array:
        """See ``OutputLayer``."""
        probability = _sigmoid(scores[:, 0])
        return np.stack([1 - probability, probability], axis=1)


class Hinge:
    """Two classes, one score: class 1 above 0, and a row is right from a margin of 1 on.

    With s = ±1 the loss is h = max(0, 1 − s z), or h² (without a factor of ½, as in liblinear).
    The score of such a model is no log odds: nothing makes a probability of it.
    """

    sums: tuple[str, ...] = CLASSIFICATION_SUMS

    def __init__(self, *, squared: bool) -> None:
        self._squared = squared

    def residual(self, scores: Array, targets: Array, weights: Array | None = None) -> float:
        """See ``OutputLayer``; at the kink, where s z = 1, the slope is 0."""
        z = scores[:, 0]
        signs, short = _short_of_margin(z, targets)
        loss = _weighted_sum(short * short if self._squared else short, weights)
        slopes = -2 * signs * short if self._squared else np.where(short > 0, -signs, 0)
        np.copyto(z, slopes if weights is None else slopes * weights)
        return loss

    def evaluate(self, scores: Array, targets: Array) -> Float64:
        """See ``OutputLayer``."""
        z = scores[:, 0]
        _, short = _short_of_margin(z, targets)
        loss = _weighted_sum(short * short if self._squared else short, None)
        correct = np.count_nonzero((z > 0) == (targets > 0))
        return np.array([loss, correct], np.float64)

    def predict(self, scores: Array) -> Array:
        """Return the scores."""
        return scores[:, 0]


class Softmax:
    """Any number of classes, one score each."""

    sums: tuple[str, ...] = CLASSIFICATION_SUMS

    def residual(self, scores: Array, targets: Array, weights: Array | None = None) -> float:
        """See ``OutputLayer``."""
        loss = _softmax_in_place(scores, targets, weights)
        scores[np.arange(len(targets)), targets] -= 1
        if weights is not None:
            np.multiply(scores, weights[:, np.newaxis], out=scores)
        return loss

    def evaluate(self, scores: Array, targets: Array) -> Float64:
        """See ``OutputLayer``."""
        loss = _softmax_in_place(scores, targets)
        correct = np.count_nonzero(scores.argmax(axis=1) == targets)
        return np.array([loss, correct], np.float64)

    def predict(self, scores: Array) -> Array:
        """See ``OutputLayer``."""
        scores -= scores.max(axis=1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=1, keepdims=True)
        return scores


def _short_of_margin(z: Array, targets: Array) -> tuple[Array, Array]:
    """Return s = ±1 and max(0, 1 − s z), in the dtype of ``z``."""
    signs = (2 * targets - 1).astype(z.dtype)
    return signs, np.maximum(1 - signs * z, 0)


def _sigmoid(z: Array) -> Array:
    """Return 1 / (1 + e^−z) without overflow."""
    small = np.exp(-np.abs(z))
    probability: Array = np.where(z >= 0, 1 / (1 + small), small / (1 + small))
    return probability


def _logistic_loss(z: Array, targets: Array, weights: Array | None = None) -> float:
    """Return Σ w (log(1 + e^z) − y z), computed as max(z, 0) − y z + log(1 + e^−|z|)."""
    losses = np.maximum(z, 0) - np.where(targets > 0, z, 0) + np.log1p(np.exp(-np.abs(z)))
    return _weighted_sum(losses, weights)


def _softmax_in_place(scores: Array, targets: Array, weights: Array | None = None) -> float:
    """Turn scores into probabilities; return the weighted sum of negative log likelihoods."""
    scores -= scores.max(axis=1, keepdims=True)
    chosen = scores[np.arange(len(targets)), targets]
    np.exp(scores, out=scores)
    totals = scores.sum(axis=1, keepdims=True)
    scores /= totals
    losses = np.log(totals[:, 0]) - chosen
    return _weighted_sum(losses, weights)


def _weighted_sum(losses: Array, weights: Array | None) -> float:
    weighted = losses if weights is None else losses * weights
    return float(weighted.sum(dtype=np.float64))
