"""Root functions that are no elementwise optimizer; ``build_update`` turns a plan into one.

A job with an update has one range. Its flat vector holds all that its algorithm keeps between two
steps, as named tensors of the model's layout: what becomes the model first, then the *workspace*,
which the registered model leaves out. Each leaf writes its contribution where it belongs and zeros
elsewhere, so that the tree adds all of it up and one commit takes all of it: whatever holds for
gradients (a copy of a leaf changes nothing, a killed worker costs its undelivered leaves, a
checkpoint is whole) holds for these algorithms.
"""

from __future__ import annotations

from phalanx.optimizers import build_optimizer
from phalanx.specs.parts import projects, update_kind
from phalanx.updates.base import Update
from phalanx.updates.boosting import BoostingUpdate
from phalanx.updates.columns import ColumnsUpdate
from phalanx.updates.k_means import KMeansUpdate
from phalanx.updates.margins import AddedChanges, ProjectedStep
from phalanx.updates.passes import NextPass
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan

__all__ = ["Update", "build_update"]


def build_update(plan: JobPlan) -> Update | None:
    """Return what makes the versions of a job whose layout is known; None: its optimizer does."""
    spec = JobSpec.FromString(plan.spec)
    match update_kind(spec):
        case "columns":
            return ColumnsUpdate(plan, spec.train)
        case "k_means":
            return KMeansUpdate(plan.layout, spec.seed)
        case "pca" | "closed_form":
            return NextPass(plan.layout)
        case "boosting":
            return BoostingUpdate(plan.layout, spec.train.model.boosting)
        case "cocoa":
            return AddedChanges(plan.layout)
    if projects(spec.train):
        optimizer = build_optimizer(spec.train, plan.total_steps)
        return ProjectedStep(optimizer, plan.layout, spec.train.l2)
    return None
