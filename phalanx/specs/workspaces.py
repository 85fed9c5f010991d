"""Sizes of what a job keeps in its vector while it trains and leaves out of its model.

No numeric library needed, so that whoever places a job knows how long its vector is.
"""

from __future__ import annotations

from math import prod

from phalanx.specs import parts
from phalanx.v1 import job_spec_pb2

Shapes = dict[str, tuple[int, ...]]

CANDIDATES_PER_CLUSTER = 4
"""Rows that the centers of k-means are drawn from; each stays in the workspace."""

CELLS = 1024
"""Cells that boosting counts a feature's values in, to place the bins."""

EXPONENTS = 2098
"""Buckets for the exponents of the targets, all that float64 has."""

MEASURES = 3
"""Of a bin: the sum of first derivatives, of second ones, and the rows."""


def element_count(spec: job_spec_pb2.JobSpec, features: int, classes: int, rows: int) -> int:
    """Return the elements of the workspace of a resolved job on so many train rows.

    Those of shards that are columns depend on the rows of a step and are not counted here.
    """
    model = spec.train.model
    match parts.update_kind(spec):
        case "k_means":
            shapes = k_means(model.k_means.clusters, features, rows, spec.data.shards)
        case "pca":
            shapes = passes(features)
        case "closed_form":
            shapes = equations(features + int(model.linear_regression.bias))
        case "boosting":
            shapes = boosting(model.boosting, features, classes)
        case "cocoa":
            shapes = cocoa(rows)
        case _:
            shapes = {}
    return sum(prod(shape) for shape in shapes.values())


def k_means(clusters: int, features: int, rows: int, shards: int) -> Shapes:
    """Candidates for centers: some for each cluster, and one of each shard at least."""
    count = min(max(CANDIDATES_PER_CLUSTER * clusters, shards), rows)
    return {"candidates": (count, features)}


def passes(features: int) -> Shapes:
    """Sums over the rows of x xᵀ and of x, and one element: the passes that are over."""
    return {"products": (features, features), "sums": (features,), "passes_over": (1,)}


def equations(features: int) -> Shapes:
    """Sums over the rows of x xᵀ, of x y and of y², and the passes that are over."""
    return {**passes(features), "squares": (1,)}


def boosting(settings: job_spec_pb2.Boosting, features: int, classes: int) -> Shapes:
    """Where a job is, histograms of the widest level, and what the bins are placed by."""
    widest = (1 << settings.depth) // 2
    sums = max(MEASURES * widest * features * settings.bins, EXPONENTS)
    shapes: Shapes = {"cursor": (4,), "sums": (sums,), "grid": (features, CELLS)}
    shapes["spread"] = (2, features)
    if classes:
        shapes["class_rows"] = (classes,)
    return shapes


def cocoa(rows: int) -> Shapes:
    """The dual variable of each row, and one element: the rounds that are over."""
    return {"duals": (rows,), "rounds": (1,)}
