"""What members hold of another history of storage: of the time after a backup that was restored.

It may be ahead of all that storage knows, so nothing of it is taken up, and nothing that is said of
it is believed. Terms tell it from what a member is given now: those of a restored place begin far
beyond those of the history before.
"""

from __future__ import annotations

from collections.abc import Iterable

from coordinator.control.core.state import Core
from phalanx.v1 import coordination_service_pb2 as pb

JobTerms = frozenset[tuple[str, int]]


def held_by(core: Core, hello: pb.WorkerHello | pb.AggregatorHello) -> JobTerms:
    """Return the jobs, each with its term, that a member holds of another history.

    None where either side does not know of histories: then terms alone decide.
    """
    if core.history is None or not hello.HasField("history") or hello.history == core.history:
        return frozenset()
    held: Iterable[pb.HeldWorkerJob | pb.HeldRanges] = (
        hello.held_jobs if isinstance(hello, pb.WorkerHello) else hello.held_ranges
    )
    return frozenset((each.job_id, each.term) for each in held)
