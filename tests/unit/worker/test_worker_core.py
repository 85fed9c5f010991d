"""Membership: generations, hosted jobs, drain, slots."""

from __future__ import annotations

from typing import Any

from phalanx.reduction import Node
from phalanx.v1 import aggregation_service_pb2 as exchange
from phalanx.v1 import coordination_service_pb2 as coordination
from phalanx.v1 import training_pb2
from worker.core import effects as do
from worker.core.session import WorkerCore

GoRecord = training_pb2.GoRecord


def _say(core: WorkerCore, generation: int = 1, **message: Any) -> list[do.Effect]:
    return core.message(coordination.SessionResponse(generation=generation, **message))


def _assign(job_id: str = "job-1", term: int = 1, placement: int = 1) -> coordination.AssignJob:
    layout = training_pb2.Layout(dtype="float32", element_count=10)
    plan = training_pb2.JobPlan(job_id=job_id, layout=layout, shards=2)
    piece = training_pb2.ParameterRange(element_count=10, aggregator_id="a0", address="x:1")
    node = training_pb2.TreeNode(first=0, span=2)
    return coordination.AssignJob(
        plan=plan, term=term, placement=placement, ranges=[piece], train_nodes=[node]
    )


def _kinds(effects: list[do.Effect]) -> list[type]:
    return [type(effect) for effect in effects]


def test_a_lower_generation_is_refused() -> None:
    core = WorkerCore(1)
    _say(core, 7, welcome={})
    assert _kinds(_say(core, 6, assign_job=_assign())) == [do.RefuseSession]
    assert not core.jobs
    assert core.generation == 7


def test_an_assignment_prepares_and_opens_streams_once() -> None:
    core = WorkerCore(1)
    assert _kinds(_say(core, assign_job=_assign())) == [do.Prepare, do.OpenStreams]
    assert _say(core, assign_job=_assign()) == []
    assert _kinds(_say(core, assign_job=_assign(term=2))) == [do.OpenStreams]
    (held,) = core.held_jobs()
    assert (held.job_id, held.term, held.placement, held.ready) == ("job-1", 2, 1, False)
    core.prepare_done("job-1")
    assert core.held_jobs()[0].ready


def test_all_jobs_are_let_go_whatever_their_term() -> None:
    core = WorkerCore(1)
    _say(core, assign_job=_assign(term=3))
    assert _kinds(core.let_all_go()) == [do.Discard, do.Report]
    assert not core.jobs
    assert core.let_all_go() == []
    # One of a lower term is new.
    assert _kinds(_say(core, assign_job=_assign(term=1))) == [do.Prepare, do.OpenStreams]


def test_a_revoked_job_is_released_whether_it_is_known_or_not() -> None:
    core = WorkerCore(1)
    _say(core, assign_job=_assign(term=3))
    assert _say(core, revoke_job={"job_id": "job-1", "term": 2}) == []
    effects = _say(core, revoke_job={"job_id": "job-1", "term": 3})
    assert _kinds(effects) == [do.Discard, do.Report]
    assert not core.jobs
    (report,) = _say(core, revoke_job={"job_id": "job-1", "term": 3})
    assert isinstance(report, do.Report)
    assert report.message.worker_job_released.term == 3


def test_shards_to_leave_out_reach_their_job() -> None:
    core = WorkerCore(1)
    _say(core, assign_job=_assign())
    core.prepare_done("job-1")
    assert _say(core, absent_shards={"job_id": "job-1", "term": 1, "step": 0, "shards": [1]}) == []
    assert _say(core, absent_shards={"job_id": "other", "term": 1, "step": 0, "shards": [0]}) == []
    job = core.jobs["job-1"]
    place = job.frame_place(exchange.VersionFrame(term=1, element_count=10))
    assert place is not None
    core.settle(job.frame_stored(place))
    core.settle(job.go_record(GoRecord(term=1, action=GoRecord.ACTION_TRAIN)))
    (run,) = core.slot_idle(0)
    assert isinstance(run, do.Run)
    assert run.task.absent == {1}


def test_a_drain_waits_for_the_last_job() -> None:
    core = WorkerCore(1)
    _say(core, assign_job=_assign())
    assert _kinds(core.drain()) == [do.Report]
    assert core.drain() == []
    effects = _say(core, revoke_job={"job_id": "job-1", "term": 1})
    assert _kinds(effects) == [do.Discard, do.Report, do.Drained]
    assert _kinds(_say(WorkerCore(1), drain={})) == [do.Report, do.Drained]


def test_an_idle_slot_gets_waiting_work_of_any_job() -> None:
    core = WorkerCore(2)
    for job_id in ("job-1", "job-2"):
        _say(core, assign_job=_assign(job_id))
        core.prepare_done(job_id)
        job = core.jobs[job_id]
        frame = exchange.VersionFrame(term=1, element_count=10)
        place = job.frame_place(frame)
        assert place is not None
        core.settle(job.frame_stored(place))
        core.settle(job.go_record(GoRecord(term=1, action=GoRecord.ACTION_TRAIN)))
    tasks = []
    for slot in (0, 1):
        for effect in core.slot_idle(slot):
            assert isinstance(effect, do.Run)
            tasks.append(effect.task)
    assert [(task.job_id, task.slot) for task in tasks] == [("job-1", 0), ("job-1", 1)]
    (effect,) = core.task_ended(tasks[0], lost=True) or core.slot_idle(0)
    # The lost part waits in line behind the job that came before it.
    assert isinstance(effect, do.Run)
    assert effect.task.parts[0].node in (Node(0, 1), Node(1, 1))


def test_a_task_of_an_earlier_hosting_is_no_news() -> None:
    core = WorkerCore(1)
    test = _assign()
    test.train_nodes[0].span = 2
    _say(core, assign_job=test)
    core.prepare_done("job-1")
    job = core.jobs["job-1"]
    core.settle(job.go_record(GoRecord(term=1, action=GoRecord.ACTION_INITIALISE)))
    (run,) = core.slot_idle(0)
    assert isinstance(run, do.Run)
    _say(core, revoke_job={"job_id": "job-1", "term": 1})
    _say(core, assign_job=test)
    assert core.task_ended(run.task, lost=False) == []
