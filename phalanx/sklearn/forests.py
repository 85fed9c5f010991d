"""Random forests: the trees of scikit-learn's, grown as tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils.validation import check_is_fitted

from phalanx.sklearn.base import ClassifiesByProbability, Regresses

if TYPE_CHECKING:
    from phalanx.data.predict import LoadedModel


class _Forest:
    """Parameters of both kinds, and the job that they mean."""

    model_: LoadedModel

    def __init__(
        self,
        n_estimators: int = 100,
        *,
        tree: Mapping[str, Any] | None = None,
        seed: int = 0,
        workers: int = 0,
        cluster: Any = None,
        timeout_s: float = 3600.0,
    ) -> None:
        self.n_estimators = n_estimators
        self.tree = tree
        self.seed = seed
        self.workers = workers
        self.cluster = cluster
        self.timeout_s = timeout_s

    @property
    def feature_importances_(self) -> NDArray[np.float64]:
        """How much each feature counts, all together 1."""
        check_is_fitted(self, "model_")
        return np.array(list(self.model_.feature_importances().values()))

    def _program(self, rows: int) -> Mapping[str, Any]:
        tree = dict(self.tree or {})
        part = tree.get("max_features")
        if isinstance(part, float) and part == 1.0:
            tree["max_features"] = "all"  # a job cannot tell it from 1, which is one feature
        return {"forest": {"trees": int(self.n_estimators), "tree": tree}}


class PhalanxForestClassifier(ClassifierMixin, _Forest, ClassifiesByProbability):  # type: ignore[misc]
    """Random forest, tree by tree that of scikit-learn with ``random_state=seed``.

    Args:
        n_estimators: trees.
        tree: parameters of each tree, as {"max_depth": 20}; see scikit-learn's.
        seed: of the trees and their rows.
        workers: worker processes of a cluster of its own; 0: inside this process.
        cluster: address of a cluster, or what ``phalanx.connect`` returned; None: its own.
        timeout_s: how long ``fit`` waits.
    """


class PhalanxForestRegressor(RegressorMixin, _Forest, Regresses):  # type: ignore[misc]
    """Random forest for numbers; parameters as of ``PhalanxForestClassifier``."""
