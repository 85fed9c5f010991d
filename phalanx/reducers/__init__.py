"""Reducers over ordered leaves: what becomes of the contributions of all shards of a step.

The canonical tree (`phalanx.reduction`) sums what shards contribute, in pieces and as they come. A
rule that has to see all contributions side by side cannot do that: it gets them whole and in the
order of their shards, and what it returns depends on nothing else.
"""

from __future__ import annotations

from phalanx.reducers.contributions import Contribution, Reduced
from phalanx.reducers.rules import (
    Krum,
    Mean,
    Median,
    Reducer,
    TrimmedMean,
)
from phalanx.reducers.slices import Slices, Steps
from phalanx.v1 import job_spec_pb2

__all__ = ["Contribution", "Reduced", "Reducer", "Slices", "Steps", "build_reducer"]


def build_reducer(train: job_spec_pb2.Train, shards: int) -> Reducer | None:
    """Return the reducer of a resolved spec; None: the tree sums, the root divides."""
    reduction = train.reduction
    clip_norm = reduction.clip_norm if reduction.HasField("clip_norm") else None
    match reduction.WhichOneof("kind"):
        case "median":
            return Median(clip_norm)
        case "trimmed_mean":
            return TrimmedMean(reduction.trimmed_mean.trim, clip_norm)
        case "krum":
            krum = reduction.krum
            return Krum(krum.faulty, krum.keep if krum.HasField("keep") else 1, clip_norm)
        case _:
            by_tree = clip_norm is None and not train.synchronous.backup_shards
            return None if by_tree else Mean(shards, clip_norm)
