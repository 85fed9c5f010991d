"""Workers that were outvoted: journalled, told once, without work until they start again."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.control.core import events as ev
from coordinator.control.core.facts import QUARANTINES_MAX, Facts
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1.cluster_service_pb2 import Worker
from phalanx.v1.control_journal_pb2 import ControlRecord, WorkerQuarantined
from phalanx.v1.job_pb2 import Job
from phalanx.v1.training_pb2 import TreeNode

ALL = set(range(16))


def outvoted(worker_id: str = "w2", start: int = 1) -> pb.OutvotedWorker:
    return pb.OutvotedWorker(
        worker_id=worker_id,
        incarnation=f"{worker_id}-{start}",
        step=6,
        node=TreeNode(first=5, span=1),
        sha256="aa" * 32,
        majority_sha256="bb" * 32,
        agreed=["w1", "w3"],
    )


def report(running: Any, step: int = 7, *caught: pb.OutvotedWorker, **fields: Any) -> None:
    running.report("job-1", step, outvoted_workers=caught, **fields)


def events(running: Any) -> list[Any]:
    return [each for each in running.events if each.type == "WORKER_QUARANTINED"]


def state(running: Any, name: str = "w2") -> Any:
    return running.core.workers[name].state


def test_it_is_journalled_told_once_and_loses_its_shards(running: Any) -> None:
    before = len(running.journal)
    assert running.shards("w2")
    report(running, 7, outvoted())
    report(running, 8, outvoted())
    [record] = running.journal[before:]
    assert record.worker_quarantined.worker_id == "w2"
    [event] = events(running)
    assert (event.worker_id, event.job_id, event.shard, event.step) == ("w2", "job-1", 5, 6)
    assert event.details["sha256"] == "aa" * 32
    assert event.details["majority_sha256"] == "bb" * 32
    assert event.details["agreed"] == "w1,w3"
    assert state(running) == Worker.STATE_QUARANTINED
    [revoked] = running.told("w2", "revoke_job")
    assert revoked.job_id == "job-1"
    assert running.shards("w1") | running.shards("w3") == ALL
    assert "aa" * 32 in running.core.workers["w2"].reason


def test_it_is_told_only_once_it_is_durable(running: Any) -> None:
    running.storage_up = False
    report(running, 7, outvoted())
    assert events(running) == []
    running.storage_up = True
    running.perform()
    assert len(events(running)) == 1


def test_it_gets_nothing_of_any_job_any_more(running: Any) -> None:
    report(running, 7, outvoted())
    running.submit("job-2")
    assert running.shards("w2", "job-2") == set()
    running.advance(20.0)
    assert state(running) == Worker.STATE_QUARANTINED
    assert "w2" not in running.core.jobs["job-1"].hosts
    assert "w2" not in running.core.jobs["job-2"].hosts


def test_silence_and_a_broken_session_do_not_make_it_well(running: Any) -> None:
    report(running, 7, outvoted())
    running.time_s += 1.5
    running.feed(ev.Tick())
    running.heartbeats()
    assert state(running) == Worker.STATE_QUARANTINED
    running.kill("w2")
    assert state(running) == Worker.STATE_LOST
    running.worker("w2")
    assert state(running) == Worker.STATE_QUARANTINED


@pytest.mark.parametrize("snapshot", [False, True])
def test_it_survives_a_restart_of_control(running: Any, snapshot: bool) -> None:
    report(running, 7, outvoted())
    if snapshot:
        running.journal[:] = list(running.durable.snapshot())
    running.lead()
    running.aggregator(held_ranges=[pb.HeldRanges(job_id="job-1", term=1, range_indexes=[0])])
    for name in ("w1", "w3"):
        running.worker(name)
    held = pb.HeldWorkerJob(
        job_id="job-1", term=1, ready=True, train_nodes=[TreeNode(first=0, span=4)]
    )
    running.worker("w2", held_jobs=[held])
    assert state(running) == Worker.STATE_QUARANTINED
    assert running.told("w2", "revoke_job")
    report(running, 9, outvoted())
    assert events(running) == [], "that is known"
    running.advance(3.0)
    assert running.shards("w1") | running.shards("w3") == ALL


def test_one_that_control_has_not_met_yet_is_quarantined_when_it_comes(running: Any) -> None:
    running.lead()
    running.aggregator(held_ranges=[pb.HeldRanges(job_id="job-1", term=1, range_indexes=[0])])
    report(running, 7, outvoted())
    running.worker("w2")
    assert state(running) == Worker.STATE_QUARANTINED


def test_another_start_is_taken_in_and_old_reports_of_the_last_one_do_not_count(
    running: Any,
) -> None:
    report(running, 7, outvoted())
    running.kill("w2")
    running.worker("w2", incarnation="w2-2")
    assert state(running) == Worker.STATE_READY
    assert running.core.facts.quarantines == {}
    report(running, 8, outvoted())
    assert state(running) == Worker.STATE_READY
    assert len(events(running)) == 1
    report(running, 8, outvoted(), outvoted(start=2))
    assert state(running) == Worker.STATE_QUARANTINED
    assert len(events(running)) == 2


def test_a_drain_ends_it(running: Any) -> None:
    report(running, 7, outvoted())
    running.call(ev.DrainWorker, "w2")
    assert running.told("w2", "drain")
    assert state(running) == Worker.STATE_DRAINING
    running.kill("w2")
    assert state(running) == Worker.STATE_LEFT
    assert running.core.facts.quarantines == {}


def test_one_that_drains_already_only_leaves(running: Any) -> None:
    running.auto = False
    running.call(ev.DrainWorker, "w2")
    report(running, 7, outvoted())
    assert state(running) == Worker.STATE_DRAINING
    assert len(events(running)) == 1


def test_a_job_that_it_was_to_describe_is_described_by_another(cluster: Any) -> None:
    cluster.aggregator()
    cluster.worker("w2")
    cluster.submit()
    cluster.auto = False
    cluster.submit("job-2")
    assert list(cluster.core.jobs["job-2"].describing) == ["w2"]
    cluster.worker("w9")
    cluster.report("job-1", 7, outvoted_workers=[outvoted()])
    assert list(cluster.core.jobs["job-2"].describing) == ["w9"]


def test_the_journal_keeps_the_newest_only() -> None:
    facts = Facts()
    for number in range(QUARANTINES_MAX + 5):
        fact = WorkerQuarantined(worker_id=f"w{number}", incarnation="one")
        facts.apply(ControlRecord(worker_quarantined=fact))
    assert len(facts.quarantines) == QUARANTINES_MAX
    assert "w4" not in facts.quarantines
    assert "w5" in facts.quarantines


def missing(**fields: Any) -> pb.VerifiersMissing:
    fields = {"leaves": 3, "step": 7, "copies": 1, "results": 1, "needed": 2, **fields}
    return pb.VerifiersMissing(node=TreeNode(first=5, span=1), **fields)


def test_a_job_that_lacks_verifiers_says_so_until_it_has_them(running: Any) -> None:
    report(running, 7, outvoted(), verifiers_missing=missing())
    job: Job = running.job()
    assert job.reason == "WAITING_FOR_VERIFIERS"
    assert "2 workers have to agree on shard 5 of step 7 (and 2 more)" in job.message
    assert "1 copy of it came" in job.message
    assert "w2 is quarantined" in job.message
    report(running, 7, outvoted(), verifiers_missing=missing())
    waiting = [each for each in running.events if each.type == "JOB_WAITING"]
    assert [each.details["reason"] for each in waiting] == ["WAITING_FOR_VERIFIERS"]
    report(running, 8, outvoted())
    assert running.job().reason == ""


def test_results_that_all_differ_hint_at_the_code(running: Any) -> None:
    report(running, 7, verifiers_missing=missing(copies=3, results=3, leaves=1))
    message = running.job().message
    assert "3 copies of it came, with 3 different results" in message
    assert "more than its seed" in message


def test_without_any_worker_that_is_the_reason(running: Any) -> None:
    for name in ("w1", "w2", "w3"):
        running.kill(name)
    report(running, 7, verifiers_missing=missing())
    assert running.job().reason == "WAITING_FOR_WORKERS"


def test_a_job_with_nobody_but_quarantined_workers_says_so(running: Any) -> None:
    report(running, 7, outvoted("w1"), outvoted("w2"), outvoted("w3"))
    assert running.job().reason == "WAITING_FOR_WORKERS"
    assert "w1 is left out: it is quarantined" in running.job().message


def test_a_job_does_not_hear_which_job_of_others_found_a_worker_out(running: Any) -> None:
    report(running, 7, outvoted("w1"), outvoted("w2"), outvoted("w3"))
    running.submit("job-2", edit=lambda spec: setattr(spec, "namespace", "vision"))
    told = running.job("job-2").message + "".join(
        each.message for each in running.events if each.job_id == "job-2"
    )
    assert "w1 is left out: it is quarantined" in told
    assert "job-1" not in told


def test_all_that_may_be_asked_for_a_copy_hear_of_shards_that_are_left_out(cluster: Any) -> None:
    cluster.aggregator()
    for name in ("w1", "w2", "w3"):
        cluster.worker(name)

    def edit(spec: Any) -> None:
        spec.train.verification.replicas = 3
        spec.train.on_nonfinite.skip.SetInParent()

    cluster.submit(edit=edit)
    shard = min(cluster.shards("w1"))
    for name in ("w1", "w2"):
        failed = pb.LeafFailed(
            job_id="job-1", term=1, step=4, shard=shard, kind=pb.LeafFailed.KIND_NON_FINITE, task=9
        )
        cluster.say(cluster.sessions[name], leaf_failed=failed)
    for name in ("w1", "w2", "w3"):
        [absent] = cluster.told(name, "absent_shards")
        assert list(absent.shards) == [shard]
