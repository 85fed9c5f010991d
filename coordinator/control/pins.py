"""Pins that nobody needs any more, although nobody let go of them.

A submission pins its data and code before its job is journalled, and says when it has ended; a
leader can die or lose its lease in between, or storage can be away. What is left is found by
comparing storage with the journal, when a leadership begins and before garbage is collected:
nobody else pins anything for a job meanwhile, since storage refuses the leader before.
"""

from __future__ import annotations

from collections.abc import Collection

from coordinator.control.core.facts import Facts
from coordinator.control.core.lifecycle import CANCELLED, SUCCEEDED
from coordinator.control.store import Store
from phalanx.errors import PhalanxError
from phalanx.ids import is_made_id
from phalanx.tasks import KEPT
from phalanx.telemetry.logs import get_logger
from phalanx.v1 import storage_service_pb2 as pb

_log = get_logger(__name__)


async def unclaimed(store: Store, facts: Facts, submitting: Collection[str]) -> list[str]:
    """Return the jobs whose pins can go: `submitting` are those of submissions under way.

    Pins of others, such as those of wheels, have no id of a job. If storage cannot tell, the pins
    stay until it is asked again.
    """
    found: list[str] = []
    request = pb.ListPinsRequest()
    try:
        while True:
            answer = await store.call(store.storage.ListPins, request)
            if not answer.holders:
                return found
            # Those who pinned before the answer was given are known by now.
            found += [
                each for each in answer.holders if each not in submitting and _may_go(facts, each)
            ]
            request.after_holder = answer.holders[-1]
    except PhalanxError as error:
        _log.warning("pins_not_compared", reason=error.reason, message=error.message)
        return []


def _may_go(facts: Facts, holder: str) -> bool:
    job_id, _, value = holder.partition("/")
    if not is_made_id(job_id):
        return False
    job = facts.jobs.get(job_id)
    if value and not value.startswith(KEPT):
        # A large result of a task stays as long as its job does, however that ended.
        return job is None and job_id not in facts.removing
    return job is None or job.state in (SUCCEEDED, CANCELLED)
