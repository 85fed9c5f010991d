"""How many copies of the parameters a worker holds while it trains."""

from __future__ import annotations

from phalanx.specs import parts
from phalanx.v1 import job_spec_pb2

SHARED_COPIES = 3
COPIES_PER_SLOT = 2
LOCAL_COPIES = 3
"""More of them for a slot whose leaves take steps of their own."""

ALL_REDUCE_COPIES = 8
"""More of them where workers own the parameters: two gradients, up to two vectors of optimizer
state, a copy of all these for a checkpoint, and the frames of a range."""

BEST_COPIES = 2
"""And more of them where the best evaluation is kept: it, and a copy for a checkpoint."""

PARAMETER_COPIES = SHARED_COPIES + COPIES_PER_SLOT
"""Copies of the parameters on a worker with one slot."""

TORCH_COPIES = 3
"""More of them for a PyTorch module, which has parameters and gradients of its own."""


def member_copies(spec: job_spec_pb2.JobSpec) -> int:
    """Return the copies of the parameters that a worker has more where workers own them."""
    if not parts.all_reduces(spec.train):
        return 0
    return ALL_REDUCE_COPIES + BEST_COPIES * spec.output.HasField("best")
