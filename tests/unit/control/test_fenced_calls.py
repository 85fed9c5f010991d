"""Callers hear nothing of the fence between control and storage."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from coordinator.control.config import ControlConfig
from coordinator.control.core.facts import Facts
from coordinator.control.core.state import Core, CoreConfig
from coordinator.control.job_servicer import JobServicer
from coordinator.control.leader import Leader
from phalanx.errors import Aborted, Unavailable
from phalanx.v1 import job_service_pb2
from phalanx.v1.control_journal_pb2 import JobSubmitted

STALE = Aborted("the lease has token 2; token 1 is not current", reason="STALE_GENERATION")
SUBMISSION = job_service_pb2.SubmitJobRequest(spec={"name": "job"}, request_id="once")


class Submissions:
    """Preparation succeeds; what is written to storage is refused."""

    def __init__(self, *, stores: bool) -> None:
        self._stores = stores
        self.discarded: list[str] = []
        self.under_way: set[str] = set()

    async def prepare(self, *_):
        return JobSubmitted(job_id="job-1"), None

    async def store(self, *_):
        if not self._stores:
            raise STALE

    async def discard(self, job_id):
        self.discarded.append(job_id)
        raise STALE


def a_leader() -> Leader:
    """A leadership with nothing behind it."""
    leader = object.__new__(Leader)
    leader.failed = asyncio.get_running_loop().create_future()
    leader.core = Core(CoreConfig(), 1, Facts())
    leader.check_storage = lambda: None
    leader.answered_before = no_answer
    leader.look_at_quotas = lambda: None
    return leader


async def no_answer(_):
    return None


async def submit(leader: Leader, submissions: Submissions):
    process = SimpleNamespace(leading=lambda: leader, config=ControlConfig())
    context = SimpleNamespace(peer=lambda: "ipv4:127.0.0.1:1")
    return await JobServicer(process, submissions).SubmitJob(SUBMISSION, context)


async def test_a_submission_that_storage_fences_off_is_sent_elsewhere():
    leader = a_leader()
    with pytest.raises(Unavailable) as refused:
        await submit(leader, Submissions(stores=False))
    assert refused.value.reason == "NOT_LEADER"
    assert refused.value.retry_after_s is not None
    assert leader.failed.result().reason == "STALE_GENERATION"


async def test_what_ended_the_call_is_told_although_its_pins_cannot_be_let_go():
    leader = a_leader()

    async def request(_):
        raise Unavailable("storage does not take the decision")

    leader.request = request
    with pytest.raises(Unavailable, match="does not take the decision"):
        await submit(leader, Submissions(stores=True))


async def test_the_second_of_two_calls_with_one_request_id_keeps_no_pins():
    """It was under way while the first was answered, and had pinned what its own job would need."""
    leader, submissions = a_leader(), Submissions(stores=True)
    first = job_service_pb2.SubmitJobResponse(job={"id": "job-0"})

    async def request(_):
        return first

    leader.request = request
    assert await submit(leader, submissions) == first
    assert submissions.discarded == ["job-1"]


async def test_a_caller_that_gave_up_keeps_no_pins():
    leader, submissions = a_leader(), Submissions(stores=True)
    stored = asyncio.Event()

    async def store(*_):
        stored.set()
        await asyncio.Event().wait()

    submissions.store = store
    call = asyncio.create_task(submit(leader, submissions))
    await stored.wait()
    call.cancel()
    await asyncio.wait([call])
    assert call.cancelled()
    assert submissions.discarded == ["job-1"]
