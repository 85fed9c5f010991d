"""A job that goes on from a checkpoint of another one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from coordinator.control.continuing import Origin, choose, gone, origin_of
from coordinator.control.core.facts import JobFacts
from coordinator.control.core.views import progress_view
from phalanx.errors import InvalidArgument, NotFound
from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1 import storage_service_pb2 as storage_pb
from phalanx.v1.control_journal_pb2 import JobSnapshot, JobSubmitted
from phalanx.v1.job_pb2 import Failure
from phalanx.v1.training_pb2 import Layout, TensorSpec

LEAF = "aa" * 32


def manifest(job_id: str, step: int, ranges: int = 1) -> storage_pb.CheckpointManifest:
    return storage_pb.CheckpointManifest(
        job_id=job_id,
        step=step,
        range_count=ranges,
        root_state='{"elapsed_s": 9, "epoch": 2.5, "examples": 4480}',
        manifest_sha256=f"{step:064x}",
    )


@pytest.fixture
def continued(cluster: Any) -> Any:
    """A cluster with aggregators of two kinds, on the rarer of which the other job ended."""
    for name, fingerprint in (("a1", "f"), ("a2", "f"), ("a3", "g")):
        cluster.aggregator(name, fingerprint=fingerprint)
    for name in ("w1", "w2", "w3"):
        cluster.worker(name)

    def change(submitted: JobSubmitted) -> None:
        submitted.continued.checkpoint.CopyFrom(manifest("job-0", 35))
        submitted.continued.aggregator_fingerprint = "g"

    cluster.submit(change=change)
    assert cluster.state() == "RUNNING"
    return cluster


def restores(cluster: Any, aggregator: str) -> list[tuple[str, int]]:
    told = cluster.told(aggregator, "assign_ranges")
    return [(each.restore.job_id, each.restore.step) for each in told]


def test_it_begins_with_that_checkpoint_on_aggregators_with_the_same_bits(continued: Any) -> None:
    assert restores(continued, "a3") == [("job-0", 35)]
    started = next(event for event in continued.events if event.type == "JOB_STARTED")
    assert "from the checkpoint at step 35 of job-0" in started.message


def test_it_is_shown_at_that_step_before_its_root_has_said_anything(continued: Any) -> None:
    core = continued.core
    facts, runtime = core.facts.jobs["job-1"], core.jobs["job-1"]
    for shown in (continued.job().progress, progress_view(facts, runtime)):
        assert (shown.step, shown.total_steps) == (35, facts.plan.total_steps)
        assert (shown.epoch, shown.examples) == (2.5, 4480)
    continued.report("job-1", 36, owner="a3")
    assert continued.job().progress.step == 36


def test_its_own_checkpoint_is_taken_once_there_is_one(continued: Any) -> None:
    continued.checkpoints["job-1"] = [manifest("job-1", 40)]
    continued.kill("a3")
    continued.aggregator("a3", fingerprint="g", incarnation="a3-2")
    assert restores(continued, "a3") == [("job-1", 40)]


def test_without_one_of_its_own_it_begins_there_again(continued: Any) -> None:
    continued.kill("a3")
    continued.aggregator("a3", fingerprint="g", incarnation="a3-2")
    assert restores(continued, "a3") == [("job-0", 35)]


def test_with_nothing_to_go_on_from_it_fails_and_never_begins_anew(continued: Any) -> None:
    failure = Failure(code="CHECKPOINT_CORRUPT", message="bad checksum")
    ready = pb.RangesReady(job_id="job-1", term=1, failure=failure)
    continued.say(continued.sessions["a3"], ranges_ready=ready)
    assert continued.state() == "FAILED"
    assert continued.job().reason == "START_NOT_USABLE"
    assert "step 35 of job-0" in continued.job().message


def taken_over(origin: Origin) -> JobSubmitted:
    submitted = JobSubmitted(job_id="job-2")
    submitted.plan.bitwise = True
    submitted.plan.state_every = 25
    origin.take_over(submitted)
    return submitted


def test_ranges_are_cut_and_bits_are_chosen_as_they_were(running: Any) -> None:
    facts = running.core.facts.jobs["job-1"]
    facts.kept.term_started.leaf_sha256 = LEAF
    facts.kept.term_started.plan.state_every = 8
    origin = origin_of(facts, manifest("job-1", 5, ranges=3))
    # What the other one was is known, whatever becomes of it.
    facts.kept.Clear()
    taken = taken_over(origin)
    plan, continued = taken.plan, taken.continued
    assert (plan.range_count, plan.fingerprint, plan.state_every) == (3, "f", 8)
    assert (continued.aggregator_fingerprint, continued.leaf_sha256) == ("f", LEAF)
    assert not continued.bit_identity_lost


def test_bits_that_were_lost_stay_lost(running: Any) -> None:
    kept = JobSnapshot(bit_identity_lost=True)
    kept.MergeFrom(running.core.facts.jobs["job-1"].kept)
    taken = taken_over(origin_of(JobFacts(kept), manifest("job-1", 5)))
    assert (taken.plan.fingerprint, taken.continued.aggregator_fingerprint) == ("", "")

    def change(submitted: JobSubmitted) -> None:
        submitted.continued.CopyFrom(taken.continued)

    running.submit("job-2", change=change)
    assert running.state("job-2") == "RUNNING"
    assert not running.core.facts.jobs["job-2"].bit_identical


def test_a_step_that_is_passed_already_is_refused(running: Any) -> None:
    origin = origin_of(running.core.facts.jobs["job-1"], manifest("job-1", 9))
    submitted = JobSubmitted(job_id="job-2")
    submitted.plan.total_steps = 9
    with pytest.raises(InvalidArgument, match=r"train\.stop ends the job at step 9"):
        origin.take_over(submitted)


@pytest.mark.parametrize(
    ("step", "completed", "message"),
    [
        (2**63 - 1, [2**63 - 1] * 4, "further than steps are counted"),
        (2**60, [2**60] * 4, "further than steps are counted"),
        (-1, [-1] * 4, "further than steps are counted"),
        (5, [2**63 - 1, 5, 5, 5], "at step 5 is not one of 4 shards"),
        (5, [], "at step 5 is not one of 4 shards"),
        (5, None, "does not say how far shards are"),
    ],
)
def test_steps_that_cannot_be_counted_on_from_are_refused(
    running: Any, step: int, completed: list[int] | None, message: str
) -> None:
    checkpoint = manifest("job-1", step)
    state = {"elapsed_s": 9} | ({} if completed is None else {"completed_steps": completed})
    checkpoint.root_state = json.dumps(state)
    submitted = JobSubmitted(job_id="job-2")
    submitted.plan.shards, submitted.plan.asynchronous = 4, True
    with pytest.raises(InvalidArgument, match=message) as caught:
        origin_of(running.core.facts.jobs["job-1"], checkpoint).take_over(submitted)
    assert [each.field for each in caught.value.violations] == ["train.start.job"]


def test_a_whole_step_counts_once_where_contributions_do_not_count_by_themselves(
    running: Any,
) -> None:
    facts = running.core.facts.jobs["job-1"]
    submitted = JobSubmitted(job_id="job-2")
    submitted.plan.shards = 4
    origin_of(facts, manifest("job-1", 2**62 - 1)).take_over(submitted)
    with pytest.raises(InvalidArgument, match="further than steps are counted"):
        origin_of(facts, manifest("job-1", 2**62)).take_over(submitted)
    submitted.plan.local_steps = 8
    with pytest.raises(InvalidArgument, match="further than steps are counted"):
        origin_of(facts, manifest("job-1", 2**60)).take_over(submitted)


def test_where_nodes_have_states_the_last_checkpoint_is_no_beginning(running: Any) -> None:
    facts = running.core.facts.jobs["job-1"]
    last, before = manifest("job-1", 35), manifest("job-1", 30)
    last.final = True
    assert choose(facts, [last, before], None) == last
    facts.kept.term_started.plan.state_every = 10
    assert choose(facts, [last, before], None) == before
    with pytest.raises(NotFound, match="at step 35 to go on from: only at step 30, as the last"):
        choose(facts, [last, before], 35)
    with pytest.raises(NotFound, match="no checkpoint to go on from: none, as the last"):
        choose(facts, [last], None)


def test_a_checkpoint_that_went_meanwhile_is_named() -> None:
    error = gone(manifest("job-1", 9))
    assert "step 9 of job-1 was removed meanwhile" in error.message
    assert [each.field for each in error.violations] == ["train.start.job"]


def test_who_gives_another_leaf_than_the_first_job_had_takes_no_part(cluster: Any) -> None:
    cluster.aggregator()
    cluster.auto = False
    cluster.worker("w1")

    def change(submitted: JobSubmitted) -> None:
        submitted.continued.checkpoint.CopyFrom(manifest("job-0", 35))
        submitted.continued.leaf_sha256 = LEAF

    cluster.submit(change=change)
    layout = Layout(tensors=[TensorSpec(name="w", shape=[64, 10])], dtype="float32")
    layout.element_count = 640
    cluster.describe(cluster.sessions["w1"], "job-1", layout=layout, leaf_sha256="bb" * 32)
    assert cluster.told("w1", "assign_job")[-1].leaf_sha256 == LEAF
    ready = pb.WorkerJobReady(job_id="job-1", term=1, leaf_sha256="bb" * 32)
    cluster.say(cluster.sessions["w1"], worker_job_ready=ready)
    assert "WORKER_INELIGIBLE" in cluster.types()


def test_nobody_is_blamed_for_another_leaf_than_one_worker_told_in_the_first_job(
    cluster: Any,
) -> None:
    cluster.aggregator()
    cluster.auto = False
    for name in ("w1", "w2"):
        cluster.worker(name)

    def change(submitted: JobSubmitted) -> None:
        submitted.continued.checkpoint.CopyFrom(manifest("job-0", 35))
        submitted.continued.leaf_sha256 = LEAF

    def edit(spec: Any) -> None:
        spec.train.verification.replicas = 3

    cluster.submit(change=change, edit=edit)
    layout = Layout(tensors=[TensorSpec(name="w", shape=[64, 10])], dtype="float32")
    layout.element_count = 640
    for name in ("w1", "w2"):
        cluster.describe(cluster.sessions[name], "job-1", layout=layout, leaf_sha256="bb" * 32)
    ready = pb.WorkerJobReady(job_id="job-1", term=1, leaf_sha256="bb" * 32)
    cluster.say(cluster.sessions["w1"], worker_job_ready=ready)
    assert "WORKER_INELIGIBLE" in cluster.types()
    assert "WORKER_QUARANTINED" not in cluster.types()


def test_before_its_first_term_it_falls_back_to_other_bits_as_well(cluster: Any) -> None:
    cluster.aggregator()
    cluster.worker("w1", fingerprint="g")

    def change(submitted: JobSubmitted) -> None:
        submitted.continued.checkpoint.CopyFrom(manifest("job-0", 35))
        submitted.plan.fingerprint = "f"

    def edit(spec: Any) -> None:
        spec.reproducibility.bitwise.fall_back_after.seconds = 5

    cluster.submit(edit=edit, change=change)
    assert cluster.job().reason == "WAITING_FOR_FINGERPRINT"
    cluster.advance(6)
    assert "BIT_IDENTITY_LOST" in cluster.types()
    assert cluster.state() == "RUNNING"
    facts = cluster.core.facts.jobs["job-1"]
    assert (facts.fingerprint, facts.bit_identical) == ("g", False)
    assert cluster.told("w1", "assign_job")[-1].plan.shards == 16
    assert restores(cluster, "a1") == [("job-0", 35)]


def test_where_it_goes_on_survives_a_snapshot_of_the_journal(continued: Any) -> None:
    continued.journal[:] = list(continued.core.facts.snapshot())
    continued.lead()
    facts = continued.core.facts.jobs["job-1"]
    assert facts.continued == manifest("job-0", 35)
    assert facts.aggregator_fingerprint == "g"
