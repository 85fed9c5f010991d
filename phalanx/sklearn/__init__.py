"""Estimators for scikit-learn that train with Phalanx; needs ``phalanx[learn]``.

    from phalanx.sklearn import PhalanxClassifier

    model = PhalanxClassifier(hidden=(64,), workers=4).fit(X, y)
    model.predict(X_new)

Without anything else ``fit`` runs inside the process; with ``workers`` on as many worker processes
of a cluster of its own; with ``cluster`` on a cluster that is there already: its address, or what
``phalanx.connect`` returned. The fitted estimator is the same, bit for bit.
"""

from __future__ import annotations

try:
    import sklearn as _sklearn  # noqa: F401
except ImportError as error:
    raise ImportError(
        "phalanx.sklearn needs scikit-learn; install it with: pip install 'phalanx[learn]'"
    ) from error

from phalanx.sklearn.forests import PhalanxForestClassifier, PhalanxForestRegressor
from phalanx.sklearn.machines import PhalanxLinearSVC
from phalanx.sklearn.networks import PhalanxClassifier, PhalanxRegressor

__all__ = [
    "PhalanxClassifier",
    "PhalanxForestClassifier",
    "PhalanxForestRegressor",
    "PhalanxLinearSVC",
    "PhalanxRegressor",
]
