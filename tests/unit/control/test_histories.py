"""Storage was restored from a backup: what members hold of the time after it is not taken up."""

from __future__ import annotations

from typing import Any

import pytest

from phalanx.v1 import coordination_service_pb2 as pb
from phalanx.v1 import storage_service_pb2 as storage_pb
from phalanx.v1.training_pb2 import TreeNode

BEFORE, RESTORED = 0, 10**9
RUNNING, STOPPED = pb.JobReport.OUTCOME_RUNNING, pb.JobReport.OUTCOME_STOPPED


def held(term: int = 1) -> pb.HeldRanges:
    return pb.HeldRanges(job_id="job-1", term=term, range_indexes=[0], version=60)


def restored(cluster: Any) -> None:
    """Control begins to lead over a storage that was restored; it answers nothing yet."""
    cluster.report("job-1", 25)
    checkpoint = storage_pb.CheckpointManifest(job_id="job-1", term=1, step=20)
    cluster.checkpoints["job-1"] = [checkpoint]
    cluster.terms["job-1"] += RESTORED
    cluster.history = RESTORED
    cluster.storage_up = False
    cluster.lead()


def storage_answers(cluster: Any) -> None:
    cluster.storage_up = True
    cluster.perform()
    cluster.run_operations()


@pytest.mark.parametrize("outcome", [RUNNING, STOPPED, pb.JobReport.OUTCOME_FAILED])
def test_what_an_aggregator_did_after_the_backup_is_not_believed(
    running: Any, outcome: pb.JobReport.Outcome.ValueType
) -> None:
    restored(running)
    running.aggregator("a1", held_ranges=[held()], history=BEFORE)
    assert running.told("a1", "release_ranges")[-1].term == 1
    running.report("job-1", 60, term=1, outcome=outcome, reason="STEPS")
    assert running.core.jobs["job-1"].step == 0
    running.worker("w1")
    storage_answers(running)
    assert running.state() == "RUNNING"
    assert running.core.facts.jobs["job-1"].term == RESTORED + 2
    (assigned,) = running.told("a1", "assign_ranges")
    assert (assigned.term, assigned.restore.step) == (RESTORED + 2, 20)
    # What it has been given since is its own.
    running.report("job-1", 21)
    assert running.core.jobs["job-1"].step == 21


def test_a_worker_lets_go_of_what_it_had_after_the_backup(running: Any) -> None:
    restored(running)
    node = TreeNode(first=0, span=16)
    job = pb.HeldWorkerJob(job_id="job-1", term=1, placement=7, train_nodes=[node], ready=True)
    running.worker("w1", held_jobs=[job], history=BEFORE)
    assert running.told("w1", "revoke_job")[-1].term == 1
    assert not running.core.jobs["job-1"].train.owners
    running.aggregator("a1")
    storage_answers(running)
    assert running.told("w1", "assign_job")[-1].term == RESTORED + 2


@pytest.mark.parametrize(("known", "told"), [(RESTORED, RESTORED), (None, 5), (RESTORED, None)])
def test_a_member_of_this_history_or_of_none_is_adopted(
    running: Any, known: int | None, told: int | None
) -> None:
    running.history = known
    running.lead()
    running.aggregator("a1", held_ranges=[held()], history=told)
    assert not running.told("a1", "release_ranges")
    assert running.core.facts.jobs["job-1"].term == 1
    welcome = running.told("a1", "welcome")[-1]
    assert (welcome.history if welcome.HasField("history") else None) == known


@pytest.mark.parametrize("told", ["before", "after"])
def test_an_end_that_storage_does_not_have_is_none_whoever_tells_it(
    running: Any, told: str
) -> None:
    """Members of an earlier version know of no history."""
    restored(running)
    running.aggregator("a1", held_ranges=[held()])
    if told == "after":
        running.kill("a1")
        storage_answers(running)  # a term is raised when somebody is there
        running.aggregator("a2", fingerprint="other", held_ranges=[])
        running.aggregator("a1", fingerprint="other", held_ranges=[held()])
    running.report("job-1", 60, term=1, outcome=STOPPED)
    running.worker("w1")
    storage_answers(running)
    assert running.state() == "RUNNING"
