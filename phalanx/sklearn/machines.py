"""Linear support vector machines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin

from phalanx.sklearn.base import Classifies
from phalanx.sklearn.linear import HasCoefficients, WeighsClasses
from phalanx.texts import number_of

ALGORITHMS = ("cocoa", "gradient")


class PhalanxLinearSVC(
    ClassifierMixin,  # type: ignore[misc]
    HasCoefficients,
    WeighsClasses,
    Classifies,
):
    """Linear support vector machine of two classes.

    Args:
        loss: "hinge" or "squared_hinge"; cocoa solves the hinge alone, and the squared one is usual
            by gradient: None takes these.
        l2: λ of λ/2‖w‖²; scikit-learn's C is 1 / (λ · rows).
        algorithm: "cocoa" (CoCoA+, hinge, without a bias, to a duality gap) or "gradient".
        gap: cocoa ends at this duality gap.
        steps: and after so many steps at the latest; by gradient these are passes over the rows.
        class_weight: by gradient how much rows of each class count: "balanced", or a number by
            label, 1 where there is none.
        seed: of the order of the rows.
        workers: worker processes of a cluster of its own; 0: inside this process.
        cluster: address of a cluster, or what ``phalanx.connect`` returned; None: its own.
        timeout_s: how long ``fit`` waits.
    """

    def __init__(
        self,
        *,
        loss: str | None = None,
        l2: float = 0.001,
        algorithm: str = "gradient",
        gap: float = 0.001,
        steps: int = 100,
        class_weight: Any = None,
        seed: int = 0,
        workers: int = 0,
        cluster: Any = None,
        timeout_s: float = 3600.0,
    ) -> None:
        self.loss = loss
        self.l2 = l2
        self.algorithm = algorithm
        self.gap = gap
        self.steps = steps
        self.class_weight = class_weight
        self.seed = seed
        self.workers = workers
        self.cluster = cluster
        self.timeout_s = timeout_s

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn that there are two classes."""
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    def decision_function(self, X: Any) -> NDArray[Any]:
        """Return a number for each row; above 0 it is of ``classes_[1]``."""
        rows = self._checked(X)
        values: NDArray[Any] = np.asarray(self.model_.predict_decision_values(rows), np.float64)
        return values

    def _check_classes(self) -> None:
        if len(self.classes_) > 2:
            raise ValueError(
                "Only binary classification is supported. The type of the target is multiclass: "
                f"y has {number_of(len(self.classes_), 'class', 'classes')}; PhalanxClassifier "
                "takes any number."
            )

    def _program(self, rows: int) -> Mapping[str, Any]:
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm must be one of {ALGORITHMS}, not {self.algorithm!r}")
        usual = "hinge" if self.algorithm == "cocoa" else "squared_hinge"
        loss = usual if self.loss is None else self.loss
        train: dict[str, Any] = {"l2": float(self.l2), "dtype": "float64"}
        if self.algorithm == "cocoa":
            if self.class_weight is not None:
                raise ValueError('class_weight goes with algorithm="gradient" only')
            gap = {"metric": "train/duality_gap", "at_most": float(self.gap)}
            train |= {
                "model": {"linear_svm": {"loss": loss, "bias": False}},
                "optimizer": {"cocoa": {}},
                "evaluation": {"split": "train", "every_steps": 1},
                "stop": {"steps": int(self.steps), "thresholds": [gap]},
            }
        else:
            train |= {
                "model": {"linear_svm": {"loss": loss}},
                "optimizer": {"adam": {"learning_rate": 0.02}},
                "batch_size": min(64, rows),
                "stop": {"epochs": float(self.steps)},
            }
        return {"train": train}
