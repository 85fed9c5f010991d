"""Regressions and networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from sklearn.base import ClassifierMixin, RegressorMixin

from phalanx.sklearn.base import ClassifiesByProbability, Regresses
from phalanx.sklearn.linear import HasCoefficients, WeighsClasses

_AUTO = "auto"


class _Network(HasCoefficients):
    """Parameters that classifier and regressor share, and the job that they mean."""

    #: What ``l2`` is where it is not given.
    _l2: float

    def __init__(
        self,
        hidden: Sequence[int] | int = (),
        *,
        optimizer: str | Mapping[str, Any] = _AUTO,
        epochs: float = 100,
        batch_size: int = 64,
        l2: float | None = None,
        seed: int = 0,
        workers: int = 0,
        cluster: Any = None,
        timeout_s: float = 3600.0,
    ) -> None:
        self.hidden = hidden
        self.optimizer = optimizer
        self.epochs = epochs
        self.batch_size = batch_size
        self.l2 = l2
        self.seed = seed
        self.workers = workers
        self.cluster = cluster
        self.timeout_s = timeout_s

    def _widths(self) -> list[int]:
        """Widths of the hidden layers; one number is one layer, as with scikit-learn's networks."""
        hidden: Any = self.hidden
        return [int(width) for width in ([hidden] if isinstance(hidden, Integral) else hidden)]

    def _train(self, rows: int, linear: Mapping[str, Any], optimizer: Any) -> Mapping[str, Any]:
        hidden = self._widths()
        chosen = optimizer if self.optimizer == _AUTO else self.optimizer
        if isinstance(chosen, str):
            chosen = {chosen: {}}
        train: dict[str, Any] = {
            "model": {"mlp": {"hidden": hidden}} if hidden else linear,
            "optimizer": chosen,
            "l2": self._l2 if self.l2 is None else float(self.l2),
            "dtype": "float64",
        }
        if "closed_form" not in chosen:
            train["batch_size"] = min(int(self.batch_size), rows)
            train["stop"] = {"epochs": float(self.epochs)}
        return {"train": train}


class PhalanxClassifier(
    ClassifierMixin,  # type: ignore[misc]
    WeighsClasses,
    _Network,
    ClassifiesByProbability,
):
    """Softmax regression, or with ``hidden`` layers a network (cross-entropy, ReLU).

    Args:
        hidden: widths of the hidden layers, or that of the only one; none: a softmax regression.
        optimizer: "auto" (Adam), or as the job file has it: {"sgd": {"learning_rate": 0.1}}.
        epochs: passes over the rows.
        batch_size: rows of a step.
        l2: λ of λ/2‖w‖²; None: 0.0001. Scikit-learn's C is 1 / (λ · rows), of two classes 2 / (λ ·
            rows), since each of them has weights here.
        class_weight: how much rows of each class count: "balanced", or a number by label, 1 where
            there is none.
        seed: of parameters and order.
        workers: worker processes of a cluster of its own; 0: inside this process.
        cluster: address of a cluster, or what ``phalanx.connect`` returned; None: its own.
        timeout_s: how long ``fit`` waits.
    """

    _l2 = 0.0001

    def __init__(
        self,
        hidden: Sequence[int] | int = (),
        *,
        optimizer: str | Mapping[str, Any] = _AUTO,
        epochs: float = 100,
        batch_size: int = 64,
        l2: float | None = None,
        class_weight: Any = None,
        seed: int = 0,
        workers: int = 0,
        cluster: Any = None,
        timeout_s: float = 3600.0,
    ) -> None:
        super().__init__(
            hidden,
            optimizer=optimizer,
            epochs=epochs,
            batch_size=batch_size,
            l2=l2,
            seed=seed,
            workers=workers,
            cluster=cluster,
            timeout_s=timeout_s,
        )
        self.class_weight = class_weight

    def _program(self, rows: int) -> Mapping[str, Any]:
        return self._train(rows, {"softmax_regression": {}}, {"adam": {"learning_rate": 0.01}})


class PhalanxRegressor(RegressorMixin, _Network, Regresses):  # type: ignore[misc]
    """Linear regression in closed form, or with ``hidden`` layers a network (squared error, ReLU).

    Parameters as of ``PhalanxClassifier``, without ``class_weight``; but "auto" solves a linear
    regression without any steps, and without an ``l2`` it is 0.
    """

    _l2 = 0.0

    def _program(self, rows: int) -> Mapping[str, Any]:
        adam = {"adam": {"learning_rate": 0.01}}
        auto = adam if self._widths() else {"closed_form": {}}
        return self._train(rows, {"linear_regression": {}}, auto)
