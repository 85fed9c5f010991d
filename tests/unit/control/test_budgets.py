"""Leaves that fail: tried elsewhere, then the job fails and names the shard, or skips it."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.control.core import events as ev
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1 import storage_service_pb2 as storage_pb
from phalanx.v1.job_pb2 import BestEvaluation, Failure

ALL = set(range(16))


def manifest(step: int, *, final: bool = False) -> storage_pb.CheckpointManifest:
    return storage_pb.CheckpointManifest(
        job_id="job-1", term=1, step=step, final=final, manifest_sha256=f"{step:064x}"
    )


def leaf_failure(
    cluster: Any,
    worker: str,
    kind: Any,
    shard: int = 3,
    step: int = 7,
    task: int = 0,
    reason: str = "",
) -> None:
    failed = pb.LeafFailed(
        job_id="job-1",
        term=1,
        step=step,
        shard=shard,
        kind=kind,
        message="ZeroDivisionError",
        traceback="Traceback (most recent call last)",
        first_row=100,
        row_count=64,
        task=task,
        reason=reason,
    )
    cluster.say(cluster.sessions[worker], leaf_failed=failed)


def host_of(cluster: Any, shard: int) -> str:
    hosts = [name for name in ("w1", "w2", "w3") if shard in cluster.shards(name)]
    assert len(hosts) == 1
    return hosts[0]


def test_a_leaf_that_fails_on_two_workers_fails_the_job(running: Any) -> None:
    first = host_of(running, 3)
    leaf_failure(running, first, pb.LeafFailed.KIND_RAISED)
    second = host_of(running, 3)
    assert second != first
    assert running.state() == "RUNNING"
    leaf_failure(running, second, pb.LeafFailed.KIND_CRASHED)
    job = running.job()
    assert (running.state(), job.reason) == ("FAILED", "POISON_SHARD")
    failure = job.failures[0]
    assert (failure.shard, failure.first_row, failure.row_count, failure.attempts) == (
        3,
        100,
        64,
        2,
    )
    assert sorted(failure.worker_ids) == sorted((first, second))
    assert failure.traceback.startswith("Traceback")
    assert "rows 100 to 163" in failure.message
    assert "POISON_SHARD" in running.types()


@pytest.mark.parametrize(
    ("reasons", "code"),
    [
        (("NO_GPU", "NO_GPU"), "NO_GPU"),
        (("DEVICE_LOST", "DEVICE_LOST"), "DEVICE_LOST"),
        (("DEVICE_LOST", "NO_GPU"), "POISON_SHARD"),
        (("", "NO_GPU"), "POISON_SHARD"),
        (("NO_GPU", ""), "POISON_SHARD"),
        # What a worker says is not made a code of control's own.
        (("JOB_TOO_LARGE", "JOB_TOO_LARGE"), "POISON_SHARD"),
        (("no gpu", "no gpu"), "POISON_SHARD"),
    ],
)
def test_a_job_tells_the_reason_that_every_worker_gave(
    running: Any, reasons: tuple[str, str], code: str
) -> None:
    for reason in reasons:
        leaf_failure(running, host_of(running, 3), pb.LeafFailed.KIND_RAISED, reason=reason)
    job = running.job()
    assert (running.state(), job.reason, job.failures[0].code) == ("FAILED", code, code)
    assert "POISON_SHARD" in running.types()


def test_a_lone_worker_gets_three_attempts(cluster: Any) -> None:
    cluster.aggregator()
    cluster.worker("w1")
    cluster.submit()
    for attempt in range(3):
        placements = [each.placement for each in cluster.told("w1", "assign_job")]
        leaf_failure(cluster, "w1", pb.LeafFailed.KIND_HUNG)
        if attempt < 2:
            assert cluster.told("w1", "assign_job")[-1].placement > placements[-1]
            assert 3 in cluster.shards("w1")
    assert cluster.job().reason == "POISON_SHARD"


def test_failures_at_different_steps_do_not_add_up(running: Any) -> None:
    for step in range(7, 12):
        leaf_failure(running, host_of(running, 3), pb.LeafFailed.KIND_RAISED, step=step)
    assert running.state() == "RUNNING"


def test_rule_08_deaths_of_workers_never_count_against_a_shard(running: Any) -> None:
    running.report("job-1", 7)
    for turn in range(20):
        victim = host_of(running, 3)
        running.kill(victim)
        running.worker(victim, incarnation=f"{victim}-{turn + 2}")
    assert running.state() == "RUNNING"
    # The shard's whole budget is still there: one failure is tried elsewhere.
    leaf_failure(running, host_of(running, 3), pb.LeafFailed.KIND_CRASHED)
    assert running.state() == "RUNNING"
    assert running.shards("w1") | running.shards("w2") | running.shards("w3") == ALL


def test_a_non_finite_leaf_is_confirmed_elsewhere_and_fails_the_job(running: Any) -> None:
    first = host_of(running, 3)
    leaf_failure(running, first, pb.LeafFailed.KIND_NON_FINITE)
    second = host_of(running, 3)
    assert second != first
    leaf_failure(running, second, pb.LeafFailed.KIND_NON_FINITE)
    assert running.job().reason == "NON_FINITE"


def test_a_failure_that_is_told_again_counts_once(running: Any) -> None:
    first = host_of(running, 3)
    leaf_failure(running, first, pb.LeafFailed.KIND_NON_FINITE, task=5)
    second = host_of(running, 3)
    for _ in range(3):
        running.kill(first)
        running.worker(first)
        leaf_failure(running, first, pb.LeafFailed.KIND_NON_FINITE, task=5)
        assert host_of(running, 3) == second, "it computes the shard already"
    assert running.state() == "RUNNING"
    # The other worker's numbers are its own.
    leaf_failure(running, second, pb.LeafFailed.KIND_NON_FINITE, task=5)
    assert running.job().reason == "NON_FINITE"
    assert running.job().failures[0].attempts == 2


def test_a_lone_worker_is_told_again_to_try_again_and_its_attempts_are_not_used_up(
    cluster: Any,
) -> None:
    cluster.aggregator()
    cluster.worker("w1")
    cluster.submit()
    for _ in range(5):
        before = cluster.told("w1", "assign_job")[-1].placement
        leaf_failure(cluster, "w1", pb.LeafFailed.KIND_RAISED, task=5)
        assert cluster.told("w1", "assign_job")[-1].placement > before
    assert cluster.state() == "RUNNING"
    # Another process of the worker numbers its tasks from the start again.
    cluster.kill("w1")
    cluster.worker("w1", incarnation="w1-2")
    for task in (5, 6):
        assert cluster.state() == "RUNNING"
        leaf_failure(cluster, "w1", pb.LeafFailed.KIND_RAISED, task=task)
    assert cluster.job().reason == "POISON_SHARD"
    assert cluster.job().failures[0].attempts == 3


def test_a_non_finite_leaf_is_skipped_where_the_job_says_so(cluster: Any) -> None:
    cluster.aggregator()
    for name in ("w1", "w2", "w3"):
        cluster.worker(name)

    def skip(spec: Any) -> None:
        spec.train.on_nonfinite.skip.max_steps = 1

    cluster.submit(edit=skip)
    for _ in range(2):
        leaf_failure(cluster, host_of(cluster, 3), pb.LeafFailed.KIND_NON_FINITE)
    absent = cluster.told(host_of(cluster, 3), "absent_shards")[-1]
    assert (list(absent.shards), absent.step) == ([3], 7)
    assert "NON_FINITE_REFUSED" in cluster.types()
    assert cluster.state() == "RUNNING"
    for _ in range(2):
        leaf_failure(cluster, host_of(cluster, 5), pb.LeafFailed.KIND_NON_FINITE, shard=5, step=8)
    assert cluster.job().reason == "NON_FINITE"


def test_retry_goes_on_from_the_last_checkpoint(running: Any) -> None:
    for _ in range(2):
        leaf_failure(running, host_of(running, 3), pb.LeafFailed.KIND_RAISED)
    assert running.state() == "FAILED"
    running.checkpoints["job-1"] = [manifest(5)]
    running.call(ev.RetryJob, "job-1")
    assert running.state() == "RUNNING"
    assert running.core.facts.jobs["job-1"].term == 3, "one term ended the job, one began it again"
    assert running.told("a1", "assign_ranges")[-1].restore.step == 5


def test_a_retried_job_falls_back_to_other_bits_while_it_queues(cluster: Any) -> None:
    cluster.aggregator()
    cluster.worker("w1")

    def fall_back(spec: Any) -> None:
        spec.reproducibility.bitwise.fall_back_after.seconds = 5

    cluster.submit(edit=fall_back)
    for _ in range(3):
        leaf_failure(cluster, "w1", pb.LeafFailed.KIND_HUNG)
    assert cluster.state() == "FAILED"
    cluster.kill("w1")
    cluster.worker("odd", fingerprint="g")
    cluster.call(ev.RetryJob, "job-1")
    assert (cluster.state(), cluster.job().reason) == ("QUEUED", "WAITING_FOR_FINGERPRINT")
    cluster.advance(7.0)
    assert cluster.state() == "RUNNING"
    assert "BIT_IDENTITY_LOST" in cluster.types()


def test_however_much_workers_say_of_a_failure_a_record_has_room_for_it(running: Any) -> None:
    """Each leader in turn would end at a record that storage does not take."""
    said, first = "é" * 1_500_000, host_of(running, 3)
    for _ in range(2):
        worker = host_of(running, 3)
        failed = pb.LeafFailed(
            job_id="job-1", term=1, step=7, shard=3, message=f"Error: {said}", traceback=said
        )
        failed.kind = pb.LeafFailed.KIND_RAISED
        running.say(running.sessions[worker], leaf_failed=failed)
        for kept in running.core.jobs["job-1"].failed_leaves[False, 3] if worker == first else ():
            assert len(kept.message) + len(kept.traceback) < 64 * 1024
    job = running.job()
    assert (running.state(), job.reason) == ("FAILED", "POISON_SHARD")
    assert job.failures[0].traceback.startswith("éé")
    assert running.core.facts.jobs["job-1"].kept.ByteSize() < 1024 * 1024
    assert sum(event.ByteSize() for event in running.events) < 1024 * 1024


def test_an_event_of_a_member_is_as_long_as_there_is_room_for(running: Any) -> None:
    long = "x" * 3_000_000
    details = {f"{number}{long[:10_000]}": long[:100_000] for number in range(100)}
    told = pb.MemberEvent(type="SPECULATION_STARTED", job_id="job-1", message=long, details=details)
    running.say(running.sessions["a1"], member_event=told)
    event = running.events[-1]
    assert event.type == "SPECULATION_STARTED"
    assert event.ByteSize() < 512 * 1024


def test_however_much_a_root_reports_a_record_has_room_for_it(running: Any) -> None:
    """With all-reduce it is a worker, and what it said last is kept with the job that ends."""
    long = "x" * 1_000_000
    running.report("job-1", 7, metrics={long * 3: 1.0})
    failure = Failure(code=long, message="it ends", worker_ids=[long] * 3)
    running.report(
        "job-1",
        8,
        outcome=pb.JobReport.OUTCOME_FAILED,
        reason=long,
        message="it ends",
        failure=failure,
        best=BestEvaluation(metric=long * 2),
    )
    assert running.state() == "FAILED"
    assert running.job().failures[0].message == "it ends"
    assert running.core.facts.jobs["job-1"].kept.ByteSize() < 1024 * 1024
