"""What all estimators do: checks, the job, and the model that it leaves."""

from __future__ import annotations

import contextlib
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

import phalanx
from phalanx.exports.estimators import estimator_of

if TYPE_CHECKING:
    from phalanx.data.predict import LoadedModel
    from phalanx.sdk.job import Job

ROWS_PER_SHARD = 256
SHARDS_MAX = 64
ENDING_S = 30.0
"""How long a job that is cancelled is waited for."""


class Trained(ABC, BaseEstimator):  # type: ignore[misc]
    """An estimator whose ``fit`` is a job; ``_program`` says what the job is.

    Attributes:
        model_: the trained model, see ``phalanx.data.predict.LoadedModel``.
        metrics_: what the job measured at its end.
        parameters_sha256_: of the model's parameters, equal wherever the same fit runs.
        n_iter_: steps of the job; forests, which are grown by tasks, have none.
    """

    workers: int
    cluster: Any
    seed: int
    timeout_s: float
    model_: LoadedModel

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn that sparse rows are taken."""
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def to_sklearn(self) -> Any:
        """Return a fitted object of scikit-learn's own that predicts the same.

        Raises phalanx.InvalidArgument where scikit-learn has no class for it.
        """
        check_is_fitted(self, "model_")
        return estimator_of(self.model_, getattr(self, "classes_", None))

    @abstractmethod
    def _program(self, rows: int) -> Mapping[str, Any]:
        """Return the program of the job as its file would have it, by name."""

    def _shards(self, rows: int) -> int:
        return max(1, min(SHARDS_MAX, rows // ROWS_PER_SHARD))

    def _fit(
        self, X: Any, targets: NDArray[Any], task: str, balance: Mapping[str, Any] | None = None
    ) -> None:
        name = f"sklearn-{uuid.uuid4().hex[:12]}"
        program = self._program(X.shape[0])
        job = {
            "name": name,
            "data": {"name": name, "shards": self._shards(X.shape[0]), **(balance or {})},
            "seed": self.seed,
            **program,
        }
        with self._opened() as cluster, contextlib.ExitStack() as left:
            left.callback(self._forget, cluster, name)
            cluster.data.add(name, X, targets, task=task, dtype="float64")
            submitted = cluster.submit(job)
            left.callback(self._end, submitted)
            result = submitted.wait(timeout_s=self.timeout_s)
            self.model_ = cluster.models.get(result.model)
            self.metrics_ = dict(result.metrics)
            self.parameters_sha256_ = result.parameters_sha256
            if "train" in program:
                self.n_iter_ = max(1, result.steps)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[phalanx.Cluster]:
        """The cluster to fit on; one that was made for this ends with it."""
        if self.cluster is None:
            with phalanx.LocalCluster(workers=self.workers) as own:
                yield own
        elif isinstance(self.cluster, phalanx.Cluster):
            yield self.cluster
        else:
            with phalanx.connect(self.cluster) as connected:
                yield connected

    def _end(self, job: Job) -> None:
        """Nothing goes on, and nothing is left, on a cluster of others."""
        if self.cluster is None:
            return
        with contextlib.suppress(phalanx.PhalanxError):
            if not job.refresh().done:
                job.cancel("the fit has ended")
                # Until it has ended it keeps its data, and cannot be deleted.
                with contextlib.suppress(phalanx.PhalanxError):
                    job.wait(timeout_s=ENDING_S)
            job.delete()

    def _forget(self, cluster: phalanx.Cluster, name: str) -> None:
        if self.cluster is None:
            return
        for forget in (cluster.models.delete, cluster.data.delete):
            with contextlib.suppress(phalanx.PhalanxError):
                forget(name, force=True)

    def _checked(self, X: Any) -> Any:
        check_is_fitted(self, "model_")
        return validate_data(self, X, reset=False, accept_sparse="csr", dtype=np.float64)


class Classifies(Trained):
    """Labels of any kind are numbered for the job, in the order of ``classes_``."""

    classes_: NDArray[Any]

    def fit(self, X: Any, y: Any) -> Classifies:
        """Train on rows ``X`` (array or sparse matrix) with labels ``y``; return the estimator.

        Raises ValueError for what cannot be learnt from, and phalanx.PhalanxError where the job
        fails.
        """
        X, y = validate_data(self, X, y, accept_sparse="csr", dtype=np.float64)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"{type(self).__name__} needs at least two classes, and y has one class only: "
                f"{self.classes_[0]}"
            )
        self._check_classes()
        self._fit(X, codes.astype(np.int64), "classification", self._balance(y))
        return self

    def _balance(self, y: NDArray[Any]) -> Mapping[str, Any]:
        """Return what the ``data`` of the job says of how much classes count."""
        return {}

    def _check_classes(self) -> None:
        """Raise ValueError where an estimator does not take so many classes."""

    def predict(self, X: Any) -> NDArray[Any]:
        """Return a label for each row."""
        rows = self._checked(X)
        labels: NDArray[Any] = self.classes_[np.asarray(self.model_.predict(rows), np.int64)]
        return labels


class ClassifiesByProbability(Classifies):
    """Its models have a probability for each class."""

    def predict_proba(self, X: Any) -> NDArray[Any]:
        """Return (rows, classes) probabilities, in the order of ``classes_``."""
        rows = self._checked(X)
        probabilities: NDArray[Any] = np.asarray(
            self.model_.predict_probabilities(rows), np.float64
        )
        return probabilities


class Regresses(Trained):
    """Targets are numbers."""

    def fit(self, X: Any, y: Any) -> Regresses:
        """Train on rows ``X`` (array or sparse matrix) with numbers ``y``; return the estimator."""
        X, y = validate_data(self, X, y, accept_sparse="csr", dtype=np.float64, y_numeric=True)
        self._fit(X, np.asarray(y, np.float64), "regression")
        return self

    def predict(self, X: Any) -> NDArray[Any]:
        """Return a number for each row."""
        rows = self._checked(X)
        predicted: NDArray[Any] = np.asarray(self.model_.predict(rows), np.float64)
        return predicted
