"""Around the end of a leadership: nobody waits in vain, and nothing is decided after it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coordinator.control import journal
from coordinator.control import leader as leader_module
from coordinator.control.cluster_servicer import ClusterServicer
from coordinator.control.config import ControlConfig
from coordinator.control.core import effects as fx
from coordinator.control.core import events as ev
from coordinator.control.core.facts import Facts, JobFacts
from coordinator.control.gauges import Gauges
from coordinator.control.job_servicer import JobServicer
from coordinator.control.leader import Leader, leads_no_more
from coordinator.control.process import ControlProcess
from coordinator.control.sessions import CoordinationServicer
from phalanx.errors import DataLoss, Internal, NotFound, Unavailable
from phalanx.telemetry.metrics import ControlMetrics, new_registry
from phalanx.v1 import cluster_service_pb2, job_service_pb2
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1 import storage_service_pb2 as storage_pb
from phalanx.v1.control_journal_pb2 import (
    ControlRecord,
    JobSnapshot,
    JobSubmitted,
    RememberedRequest,
)
from phalanx.v1.job_pb2 import Event
from phalanx.v1.job_service_pb2 import CancelJobResponse

GUARD_S = 30.0


class AwayStore:
    """Storage that is there, takes nothing and answers nothing."""

    def __init__(self) -> None:
        self.available = True
        self.fence = storage_pb.Fence(lease="leader", token=1)
        self.storage = self
        self.CollectGarbage = None
        self.on_change: Any = None
        self.lease_confirmed_s = self.answered_s = time.monotonic()

    async def append_exactly(self, *_: Any) -> int:
        await asyncio.Event().wait()
        raise AssertionError

    insist_call = call = append_exactly


@pytest.fixture
async def leader() -> AsyncIterator[Leader]:
    made = Leader(
        ControlConfig(id="control-1"),
        AwayStore(),  # type: ignore[arg-type]
        Gauges(ControlMetrics(new_registry())),
        generation=1,
        replayed=(Facts(), Facts()),
        control_sequence=(0, 0),
        event_sequence=0,
    )
    made.start()
    made.dispatch(worker_hello(1))
    made.dispatch(drain(0))  # a fact that has to become durable
    assert made._journal.lag
    yield made
    await made.stop(leads_no_more())


def worker_hello(session: int) -> ev.WorkerConnected:
    hello = pb.WorkerHello(worker_id="w1", incarnation="w1-1", slots=1, fingerprint="f")
    return ev.WorkerConnected(session, hello)


def drain(token: int) -> ev.DrainWorker:
    return ev.DrainWorker(token, "w1", RememberedRequest())


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> RememberedRequest:
    """A request that was answered before, by a decision that is not durable yet."""
    monkeypatch.setattr(leader_module.verbs, "first_answer", lambda *_: CancelJobResponse())
    return RememberedRequest(request_id="r1")


async def test_a_repeated_call_is_told_to_come_again_when_storage_takes_too_long(
    leader: Leader, known: RememberedRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leader_module, "ANSWER_TIMEOUT_S", 0.01)
    async with asyncio.timeout(GUARD_S):
        with pytest.raises(Unavailable, match="same request_id"):
            await leader.answered_before(known)


async def test_a_repeated_call_is_sent_away_as_soon_as_the_leadership_ends(
    leader: Leader, known: RememberedRequest
) -> None:
    waiting = asyncio.create_task(leader.answered_before(known))
    await asyncio.sleep(0)
    await leader.stop(leads_no_more())
    async with asyncio.timeout(GUARD_S):
        with pytest.raises(Unavailable) as sent_away:
            await waiting
    assert sent_away.value.reason == "NOT_LEADER"


async def test_a_call_that_comes_after_the_end_is_sent_away_at_once(leader: Leader) -> None:
    await leader.stop(leads_no_more())
    async with asyncio.timeout(GUARD_S):
        with pytest.raises(Unavailable) as sent_away:
            await leader.request(drain)
    assert sent_away.value.reason == "NOT_LEADER"


async def test_rule_12_facts_that_have_to_be_durable_are_not_taken_without_end(
    leader: Leader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "QUEUE_MAX", leader._journal.lag)
    asked: list[int] = []
    async with asyncio.timeout(GUARD_S):
        with pytest.raises(Unavailable) as refusal:
            await leader.request(lambda token: asked.append(token) or drain(token))  # type: ignore[func-returns-value]
    assert refusal.value.reason == "STORAGE_UNAVAILABLE"
    assert not asked


async def test_while_a_fact_waits_for_storage_nothing_new_is_taken(
    leader: Leader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its disk is full, say: it answers, and reads go on."""
    await asyncio.sleep(0)
    leader.check_storage()
    monkeypatch.setattr(journal, "STUCK_S", 0.0)
    with pytest.raises(Unavailable) as refusal:
        leader.check_storage()
    assert refusal.value.reason == "STORAGE_UNAVAILABLE"
    assert refusal.value.retry_after_s


