"""Steps of two train rounds: those of jobs whose shards are groups of columns.

In the first round of a step the shards add up the scores of its rows, in the second one what the
scores make of their weights. Each round makes a version of the vector, so the parameters of step s
are version 2 s. Every shard counts all rows of a step.
"""

from __future__ import annotations

from phalanx.v1.training_pb2 import JobPlan


def rounds_per_step(plan: JobPlan) -> int:
    """Return how many train rounds, and versions, a step of the job has."""
    return 2 if plan.by_columns else 1


def step_of(plan: JobPlan, version: int) -> int:
    """Return the step that a version belongs to: whose parameters it holds, from 0."""
    return version // rounds_per_step(plan)


def row_shards(plan: JobPlan) -> int:
    """Return among how many shards the rows of a step are dealt out."""
    return 1 if plan.by_columns else plan.shards


def examples_of(plan: JobPlan, counted: int) -> int:
    """Return how many examples a step had whose contributions have counted so many."""
    return counted // plan.shards if plan.by_columns else counted
