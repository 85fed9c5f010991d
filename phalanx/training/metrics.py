"""From sums over rows to metrics with names like ``test/accuracy``.

Losses are means over examples and hold no L2 penalty: they measure the model, not its size.
``train/loss`` of a step is that of its batch at the version from which the step started; where the
whole model comes of sums over all rows, it is that of the model (see ``phalanx.models.passes``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

CLASSIFICATION_SUMS: tuple[str, ...] = ("loss", "correct")
REGRESSION_SUMS: tuple[str, ...] = (
    "loss",
    "squared_error",
    "absolute_error",
    "target",
    "target_squared",
)

_EPSILON = 2.0**-52

_RENAMED = {"correct": "accuracy", "absolute_error": "mae"}
_LOWER_IS_BETTER = ("loss", "rmse", "mae", "error")
_HIGHER_IS_BETTER = ("accuracy", "r2", "auc", "f1", "precision", "recall", "score")

POINTS_MAX = 10_000
"""A curve is thinned so that it has about as many points as this."""


def metrics_from_sums(
    split: str, names: Sequence[str], sums: Sequence[float], rows: int
) -> dict[str, float]:
    """Return the metrics of one evaluation, keyed ``split/name``.

    A sum becomes its mean over the rows, under its own name; ``correct`` is called accuracy and
    ``absolute_error`` mae. ``squared_error`` gives rmse, and r2 where the sums of the targets and
    of their squares are there. Without rows there are no metrics.
    """
    if rows < 1:
        return {}
    by_name = dict(zip(names, (float(value) for value in sums), strict=True))
    metrics: dict[str, float] = {}
    for name, value in by_name.items():
        if name == "squared_error":
            metrics["rmse"] = math.sqrt(value / rows)
        elif name not in ("target", "target_squared"):
            metrics[_RENAMED.get(name, name)] = value / rows
    if by_name.keys() >= {"squared_error", "target", "target_squared"}:
        metrics["r2"] = _r2(by_name, rows)
    return {f"{split}/{name}": value for name, value in metrics.items()}


def _r2(sums: Mapping[str, float], rows: int) -> float:
    """Return 1 − residual sum of squares ÷ total sum of squares; 0 for constant targets.

    Targets that differ by no more than what rounding leaves of their sums count as constant.
    """
    squared = sums["target_squared"]
    total = squared - sums["target"] ** 2 / rows
    lost = _EPSILON * (32 + rows / 256) * squared
    return 1.0 - sums["squared_error"] / total if total > lost else 0.0


def direction(metric: str) -> int:
    """Return +1 where a metric improves by rising, -1 by falling, 0 where its name does not tell.

    The name after the split is looked at: whether it ends in loss, rmse, mae or error, or in
    accuracy, r2, auc, f1, precision, recall or score.
    """
    name = metric.rpartition("/")[2]
    if name.endswith(_LOWER_IS_BETTER):
        return -1
    return 1 if name.endswith(_HIGHER_IS_BETTER) else 0


def keeps_point(number: int, total: int = 0) -> bool:
    """Return whether measurement `number` (from 1) of a curve is kept as a point.

    A pure function of its arguments, so that a replay keeps the same points. Where the `total` is
    known the points are evenly spaced. Where it is not (0) they thin out as the curve grows: the
    stride doubles whenever the number does beyond a sixth of `POINTS_MAX`, which makes at most
    `POINTS_MAX` points in a hundred thousand measurements and twice that in a hundred million.
    """
    reach, dense = (total, POINTS_MAX) if total else (number, POINTS_MAX // 6)
    stride = 1
    while reach > dense * stride:
        stride *= 2
    return number % stride == 0
