"""From sums over rows to metrics with names like ``test/accuracy``."""

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

_RENAMED = {"correct": "accuracy", "absolute_error": "mae"}
_LOWER_IS_BETTER = ("loss", "rmse", "mae", "error")


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
    """Return 1 − residual sum of squares ÷ total sum of squares; 0 for constant targets."""
    total = sums["target_squared"] - sums["target"] ** 2 / rows
    return 1.0 - sums["squared_error"] / total if total > 0 else 0.0


def lower_is_better(metric: str) -> bool:
    """Return whether a metric improves by falling, judged by its name."""
    return metric.rpartition("/")[2].endswith(_LOWER_IS_BETTER)


def keeps_point(step: int, total_steps: int = 0, points_max: int = 10_000) -> bool:
    """Return whether the training metrics of a step are kept as a point.

    A pure function of the step, so that a replay keeps the same points. The stride doubles each
    time the number of steps does beyond ``points_max``; a curve has at most about twice that many.
    """
    reach = max(step, total_steps)
    stride = 1
    while reach > points_max * stride:
        stride *= 2
    return step % stride == 0
