"""State that goes with a node from version to version, and where it is made again from.

What a lossy contribution leaves out is added to the node's next one, and a shard's own optimizer
may remember its steps from one version to the next. So a node has a *state* at each version: what
its contributions have left out, and what its shards' optimizers remember. It lives on the worker
that computes the node. Every so many versions, at a *base*, it is handed in with the contribution
that makes that version; in between it is a function of the state at the base and of the versions
since, so whoever takes a node over computes it again. At version 0 every state is zero.
"""

from __future__ import annotations

from functools import lru_cache

from phalanx.reduction import Node
from phalanx.specs import parts
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan

STATE_VECTOR = "state"
"""The name of state vectors in frames of contributions."""


def base_of(plan: JobPlan, version: int) -> int:
    """Return the newest version not above `version` at which states were handed in."""
    return version - version % plan.state_every


def hands_in(plan: JobPlan, version: int) -> bool:
    """Whether the contributions that make `version` bring the states at it along."""
    return plan.state_every > 0 and version % plan.state_every == 0


def stateful_nodes(plan: JobPlan) -> list[Node]:
    """Return the nodes that have a state."""
    span = max(1, plan.unit_span)
    return [Node(first, span) for first in range(0, plan.shards, span)]


def vectors_of(plan: JobPlan, node: Node) -> int:
    """Return how many vectors, each as long as the parameters, the state of a node is.

    First comes what the node has left out, then what each of its shards' optimizers remembers.
    """
    left_out, inner = _vectors(plan.spec)
    shards = min(node.first + node.span, plan.shards) - node.first
    return left_out + inner * shards


def left_out_vectors(plan: JobPlan) -> int:
    """Return how many of them hold what the node's contributions have left out."""
    return _vectors(plan.spec)[0]


@lru_cache(maxsize=16)
def _vectors(spec: bytes) -> tuple[int, int]:
    train = JobSpec.FromString(spec).train
    return int(parts.feeds_back(train.compression)), parts.inner_vectors(train)
