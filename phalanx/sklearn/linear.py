"""What linear estimators have beside predictions: coefficients, and weights of classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.validation import check_is_fitted

from phalanx.exports.estimators import convert

if TYPE_CHECKING:
    from phalanx.data.predict import LoadedModel


class HasCoefficients:
    """Coefficients of the columns as ``fit`` was given them, in the shapes of scikit-learn.

    A job standardises dense columns and penalises the weights of these; here they are taken back,
    so that ``X @ coef_.T + intercept_`` is what the estimator decides or predicts by. Both raise
    AttributeError for a network, whose layers have no such coefficients.
    """

    model_: LoadedModel

    @property
    def coef_(self) -> NDArray[np.float64]:
        """(features,) of a regression, (1, features) of two classes, else (classes, features)."""
        return self._coefficients("coef_")[0]

    @property
    def intercept_(self) -> Any:
        """A number of a regression, (1,) of two classes, else (classes,)."""
        return self._coefficients("intercept_")[1]

    def _coefficients(self, name: str) -> tuple[NDArray[np.float64], Any]:
        check_is_fitted(self, "model_")
        found = convert(self.model_, getattr(self, "classes_", None))
        if not hasattr(found.estimator, "coef_"):
            raise AttributeError(
                f"{type(self).__name__} has {name} without hidden layers only, and this one was "
                "fitted with some"
            )
        weights, intercept = found.estimator.coef_, found.estimator.intercept_
        if found.scaler is not None:
            weights = weights / found.scaler.scale_
            if found.scaler.with_mean:
                intercept = intercept - weights @ found.scaler.mean_
        return weights, intercept


class WeighsClasses:
    """Rows count in the loss as much as ``class_weight`` says of their classes."""

    class_weight: Any
    classes_: NDArray[Any]

    def _balance(self, y: NDArray[Any]) -> Mapping[str, Any]:
        """Return what the ``data`` of the job says of it; the job knows classes by number.

        Raises ValueError for weights that are none.
        """
        if self.class_weight is None:
            return {}
        weights = compute_class_weight(self.class_weight, classes=self.classes_, y=y)
        for label, weight in zip(self.classes_, weights, strict=True):
            if not (np.isfinite(weight) and weight >= 0):
                raise ValueError(
                    f"class_weight of {label} must be a number of at least 0, not {weight}"
                )
        if not weights.any():
            raise ValueError("class_weight is 0 for all classes: no row would count")
        return {
            "class_weights": {
                "weights": {str(number): float(weight) for number, weight in enumerate(weights)}
            }
        }
