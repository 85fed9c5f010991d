"""Output layers: from scores to loss, derivative, evaluation sums and predictions.

Losses are those of one row, so that a leaf's loss is their sum: ½(z − y)² for regression, the
negative log likelihood for classification.
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
        """Return (rows, classes) probabilities or (rows,) values; may overwrite ``scores``."""


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