@pytest.fixture
def deciding(leader: Leader, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the core decide these effects; they wait for a record that is not durable."""

    def decide(*effects: fx.Effect) -> None:
        monkeypatch.setattr(leader_module, "handle", lambda *_: list(effects))
        leader.dispatch(ev.Tick())

    return decide


def event(number: int = 0) -> fx.Emit:
    return fx.Emit(Event(message=str(number)), after=1)


async def test_what_is_only_shown_waits_once(leader: Leader, deciding: Callable[..., None]) -> None:
    """Reports of a job come all the time, also while its newest term waits to be durable."""
    before = len(leader._waiting)
    for _ in range(100):
        deciding(fx.Publish("job-1", after=1, progress_only=True), fx.Publish("job-2", after=1))
    assert len(leader._waiting) == before + 2
    leader._on_durable(1, ControlRecord())
    assert len(leader._waiting) == before
    deciding(fx.Publish("job-1", after=2))
    assert len(leader._waiting) == before + 1, "the next record is waited for anew"


async def test_callers_are_sent_away_before_too_much_waits(
    leader: Leader, deciding: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leader_module, "WAITING_MAX", 2 * len(leader._waiting) + 2)
    leader.check_storage()
    deciding(event())
    with pytest.raises(Unavailable) as refusal:
        await leader.request(drain)
    assert refusal.value.reason == "STORAGE_UNAVAILABLE"
    assert refusal.value.retry_after_s
    assert not leader.failed.done()


async def test_a_leadership_that_may_hold_no_more_effects_ends(
    leader: Leader, deciding: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 10
    monkeypatch.setattr(leader_module, "WAITING_MAX", len(leader._waiting) + room)
    for number in range(2 * room):
        deciding(event(number))
    assert not leader.failed.done(), "storage may be taking records all the time"
    leader._store.available = False
    deciding()
    error = leader.failed.result()
    assert isinstance(error, Unavailable)
    assert (error.reason, error.retry_after_s) == ("STORAGE_UNAVAILABLE", 1.0)
    waiting = len(leader._waiting)
    deciding(event())
    assert len(leader._waiting) == waiting


async def test_a_leadership_that_may_hold_no_more_records_ends(
    leader: Leader, deciding: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Members are not callers: what they bring is decided until then."""
    monkeypatch.setattr(journal, "QUEUE_MAX", leader._journal.lag)
    leader._store.available = False
    deciding()
    assert not leader.failed.done()
    for index in range(leader._journal.lag):
        deciding(fx.Persist(100 + index, ControlRecord()))
    assert isinstance(leader.failed.result(), Unavailable)
    assert leader._journal.lag == 2 * journal.QUEUE_MAX


async def test_storage_that_answers_and_takes_nothing_ends_it_as_well(
    leader: Leader, deciding: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    await asyncio.sleep(0)
    monkeypatch.setattr(leader_module, "WAITING_MAX", len(leader._waiting))
    deciding()
    assert not leader.failed.done()
    monkeypatch.setattr(journal, "STUCK_S", 0.0)
    deciding()
    assert leader.failed.done()


async def test_nothing_is_decided_after_the_end(leader: Leader) -> None:
    """The fence of the store is by then that of the next leadership."""
    await leader.stop(leads_no_more())
    lag, workers = leader._journal.lag, dict(leader.core.workers)
    leader.dispatch(ev.SessionBroken(1, "its session broke"))
    leader.dispatch(worker_hello(2))
    leader.dispatch(drain(0))
    assert (leader._journal.lag, leader.core.workers) == (lag, workers)
    assert not leader._tasks


class Leading:
    """A control process as a session sees it."""

    def __init__(self, leader: Leader) -> None:
        self._leader = leader

    def leading(self) -> Leader:
        return self._leader


async def test_a_message_that_control_cannot_take_is_logged_and_told(
    leader: Leader, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(leader, "member_said", fail)

    async def requests() -> AsyncIterator[pb.SessionRequest]:
        hello = pb.WorkerHello(worker_id="w2", incarnation="w2-1", slots=1, fingerprint="f")
        yield pb.SessionRequest(worker_hello=hello)
        yield pb.SessionRequest(heartbeat=pb.Heartbeat())
        await asyncio.Event().wait()

    servicer = CoordinationServicer(Leading(leader))  # type: ignore[arg-type]
    context: Any = None
    async with asyncio.timeout(GUARD_S):
        with pytest.raises(Internal, match="cannot take a heartbeat"):
            async for _ in servicer.Session(requests(), context):
                pass
    assert "member_message_failed" in capsys.readouterr().out


async def test_a_journal_that_cannot_be_read_ends_the_process_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = ControlProcess(
        ControlConfig(id="control-1", listen="127.0.0.1:0", metrics_listen="127.0.0.1:0")
    )

    async def damaged() -> None:
        raise DataLoss("record 7 of the control journal is damaged")

    monkeypatch.setattr(process, "_lead_again_and_again", damaged)
    stopped: list[str] = []
    stop = process.server.stop

    async def note() -> None:
        stopped.append("server")
        await stop()

    monkeypatch.setattr(process.server, "stop", note)
    async with asyncio.timeout(GUARD_S):
        with pytest.raises(DataLoss, match="record 7"):
            await process.run(asyncio.Event())
    assert stopped == ["server"]


async def test_a_leader_without_storage_does_not_know_that_a_job_is_not_there(
    leader: Leader,
) -> None:
    with pytest.raises(NotFound, match=r"there is no job .*`phalanx jobs`"):
        leader.job_view("job-1")
    leader._store.available = False
    with pytest.raises(Unavailable) as caught:
        leader.job_view("job-1")  # the next leader may have taken it meanwhile
    assert caught.value.reason == "STORAGE_UNAVAILABLE"


async def test_a_leader_whose_lease_ran_out_answers_nothing_until_storage_has_told_who_leads(
    leader: Leader,
) -> None:
    """As after a pause: it may refuse, or not know, what the next leader has taken."""
    leader._store.lease_confirmed_s -= leader._config.lease_ttl_s + 1
    with pytest.raises(Unavailable) as caught:
        leader.job_view("job-1")
    assert caught.value.reason == "NOT_LEADER"
    with pytest.raises(Unavailable) as caught:
        await leader.request(drain)
    assert caught.value.reason == "NOT_LEADER"
    leader._store.lease_confirmed_s = time.monotonic()
    with pytest.raises(NotFound):
        leader.job_view("job-1")


@pytest.fixture
def asked(leader: Leader) -> dict[str, Callable[[], Any]]:
    """What people ask of a process that leads and knows one job: lists, and the cluster."""
    facts = JobFacts(JobSnapshot(submitted=JobSubmitted(job_id="job-1")))
    leader.durable.jobs["job-1"] = facts
    leader.streams._series["job-1"] = {}
    config = leader._config
    process: Any = SimpleNamespace(leading=lambda: leader, config=config, store=leader._store)
    jobs, cluster = JobServicer(process, None), ClusterServicer(process)  # type: ignore[arg-type]
    metrics = job_service_pb2.ListJobMetricsRequest(job_id="job-1")
    context: Any = None

    async def events() -> Any:
        request = cluster_service_pb2.ListEventsRequest()
        return [each async for each in cluster.ListEvents(request, context)]

    return {
        "jobs": lambda: jobs.ListJobs(job_service_pb2.ListJobsRequest(), context),
        "metrics": lambda: jobs.ListJobMetrics(metrics, context),
        "workers": lambda: cluster.ListWorkers(cluster_service_pb2.ListWorkersRequest(), context),
        "cluster": lambda: cluster.GetCluster(cluster_service_pb2.GetClusterRequest(), context),
        "events": events,
    }


ASKED = ("jobs", "metrics", "workers", "cluster")


def lapse(leader: Leader) -> None:
    leader._store.lease_confirmed_s -= leader._config.lease_ttl_s + 1


@pytest.mark.parametrize("what", ASKED)
async def test_what_a_leader_lists_is_whole_as_long_as_nobody_else_can_lead(
    leader: Leader, asked: dict[str, Callable[[], Any]], what: str
) -> None:
    leader._store.available = False  # for less than a lease
    assert (await asked[what]()).incomplete == ""


@pytest.mark.parametrize("what", ASKED)
async def test_a_leader_cut_off_for_a_lease_lists_what_it_knows_and_says_that_some_may_be_missing(
    leader: Leader, asked: dict[str, Callable[[], Any]], what: str
) -> None:
    lapse(leader)
    leader._store.available = False
    told = await asked[what]()
    assert "another one may lead" in told.incomplete
    if what == "jobs":
        assert [job.id for job in told.jobs] == ["job-1"]
    leader._store.lease_confirmed_s = time.monotonic()
    assert (await asked[what]()).incomplete == ""


@pytest.mark.parametrize("what", [*ASKED, "events"])
async def test_a_leader_that_may_have_been_paused_for_a_lease_lists_nothing(
    leader: Leader, asked: dict[str, Callable[[], Any]], what: str
) -> None:
    lapse(leader)
    if what == "jobs":
        del leader.durable.jobs["job-1"]  # an empty list is one, too
    with pytest.raises(Unavailable) as caught:
        await asked[what]()
    assert caught.value.reason == "NOT_LEADER"


async def test_events_of_a_leader_that_is_cut_off_end_as_what_may_be_incomplete(
    leader: Leader,
) -> None:
    """Those that it knows come first."""
    leader.event_log._recent.append(Event(sequence=1, type="JOB_QUEUED"))
    leader._store.available = False
    process: Any = SimpleNamespace(leading=lambda: leader)
    request = cluster_service_pb2.ListEventsRequest()
    context: Any = None
    told = [each async for each in ClusterServicer(process).ListEvents(request, context)]
    assert [each.event.sequence for each in told] == [1]
    lapse(leader)
    stream = ClusterServicer(process).ListEvents(request, context)
    assert (await anext(stream)).event.sequence == 1
    with pytest.raises(Unavailable, match="another one may lead") as caught:
        await anext(stream)
    assert caught.value.retry_after_s


async def test_a_leader_that_begins_without_storage_tells_that_it_is_away(leader: Leader) -> None:
    """It was lost after the journal had been read, and before this leader heard of such things."""
    store = AwayStore()
    store.available = False
    other = Leader(
        leader._config,
        store,  # type: ignore[arg-type]
        leader._gauges,
        generation=2,
        replayed=(Facts(), Facts()),
        control_sequence=(0, 0),
        event_sequence=0,
    )
    other.start()
    store.available = True
    store.on_change(True)
    told = [each for each in other.event_log._held if each.type.startswith("STORAGE_")]
    assert [each.type for each in told] == ["STORAGE_UNAVAILABLE", "STORAGE_RESTORED"]
    assert told[0].incident_id == told[1].incident_id != ""
    await other.stop(leads_no_more())
